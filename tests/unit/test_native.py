"""The native library: found, refused or absent with a reason; and its thread team, under changes of all kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gemcutter
from gemcutter import native
from gemcutter.errors import KernelError

needs_library = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

# Regions of any number of threads, whose results are known: y = x @ w.T, for a dense float32 matrix.
REGION = """
import ctypes, os, random, sys, threading, time
import numpy as np
from gemcutter import native

library, random_numbers = native.load_library(), np.random.default_rng(0)
w = random_numbers.standard_normal((133, 64)).astype(np.float32)
x = random_numbers.standard_normal((5, 64)).astype(np.float32)
expected = x @ w.T
matrix = native.Matrix(w.ctypes.data, 133, 64, 256, 5)

def region():
    y = np.full((5, 133), np.nan, np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, y)]
    assert not library.gc_linear(ctypes.byref(matrix), 1, pointers[0], ctypes.c_int64(5), 2, pointers[1])
    assert np.allclose(y, expected, atol=1e-4)
"""
CHANGES = """
def call(seed, times):
    choose = random.Random(seed)
    try:
        for _ in range(times):
            if choose.random() < 0.1:
                library.gc_set_threads(choose.choice((1, 2, 7)))
            region()
    except BaseException as error:
        failures.append(error)

failures = []
call(0, 1000)
callers = [threading.Thread(target=call, args=(seed, 300)) for seed in (1, 2)]
for caller in callers: caller.start()
for caller in callers: caller.join()
sys.exit(bool(failures))
"""
FORK = """
library.gc_set_threads(3)
for pause in (0, 0.02):  # workers that still spin, and workers asleep
    region()
    time.sleep(pause)
    child = os.fork()
    for _ in range(20): region()
    if not child:
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
FORK_DURING_REGIONS = """
library.gc_set_threads(2)
is_over = False
def call():
    while not is_over: region()
caller = threading.Thread(target=call)
caller.start()
for _ in range(5):
    child = os.fork()
    if not child:
        region()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
is_over = True
caller.join()
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process; nothing here takes longer than a few seconds, unless it hangs."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@needs_library
@pytest.mark.parametrize("code", [CHANGES, FORK, FORK_DURING_REGIONS], ids=["changes", "fork", "fork-during-regions"])
def test_thread_team(code: str) -> None:
    found = run(REGION + code)
    assert found.returncode == 0, found.stderr


@needs_library
def test_the_environment_chooses_a_level() -> None:
    found = run("from gemcutter import native; print(native.level())", GEMCUTTER_LEVEL="portable")
    assert found.stdout.strip() == "portable", found.stderr
    found = run("from gemcutter import native; print(native.level())", GEMCUTTER_LEVEL="Portable")
    assert found.stdout.strip() == "portable", found.stderr
    found = run("from gemcutter import native; print(native.level())", GEMCUTTER_LEVEL="SSE9")
    assert (
        "KernelError: GEMCUTTER_LEVEL=SSE9: expected one of portable, avx2, avx_vnni, avx512, avx512_bf16, amx," in found.stderr
    )


@needs_library
def test_levels_by_name() -> None:
    before = native.level()
    native.set_level("portable")
    assert native.level() == "portable"
    native.set_level(before)
    assert native.level() == before
    with pytest.raises(KernelError, match="'sse9': expected one of portable, avx2, avx_vnni, avx512, avx512_bf16, amx, neon"):
        native.set_level("sse9")
    assert native.level() == before


def test_it_can_be_switched_off() -> None:
    code = "from gemcutter import native; print(native.load_library(), native.level(), native.missing(), sep='; ')"
    for word in ("off", "0", "False", "NO"):
        assert run(code, GEMCUTTER_NATIVE=word).stdout.strip() == f"None; None; switched off by GEMCUTTER_NATIVE={word}"


def test_without_a_library_levels_are_refused() -> None:
    found = run("from gemcutter import native; native.set_level('avx2')", GEMCUTTER_NATIVE="off")
    assert "KernelError: kernel level 'avx2': switched off" in found.stderr


def test_a_library_that_was_asked_for_must_load(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    for name in ("absent.so", "broken.so"):
        found = run("from gemcutter import native; native.load_library()", GEMCUTTER_NATIVE=str(tmp_path / name))
        assert f"KernelError: GEMCUTTER_NATIVE: {tmp_path / name} can't be used" in found.stderr


def test_where_none_was_built_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMCUTTER_NATIVE", raising=False)
    monkeypatch.setattr(native, "FILE", "_absent.so")
    answer = native._open.__wrapped__()
    assert isinstance(answer, str)
    assert "install a C++ compiler" in answer


def test_a_broken_library_that_nobody_asked_for_is_only_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_broken.so").write_bytes(b"not a library")
    monkeypatch.delenv("GEMCUTTER_NATIVE", raising=False)
    monkeypatch.setattr(native, "FILE", "_broken.so")
    monkeypatch.setattr(gemcutter, "__path__", [str(tmp_path)])
    assert f"{tmp_path / '_broken.so'} can't be used" in str(native._open.__wrapped__())


@needs_library
def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMCUTTER_NATIVE", raising=False)
    monkeypatch.setattr(native, "_find", lambda: Path(str(native.load_library()._name)))  # type: ignore[union-attr]
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert f"has interface {native.VERSION - 1}, {native.VERSION} expected" in str(native._open.__wrapped__())


def test_an_editable_installation_finds_what_was_built_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_elsewhere.so").touch()
    monkeypatch.setattr(native, "FILE", "_elsewhere.so")
    monkeypatch.setattr(gemcutter, "__path__", [*gemcutter.__path__, str(tmp_path)])
    assert native._find() == tmp_path / "_elsewhere.so"
