"""From what a user calls a model to a path: local forms, a handmade hub cache, and a hub on this machine that refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._paths import filter_repo_objects

from gemcutter.checkpoint.remote.hub import locate
from gemcutter.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNREACHABLE = "http://127.0.0.1:9"  # a closed port refuses at once


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty hub cache, with the hub itself out of reach; no test may leave this machine."""
    folder = tmp_path / "home" / "hub"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return folder


def keep(cache: Path, repo: str, *names: str, revision: str = "main") -> Path:
    """Put a snapshot of `repo` with these files into the cache, as a download would have."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in names:
        (snapshot / name).write_text("{}")
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(COMMIT)
    return snapshot


def refusal(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    return str(caught.value)


# ---- on this machine ----


def test_demo_is_the_packaged_model(cache: Path) -> None:
    (cache.parent.parent / "demo").mkdir()  # the name is ours; ./demo reaches a folder of that name
    assert (locate("demo") / "model.safetensors").is_file()
    assert locate("./demo") == Path("demo")
    assert locate(".") == Path()


def test_existing_paths_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "model.safetensors").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("owner/name", "owner/name/model.safetensors", "owner", str(tmp_path)):
        assert locate(model) == Path(model)
    assert locate("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "model",
    ["./absent", "../absent", "/absent/model", "~/absent", "absent/", "absent.safetensors", "a/b.gguf", "C:\\x", "a\\b"],
)
def test_absent_local_path_says_so(cache: Path, model: str) -> None:
    assert refusal(model).endswith("does not exist on this machine")  # a path needs no list of all that a model may be


@pytest.mark.parametrize(
    "model",
    [
        "",
        " ",
        "gemma",
        "a/b/c",
        "a/b@",
        "a/b@..",
        "a/b@x/../y",
        "@main",
        "-a/b",
        "a b/c",
        "a/b\n",
        "a/b@m\n",
        "hf://a/b",
        "x\0/y",
        "é/b",
    ],
)
def test_what_is_neither_path_nor_id_says_what_model_may_be(cache: Path, model: str) -> None:
    message = refusal(model)
    assert "is neither an existing path nor a hub id" in message
    for form in ('"demo"', "a folder or file", "google/gemma-4-E2B-it", "`gemcutter models` lists them"):
        assert form in message
    assert message.isprintable()


@pytest.mark.parametrize("model", ["a--b/c", "a/b.git", f"a/{'b' * 100}"])
def test_what_the_hub_holds_for_no_id_says_what_model_may_be(cache: Path, model: str) -> None:
    message = refusal(model)
    assert "is not a valid hub id" in message
    assert "MODEL is" in message


# ---- the download ----


def test_download_asks_for_weights_and_text_files_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        return str(keep(cache, repo, "model.safetensors"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("owner/name@refs/pr/3") == cache / "models--owner--name" / "snapshots" / COMMIT
    (options,) = asked
    assert (options["repo"], options["revision"], options["local_files_only"]) == ("owner/name", "refs/pr/3", False)
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    wanted += ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json"]
    unwanted = [
        "pytorch_model.bin",
        "model.pth",
        "model.pt",
        "model.gguf",
        "model.onnx",
        "README.md",
        "modeling.py",
        "tokenizer.bin",
    ]
    unwanted += ["onnx/config.json", "original/consolidated.safetensors", "consolidated.safetensors"]
    kept = filter_repo_objects(
        wanted + unwanted, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(kept) == wanted


def test_repository_without_safetensors_says_so(cache: Path) -> None:
    keep(cache, "owner/name", "config.json")
    assert "holds no .safetensors file; choose a safetensors release" in refusal("owner/name")


# ---- without a network ----


@pytest.mark.parametrize("is_offline", [False, True])
def test_cached_copy_serves_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    snapshot = keep(cache, "owner/name", "config.json", "model.safetensors", revision="v2")
    assert locate("owner/name@v2") == snapshot
    refusal("owner/name@v3")
    if is_offline:  # otherwise the hub's library tries for long to list a commit that it never listed before
        assert locate(f"owner/name@{COMMIT}") == snapshot


def test_cached_copy_serves_when_the_download_breaks_in_any_way(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = keep(cache, "owner/name", "model.safetensors")
    real = huggingface_hub.snapshot_download

    def download(repo: str, **options: Any) -> str:
        if not options["local_files_only"]:
            raise RuntimeError("the HTTP library's own exception")
        return str(real(repo, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("owner/name") == snapshot
    message = refusal("owner/other")
    assert "owner/other can't be downloaded (RuntimeError: the HTTP library's own exception) and no complete copy" in message
    assert "pass the folder" in message


def test_no_network_and_no_copy_says_what_to_do(cache: Path) -> None:
    message = refusal("owner/name")
    assert "the hub can't be reached" in message
    for remedy in ("check the network", "HF_HUB_OFFLINE", "HF_HOME", "download it on another machine and pass the folder"):
        assert remedy in message


def test_offline_mode_and_no_copy_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal("owner/name")
    assert "HF_HUB_OFFLINE forbids the network; unset it, or download it on another machine" in message


def test_hf_home_and_offline_mode_are_honoured_from_the_environment(cache: Path) -> None:
    snapshot = keep(cache, "owner/name", "model.safetensors")
    code = "import sys; from gemcutter.checkpoint.remote.hub import locate; print(locate('owner/name'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(cache.parent), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert Path(result.stdout.strip()) == snapshot


# ---- a hub that refuses ----


@pytest.fixture
def answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Run a hub on this machine that answers every request with the given status and error code."""
    reply: dict[str, Any] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(reply["status"])
            self.send_header("X-Error-Code", reply["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield reply
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "owner/name is gated: accept its terms on the hub, then set HF_TOKEN"),
        (401, "GatedRepo", "owner/name is gated"),
        (404, "RepoNotFound", "neither a local folder nor a repository that the hub shows you; check the spelling"),
        (401, "RepoNotFound", "if the repository is private set HF_TOKEN"),
        (404, "RevisionNotFound", "owner/name has no revision 'v9' on the hub"),
        (403, "", "the hub refuses access to owner/name (HTTP 403); set HF_TOKEN"),
        (500, "", "the hub can't deliver owner/name (HTTP 500) and no copy is cached; try again later"),
    ],
)
def test_refusal_of_the_hub_is_explained(answer: dict[str, Any], status: int, code: str, expected: str) -> None:
    answer.update(status=status, code=code)
    assert expected in refusal("owner/name@v9")


