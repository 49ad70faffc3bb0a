"""The ARM levels of the kernels, under an emulator: what a processor gets, and every kernel test at each level.

`tools/arm.sh` compiles the library for ARM and runs these; without it they are skipped. Python and the references run on this
machine, and only the kernels on the emulated one (remote.py). Nothing here can be timed. Read `test_levels.py` for the levels of
wider x86 processors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_levels import ARM, KERNEL_TESTS, ROOT, check_objects, chosen_tests

BUILT = os.environ.get("GEMCUTTER_ARM", "")  # the folder with the library and the program that calls it
SYSTEM = "/usr/aarch64-linux-gnu"  # where the compiler's C library is
PROCESSORS = {"max": "neon_i8mm", "neoverse-n1": "neon", "cortex-a72": "portable"}  # as QEMU names them, and their levels
PEAKS = {"neon_i8mm": ("float32", "int8", "bfloat16"), "neon": ("float32", "int8"), "portable": ("float32",)}
WHOLE_TEXTS = "nll or continues or decoders or 20000"  # tests that take minutes where every instruction is emulated
PROGRAM = """
import ctypes, remote
from gemcutter import native
from gemcutter.errors import KernelError
library, times = native.load_library(), (ctypes.c_double * 64)()
has = [kind for kind in ("float32", "int8", "bfloat16") if not library.gc_peak(kind.encode(), ctypes.c_int64(3), times, times)]
lacks = []
print(native.level(), *has)
for level in native.LEVELS:
    try:
        native.set_level(level)
    except KernelError as error:
        lacks.append(level)
print(*lacks)
"""
LACKED = {"portable": {"neon", "neon_i8mm"}, "neon": {"neon_i8mm"}, "neon_i8mm": set[str]()}

pytestmark = pytest.mark.skipif(not BUILT, reason="`make arm` runs these")


def run(command: list[str | Path], cpu: str, level: str = "") -> str:
    """Run Python with kernels on an emulated processor; return what it printed."""
    emulator = f"qemu-aarch64 -cpu {cpu} -L {SYSTEM} {BUILT}/remote_calls"
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {"GEMCUTTER_NATIVE": f"{BUILT}/_cpu.so", "GEMCUTTER_REMOTE": emulator, "GEMCUTTER_LEVEL": level}
    settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment = {**os.environ, **settings}
    found = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    return found.stdout


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_a_processor_gets_the_level_that_it_has(cpu: str) -> None:
    level = PROCESSORS[cpu]
    chosen, lacking = run(["-c", PROGRAM], cpu).splitlines()
    assert chosen.split() == [level, *PEAKS[level]]
    assert set(lacking.split()) & {*ARM, "portable"} == LACKED[level]


@pytest.mark.parametrize("name", KERNEL_TESTS)
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_kernels(cpu: str, name: str) -> None:
    level = PROCESSORS[cpu]
    command = ["-m", "pytest", "-p", "remote", "-p", "no:xdist", "-q", "-x", "-rs", Path(__file__).with_name(name)]
    printed = run([*command, "-k", f"({chosen_tests(level)}) and not ({WHOLE_TEXTS})"], cpu, level)
    assert "kernel level" not in printed, "the library lacks a level"


def test_levels_share_no_code() -> None:
    check_objects(Path(BUILT), "aarch64-linux-gnu-nm", {"portable", *ARM})
