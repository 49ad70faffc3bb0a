"""Short names: each stands for one public checkpoint, and says what is wrong where it can't be had."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gemcutter.checkpoint.remote import hub
from gemcutter.checkpoint.remote.hub import HubId, locate, parse, short_names
from gemcutter.cli import main
from gemcutter.cli.models import STORED
from gemcutter.errors import CheckpointError


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("e2b", "google/gemma-4-E2B-it"),
        ("E4B", "google/gemma-4-E4B-it"),
        ("26b-q4", "mlx-community/gemma-4-26b-a4b-it-4bit"),
        ("31b-base", "google/gemma-4-31B"),
    ],
)
def test_short_names_stand_for_checkpoints(name: str, repo: str) -> None:
    assert parse(name) == HubId(repo, None)
    assert parse(f"{name}@v1.0") == HubId(repo, "v1.0")


def test_every_size_has_a_name_plain_and_quantized() -> None:
    for size in ("e2b", "e4b", "12b", "26b", "31b"):
        for name in (size, f"{size}-q4", f"{size}-base"):
            assert size in short_names()[name].lower()


def test_every_name_stands_for_a_sound_hub_id_and_is_none_itself() -> None:
    for name, repo in short_names().items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert parse(repo) == HubId(repo, None)


def test_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "e2b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse("e2b") == Path("e2b")


def test_unknown_name_says_where_the_known_are_listed() -> None:
    with pytest.raises(CheckpointError, match=r"'e3b' is neither.*`gemcutter models` lists them$") as caught:
        parse("e3b")
    assert len(str(caught.value)) < 240


def test_a_preset_of_the_benchmark_is_told_from_a_model() -> None:
    with pytest.raises(CheckpointError, match=r"bench --preset.*tiny --like e2b FOLDER"):
        parse("tiny:e2b")


def test_the_list_names_every_model_with_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line for line in shown.splitlines()[: len(short_names())]}
    assert rows.keys() == short_names().keys()
    assert all(repo in rows[name] for name, repo in short_names().items())
    assert "E2B base" in rows["e2b-base"]
    for form in ("./demo is a folder", "google/gemma-4-E2B-it@main", "owner/name:gemma-Q4_0.gguf"):
        assert form in shown
    assert main(["models", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["e2b"]["bytes"] == pytest.approx(2 * 4.65e9, rel=0.01)  # decoder and embeddings in bfloat16
    assert found["31b-q4"]["bytes"] < 0.4 * found["31b"]["bytes"]
    assert {row["stored"] for row in found.values()} == STORED.keys()


def test_demo_is_the_packaged_model_and_a_folder_of_that_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "demo", "--json"]) == 0
    shown, notes = capsys.readouterr()
    assert json.loads(shown)["path"] == str(hub.DEMO_FOLDER)
    assert notes == "note: demo is the packaged model; ./demo is the one in this folder\n"
    assert main(["inspect", "./demo"]) == 1
    assert "holds no .safetensors file" in capsys.readouterr().err


def test_name_without_network_and_copy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> Path:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "_snapshot", no_network)
    with pytest.raises(CheckpointError, match=r"google/gemma-4-E2B-it.*neither.*cached.*can't be reached"):
        locate("e2b")