def test_cached_copy_serves_where_the_hub_refuses(answer: dict[str, Any], cache: Path) -> None:
    answer.update(status=403, code="GatedRepo")
    snapshot = keep(cache, "owner/name", "model.safetensors")
    assert locate("owner/name") == snapshot


# ---- one file of a GGUF repository ----


@pytest.mark.parametrize(
    ("file", "wanted"),
    [("m-Q4_0.gguf", ["m-Q4_0.gguf"]), ("m-00002-of-00002.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])],
)
def test_a_named_file_is_fetched_with_all_its_parts(
    cache: Path, monkeypatch: pytest.MonkeyPatch, file: str, wanted: list[str]
) -> None:
    names = ["m-Q4_0.gguf", "m-Q8_0.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "config.json"]
    kept: list[str] = []

    def download(repo: str, **options: Any) -> str:
        kept[:] = filter_repo_objects(names, allow_patterns=options["allow_patterns"])
        return str(keep(cache, repo, *kept))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate(f"owner/name:{file}@main").name == file
    assert kept == wanted


def test_a_file_that_is_not_there_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(keep(cache, repo, "m-Q4_0.gguf")))
    assert "there is no file m-Q5_0.gguf in it" in refusal("owner/name:m-Q5_0.gguf")
    assert "name a file of a GGUF release (owner/other:file.gguf)" in refusal("owner/other")
