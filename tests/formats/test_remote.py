"""Checkpoints on web servers: how little is read, what every kind of bad server leads to, and the hub in miniature."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.load.match import open_checkpoint, read_checkpoint
from gemcutter.checkpoint.remote import http_file
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.remote.remote_source import open_source, received, survey
from gemcutter.errors import CheckpointError
from tests.formats.web import COMMIT, Site, cut_off, serve, write_hollow


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch, tmp_path)


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(DEMO_FOLDER) as site:
        yield site


@pytest.fixture
def hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Make the site the hub, which holds the demo as owner/model."""
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + "/{repo_id}/resolve/{revision}/{filename}")
    return site


def refusal(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(model)
    return str(caught.value)


def same(remote: Source, local: Source) -> None:
    assert {tensor.name: (tensor.dtype, tensor.shape, tensor.nbytes, tensor.offset) for tensor in remote.tensors.values()} == {
        tensor.name: (tensor.dtype, tensor.shape, tensor.nbytes, tensor.offset) for tensor in local.tensors.values()
    }
    assert [file.name for file in remote.files] == [file.name for file in local.files]


# ---- how little is read ----


@pytest.mark.parametrize(("like", "shards"), [("E2B", 1), ("26B-A4B", 12)])
def test_bytes_read_are_far_below_a_hundredth_of_the_file(tmp_path: Path, like: str, shards: int) -> None:
    total = write_hollow(tmp_path / "big", like, shards)
    with serve(tmp_path / "big") as site:
        source = open_source(f"{site.url}/")
        checkpoint = read_checkpoint(source)
        client = received(source)
        assert client is not None
        same(source, Source.open(tmp_path / "big"))
        assert not checkpoint.matched.missing
        assert client.received_bytes <= site.sent_bytes < total / 1000
        # every byte of every header, the index and the config, and little else
        headers = sum(8 + int.from_bytes(file.open("rb").read(8), "little") for file in (tmp_path / "big").glob("*.safetensors"))
        small = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.json"))
        assert headers + small <= site.sent_bytes <= headers + small + (shards + 2) * http_file.AHEAD_BYTES
        assert client.requests == len(site.seen) <= 2 * shards + 6


def test_a_file_by_its_address(site: Site) -> None:
    source = open_source(f"{site.url}/model.safetensors?signature=abc")
    same(source, Source.open(DEMO_FOLDER))
    assert read_checkpoint(source).plan == open_checkpoint(DEMO_FOLDER).plan
    assert str(source.path).endswith("model.safetensors")
    assert "signature" not in str(source.path)


def test_a_folder_without_an_index(site: Site) -> None:
    same(open_source(f"{site.url}"), Source.open(DEMO_FOLDER))
    assert "has neither model.safetensors.index.json nor model.safetensors" in refusal(f"{site.url}/sub/")


def test_small_files_are_read_once_and_absent_ones_are_none(site: Site) -> None:
    source = open_source(f"{site.url}/")
    for _ in range(2):
        assert source.read_json("generation_config.json") == json.loads((DEMO_FOLDER / "generation_config.json").read_text())
        assert source.read_json("absent.json") is None
    assert [path for path, _, _ in site.seen].count("generation_config.json") == 1
    sent = site.sent_bytes
    assert source.size_of_sidecar("tokenizer.json") == (DEMO_FOLDER / "tokenizer.json").stat().st_size
    assert source.size_of_sidecar("absent.json") is None
    assert site.sent_bytes - sent < 5000


def test_weights_can_not_be_read(site: Site) -> None:
    tensor = next(iter(open_source(f"{site.url}/").tensors.values()))
    for read in (tensor.raw, tensor.torch):
        with pytest.raises(CheckpointError, match="only its header was read; download the checkpoint"):
            read()
    tensor.release()
    tensor.mapped.expect_scattered_reads(0, 1)


def test_a_few_bytes_deep_inside_cost_no_more(tmp_path: Path) -> None:
    write_hollow(tmp_path, "E4B")
    with serve(tmp_path) as site:
        file = next(iter(open_source(f"{site.url}/").tensors.values())).mapped
        sent = site.sent_bytes
        assert file.read(file.size_bytes - 10, 4) == bytes(4)
        assert file.read(file.size_bytes - 10, 4000) == bytes(10)
        assert file.read(file.size_bytes + 10, 4) == b""
        assert site.sent_bytes - sent == 14
        with pytest.raises(ValueError, match="more than 100,000,000 bytes"):
            file.read(0, file.size_bytes)


def test_torch_is_not_imported() -> None:
    code = "import gemcutter.checkpoint.doctor.doctor, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- bad servers ----


@pytest.mark.parametrize("fault", ["no ranges", "no ranges, no length"])
def test_a_server_without_ranges_is_told_and_left(tmp_path: Path, fault: str) -> None:
    size = write_hollow(tmp_path, "E4B")
    with serve(tmp_path, fault=fault) as site:
        started = time.monotonic()
        message = refusal(f"{site.url}/model.safetensors")
        assert "the server sends whole files only (HTTP 200" in message
        assert "nothing was downloaded" in message
        assert time.monotonic() - started < 5
        assert site.sent_bytes < size / 100  # what the two sockets' buffers took before the connection was closed


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("other range", "asked for bytes 0-4095, the server sends 'bytes 1-4096/"),
        ("no range", "the server sends ''"),
        ("no total", "the server sends 'bytes 0-4095/*'"),
        ("too much", "sends more than the 4,096 bytes that were asked for"),
        ("cut", "takes 4,196 bytes, above the 4,096"),
        ("grows", "changed while it was being read; try again"),
        ("loop", "redirects more than 5 times"),
        ("ftp", "which is no web address"),
        ("401", "access refused (HTTP 401)"),
        ("403", "set HF_TOKEN"),
        ("404", "is absent on the server (HTTP 404)"),
        ("429", "the server answered HTTP 429; try again later"),
        ("500", "the server answered HTTP 500; try again later"),
    ],
)
def test_bad_servers_get_one_clear_message(site: Site, fault: str, words: str) -> None:
    site.fault = fault
    message = refusal(f"{site.url}/model.safetensors")
    assert words in message
    assert message.isprintable() or "\n  " in message


