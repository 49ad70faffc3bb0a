"""Evaluations that are killed, run out of disk, or meet items that fail: the same command goes on, and the table is the same."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemcutter.cli import main
from gemcutter.evals.records import read
from gemcutter.evals.report import summarize

ITEMS = 24
# One sequence at a time in float32, so that no number depends on what a kill has left to run together.
ASKED = ["--task", "copy/chat", "--option", f"count={ITEMS}", "--max-tokens", "24", "--dtype", "float32", "--max-num-seqs", "1"]
PATIENCE = 120  # seconds


def table_of(folder: Path) -> dict[str, Any]:
    """Return the table of the one run in a folder, without how many rows the cache has spared."""
    (file,) = folder.iterdir()
    run = read(file)
    assert len(run.records) == run.header["items"]
    assert not [line for line in file.read_bytes().splitlines() if not line.endswith(b"}")]
    found = summarize(sorted(run.records.values(), key=lambda record: record.id)).as_json()
    replies = {id: record.reply for id, record in run.records.items()}
    return {name: value for name, value in found.items() if name not in ("cached_tokens", "predicted_tokens")} | {
        "replies": replies
    }


def lines_in(folder: Path) -> int:
    """Return how many whole lines have been written."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("*.jsonl"))


def begin(folder: Path, before: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
    """Start the evaluation in a process of its own."""
    command = [sys.executable, "-m", "gemcutter", "eval", "demo", *ASKED, "--output", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["eval", "demo", *ASKED, "--output", str(folder)]) == 0
    return folder


def test_a_killed_run_goes_on(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instants = sorted(random.Random(3).sample(range(2, ITEMS - 2), 3))
    for lines in instants:  # each time the same command goes on from what the kill before has left
        process = begin(tmp_path)
        started = time.monotonic()
        while lines_in(tmp_path) < lines and process.poll() is None and time.monotonic() - started < PATIENCE:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert lines <= lines_in(tmp_path) <= ITEMS
    left = lines_in(tmp_path)
    assert main(["eval", "demo", *ASKED, "--output", str(tmp_path)]) == 0
    assert f"has {left - 1} of {ITEMS} items; asking the others" in capsys.readouterr().err
    assert lines_in(tmp_path) == ITEMS + 1  # none was asked twice
    assert table_of(tmp_path) == table_of(whole)


@pytest.mark.parametrize("cut", ["middle of a line", "end of a line", "header"])
def test_a_half_written_line_is_dropped(whole: Path, tmp_path: Path, cut: str) -> None:
    (source,) = whole.iterdir()
    lines = source.read_bytes().splitlines(keepends=True)
    kept = {
        "middle of a line": b"".join(lines[:9]) + lines[9][:40],
        "end of a line": b"".join(lines[:10])[:-1],
        "header": lines[0][:20],
    }
    (tmp_path / source.name).write_bytes(kept[cut])
    assert main(["eval", "demo", *ASKED, "--output", str(tmp_path)]) == 0
    assert lines_in(tmp_path) == ITEMS + 1
    assert table_of(tmp_path) == table_of(whole)


def test_a_line_that_is_damaged_elsewhere_is_told(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = whole.iterdir()
    lines = source.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:4], lines[4][:30] + b"\n", *lines[5:]])
    (tmp_path / source.name).write_bytes(damaged)
    assert main(["eval", "demo", *ASKED, "--output", str(tmp_path)]) == 1
    assert "line 5: not JSON" in capsys.readouterr().err
    assert (tmp_path / source.name).read_bytes() == damaged


@pytest.mark.parametrize("room", [100, 4000])
def test_a_full_disk_is_told_and_costs_no_more_than_an_item(whole: Path, tmp_path: Path, room: int) -> None:
    process = begin(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    _, told = process.communicate(timeout=PATIENCE)
    (last,) = told.decode().strip().splitlines()[-1:]
    assert process.returncode == 1
    assert "can't be written: File too large; what is in it stays, and the same command goes on from there" in last
    assert "Traceback" not in told.decode()
    assert 0 <= lines_in(tmp_path) < ITEMS
    assert main(["eval", "demo", *ASKED, "--output", str(tmp_path)]) == 0
    assert table_of(tmp_path) == table_of(whole)


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["eval", "demo", *ASKED, "--output", str(tmp_path / "taken")]) == 1
    assert "can't be written" in capsys.readouterr().err


def test_the_file_of_another_run_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = whole.iterdir()
    assert main(["eval", "demo", *ASKED, "--seed", "1", "--output", str(tmp_path)]) == 0
    (other,) = tmp_path.iterdir()
    assert other.name != source.name
    shutil.copy(source, other)
    capsys.readouterr()
    assert main(["eval", "demo", *ASKED, "--seed", "1", "--output", str(tmp_path)]) == 1
    assert "holds a run of another kind (seed 0 is now 1" in capsys.readouterr().err
    assert other.read_bytes() == source.read_bytes()
    other.write_text("a list of things to buy\n")
    assert main(["eval", "demo", *ASKED, "--seed", "1", "--output", str(tmp_path)]) == 1
    assert other.read_text() == "a list of things to buy\n"


@pytest.mark.parametrize(
    ("asked", "failed"),
    [
        (["--task", "needle/chat", "--option", "lengths=256,600", "--option", "depths=0,100", "--max-tokens", "4"], 2),
        (["--task", "perplexity", "--option", "window=400"], 5),
    ],
)
def test_items_that_fail_are_told_and_asked_again(
    asked: list[str], failed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "demo", *asked, "--output", str(tmp_path)]
    assert main([*words, "--context", "350"]) == 1
    shown = capsys.readouterr()
    (file,) = tmp_path.iterdir()
    run = read(file)
    errors = [record.error for record in run.records.values() if record.error is not None]
    assert len(run.records) == run.header["items"]
    assert 0 < len(errors) <= failed
    assert all("the context holds 350" in error for error in errors)
    assert f"{len(errors)} items failed; the same command asks them again" in shown.err
    assert f"failed {len(errors)} (" in shown.out
    assert main([*words, "--context", "1000"]) == 0
    again = read(file)
    assert not [record for record in again.records.values() if record.error is not None]
    assert again.records.keys() == run.records.keys()
