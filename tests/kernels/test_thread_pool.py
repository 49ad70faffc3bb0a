"""The thread pool and the size of its team, each under a program in C++; `tools/sanitize.sh` runs the first one, too."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("program", "parts"),
    [("thread_pool", ("thread_pool", "signal", "team_size")), ("team_size", ("team_size",))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_program_finds_no_failure(program: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    sources = [ROOT / "tests/kernels" / f"{program}.cpp", *(ROOT / "csrc/cpu" / f"{part}.cpp" for part in parts)]
    assert COMPILER is not None
    subprocess.run([COMPILER, "-std=c++17", "-O1", *sources, "-o", tmp_path / program, "-pthread"], check=True)
    done = subprocess.run([tmp_path / program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
