"""The benchmark runs and reports: every number is there, finite and with its limit. Quiet machines say how large it is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("model", ["demo", "tiny:26B-A4B"])
def test_a_model_is_measured(model: str) -> None:
    found = run(model, "-p", "8", "-n", "4", "-r", "1")
    assert found.returncode == 0, found.stderr
    *table, last = found.stdout.splitlines()
    numbers = json.loads(last)
    for key in ("load_s", "cold_first_token_s", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s"):
        assert 0 < numbers[key] < math.inf, key
    for key, limit in numbers["limits"].items():
        assert 0 < limit < math.inf, key
    assert numbers["memory"] is None or numbers["memory"]["done"]["peak"] >= numbers["memory"]["start"]["anon"]
    assert any(line.startswith("decode, tokens/s") for line in table)


def test_a_model_that_is_not_there_is_one_error() -> None:
    found = run("no/such/folder/anywhere")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert found.stderr.strip()
