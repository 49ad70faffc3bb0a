"""A short run of the fuzzer, and that it notices what it is there for: crashes, hangs, greed and exceptions of the wrong kind."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_corpus_and_some_mutations_are_survived() -> None:
    command = [sys.executable, "tools/fuzz.py", "--headers", "600", "--texts", "60", "--media", "300", "--seed", "11"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "headers: 600 cases" in done.stdout
    assert "corpus: 20 cases" in done.stdout
    assert "media: 300 cases" in done.stdout


def test_failures_of_every_kind_are_noticed(fuzzer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzzer.LIMITS, "seconds", 0.5)

    def case(draw: random.Random, work: Path, number: int) -> None:
        if number == 1:
            raise KeyError("x")
        if number == 3:
            time.sleep(60)
        if number == 5:
            os.abort()
        if number == 7:
            bytearray(fuzzer.LIMITS["bytes"] * 2)

    found = dict(fuzzer.run_batch(case, 0, list(range(9)), tmp_path))
    assert found.keys() == {1, 3, 5, 7}
    assert found[1].startswith("KeyError")
    assert (found[3], found[5]) == ("signal 14", "signal 6")
    assert found[7].startswith("MemoryError")


def test_a_case_is_made_of_its_number_alone(fuzzer: ModuleType) -> None:
    content = bytes(range(256)) * 8
    for number in range(50):
        assert fuzzer.mutate(content, random.Random(number), 2000) == fuzzer.mutate(content, random.Random(number), 2000)
    assert len({fuzzer.mutate(content, random.Random(number), 2000) for number in range(50)}) > 45
