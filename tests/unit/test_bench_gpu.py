"""The GPU comparison, as far as a machine without a GPU can run it: checks, one narrow model, the JSON and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu_kernels import PAGE_TOKENS, paged_context

CPU = ["--device", "cpu", "--presets", "tiny:E2B", "--quants", "q4_0", "-p", "8", "-n", "2", "--batch", "1", "2", "-r", "1"]


def test_checks_then_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*CPU, "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert [check["is_good"] for check in found["checks"]] == [True] * 4  # two models, against the reference and transformers
    (model,) = found["models"]
    assert [(row["test"], row["batch"]) for row in model["rows"]] == [("pp8", 1), ("tg2", 1), ("tg2x2", 2)]
    assert all(row["ms_a_step"] > row["floor_ms"] > 0 for row in model["rows"])
    assert "| tiny:E2B q4_0 | tg2x2 |" in capsys.readouterr().out


def test_nothing_is_timed_once_a_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"check": "NLL of tiny", "error": 0.02, "limit": 0.005, "is_good": False}
    monkeypatch.setattr(gpu, "check_models", lambda device: iter([bad]))
    assert gpu.main([*CPU, "--results", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["models"] == []


def test_a_model_that_does_not_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("no room for it\nand a trace")

    monkeypatch.setattr(gpu, "check_models", lambda device: iter(()))
    monkeypatch.setattr(gpu, "time_model", full)
    assert gpu.main([*CPU, "--results", str(tmp_path)]) == 0
    assert "| tiny:E2B q4_0 | not measured: no room for it |" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_a_context_is_described_page_by_page() -> None:
    found = paged_context(3, 2 * PAGE_TOKENS + 1, torch.device("cpu"))
    assert found.pages_SP.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert found.positions_N.tolist() == [2 * PAGE_TOKENS] * 3
    assert (found.row_sequence_N.tolist(), found.query_start_S1.tolist()) == ([0, 1, 2], [0, 1, 2, 3])