def test_a_server_that_is_not_there() -> None:
    assert "can't be read (ConnectionRefusedError" in refusal("http://127.0.0.1:9/model.safetensors")


@pytest.mark.parametrize(
    "url", ["http://", "http:///x", "https://[bad/x", "http://host:99999/x", "http://a b/c", "http://h/\x1b"]
)
def test_what_is_no_address_is_told(url: str) -> None:
    message = refusal(url)
    assert "is no web address" in message or "is neither an existing path" in message
    assert message.isprintable()


def test_a_slow_server_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_file, "DEADLINE_S", -1.0)
    assert "TimeoutError" in refusal(f"{site.url}/model.safetensors")


def test_credentials_in_an_address_are_not_shown() -> None:
    assert "secret" not in refusal("http://user:secret@127.0.0.1:9/model.safetensors?sig=secret")


# ---- bad files on good servers ----


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 5000, 30_000, 1_000_000])
def test_truncated_files_are_told_as_they_are_locally(tmp_path: Path, kept: int) -> None:
    (tmp_path / "model.safetensors").write_bytes((DEMO_FOLDER / "model.safetensors").read_bytes()[:kept])
    local: list[str] = []
    Source.survey(tmp_path, local)
    with serve(tmp_path) as site:
        remote: list[str] = []
        survey(f"{site.url}/model.safetensors", remote)
    assert remote == local != []


def test_a_header_by_its_word_is_not_fetched(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(50_000_000)
    with serve(tmp_path) as site:
        assert "its header takes 90,000,000 bytes, the file has 50,000,000" in refusal(f"{site.url}/model.safetensors")
        assert site.sent_bytes <= http_file.AHEAD_BYTES


def test_index_problems_are_all_told(tmp_path: Path) -> None:
    shutil.copy(DEMO_FOLDER / "model.safetensors", tmp_path / "a.safetensors")
    weight_map = {"norm": "a.safetensors", "x": "../a.safetensors", "y": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with serve(tmp_path) as site:
        message = refusal(f"{site.url}/")
    assert "'../a.safetensors' is not the name of a file" in message
    assert "a.safetensors: lacks 1 tensor" in message
    assert "b.safetensors: is absent on the server (HTTP 404)" in message


# ---- the hub ----


def test_a_repository_is_read_at_one_commit(hub: Site) -> None:
    source = open_source("owner/model")
    same(source, Source.open(DEMO_FOLDER))
    assert read_checkpoint(source).format == "Hugging Face safetensors"
    assert str(source.path) == str(Path("owner/model"))
    weights = [path for path, _, _ in hub.seen if path.endswith(".safetensors")]
    assert weights == [f"owner/model/resolve/{COMMIT}/model.safetensors"] * 2
    assert source.read_json("absent.json") is None  # the listing says so: nothing is asked


@pytest.mark.parametrize("page", ["", "/", "/tree/main", "/blob/main/model.safetensors", "/resolve/main/model.safetensors"])
def test_pages_of_the_hub_are_repositories(hub: Site, page: str) -> None:
    same(open_source(f"{hub.url}/owner/model{page}"), Source.open(DEMO_FOLDER))


def test_a_token_goes_to_the_hub_alone(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve(DEMO_FOLDER) as storage:
        source = open_source("owner/model")
        assert {token for _, _, token in hub.seen} == {"Bearer hf_secret"}
        hub.elsewhere = storage.url  # as the hub sends readers of large files to its storage
        assert source.size_of_sidecar("tokenizer.json")
        assert [token for _, _, token in storage.seen] == [None]
    with serve(DEMO_FOLDER) as stranger:
        open_source(f"{stranger.url}/")
        assert {token for _, _, token in stranger.seen} == {None}


def test_a_cached_repository_is_read_where_it_is(hub: Site, tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(DEMO_FOLDER, root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    source = open_source("owner/model")
    assert received(source) is None
    assert hub.seen == []
    (root / "snapshots" / COMMIT / "model.safetensors").unlink()  # a copy without its weights is not one
    assert received(open_source("owner/model")) is not None


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("401 RepoNotFound", "nor a repository that the hub shows you"),
        ("404 RepoNotFound", "nor a repository that the hub shows you"),
        ("404 RevisionNotFound", "has no revision"),
        ("403 GatedRepo", "is gated: accept its terms on the hub, then set HF_TOKEN"),
        ("401", "set HF_TOKEN to a token that may read it"),
        ("403", "refuses access"),
        ("500", "can't deliver owner/model (HTTP 500)"),
    ],
)
def test_the_hubs_refusals(hub: Site, status: str, words: str) -> None:
    hub.fault = status
    assert words in refusal("owner/model")


def test_offline() -> None:
    assert "the hub can't be reached" in refusal("owner/model") or "can't be downloaded" in refusal("owner/model")
    code = (
        "from gemcutter.checkpoint.remote.remote_source import open_source\n"
        "from gemcutter.errors import CheckpointError\n"
        "try: open_source('owner/model')\n"
        "except CheckpointError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": ""}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert "HF_HUB_OFFLINE forbids the network" in shown


def test_a_repository_without_weights(hub: Site, tmp_path: Path) -> None:
    hub.folder = tmp_path
    (tmp_path / "README.md").write_text("")
    assert "holds no .safetensors or .gguf file (but README.md" in refusal("owner/model")
