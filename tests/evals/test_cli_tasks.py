"""`gemcutter eval` with tasks that need more than text: images, declared functions, and leave to run programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcutter.cli import main
from gemcutter.evals.records import read
from tests.evals.test_bfcl import write as write_bfcl
from tests.evals.test_mmmu import ROWS, with_pictures
from tests.evals.test_mmmu import write as write_mmmu
from tests.trained import release_folder


def test_questions_with_images_are_asked_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mmmu(tmp_path / "Accounting" / "validation-00000-of-00001.parquet", [with_pictures(row) for row in ROWS["mmmu"][::4]])
    words = ["--task", "mmmu", "--mode", "mmmu-direct", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["eval", str(release_folder()), *words, "--max-tokens", "4", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["result"]["items"], found["result"]["failed"]) == (2, 0)
    [file] = (tmp_path / "out").glob("*.jsonl")
    assert all(record.prompt_tokens > 100 for record in read(file).records.values())  # an image is more than its question


def test_functions_are_declared_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "bfcl", "--data", str(write_bfcl(tmp_path)), "--output", str(tmp_path / "out")]
    assert main(["eval", "demo", *words, "--dry-run", "--subjects", "multiple"]) == 0
    shown = capsys.readouterr().out
    assert "declaration:math_add" in shown
    assert main(["eval", "demo", *words, "--max-tokens", "4", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["result"]["failed"] == 0


def test_programs_are_not_run_without_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "demo", "--task", "humaneval", "--mode", "chat", "--data", str(tmp_path)]) != 0
    assert "--option run=yes" in capsys.readouterr().err
