"""Short names: each stands for one public checkpoint, and says what is wrong where it can't be had."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemcutter.checkpoint.remote import hub
from gemcutter.checkpoint.remote.hub import HubId, locate, parse, short_names
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


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(CheckpointError, match=r"e3b.*e2b, e4b, 12b.*31b-fp8"):
        parse("e3b")


def test_name_without_network_and_copy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> Path:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "_snapshot", no_network)
    with pytest.raises(CheckpointError, match=r"google/gemma-4-E2B-it.*neither.*cached.*can't be reached"):
        locate("e2b")
