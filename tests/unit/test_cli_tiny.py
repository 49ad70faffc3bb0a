"""`gemcutter tiny`: it writes what the other commands can use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcutter.cli import main


def test_a_tiny_checkpoint_can_be_inspected_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a moe"
    assert main(["tiny", "--like", "26B-A4B", str(out), "--seed", "3"]) == 0
    assert f"gemcutter inspect '{out}'" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {layer["projection"] for layer in layers} == {"qkv", "qk"}
    assert all(layer["experts"]["top_k"] < layer["experts"]["count"] for layer in layers)
    assert main(["run", str(out), "Hi", "-n", "2", "--ignore-eos", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 2


def test_seeds_decide_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["tiny", "--like", "E2B", str(tmp_path / name), "--seed", seed]) == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_folder_in_use_or_out_of_reach_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["tiny", "--like", "E2B", str(tmp_path)]) == 1
    assert "is not empty, it holds mine.txt" in capsys.readouterr().err
    assert main(["tiny", "--like", "E2B", str(tmp_path / "mine.txt" / "below")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert str(tmp_path / "mine.txt") in shown
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
