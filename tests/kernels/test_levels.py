"""Levels that this processor does not use by itself, emulated where it lacks them; and that no level's code serves another.

A library with -DGC_EMULATE computes AVX-512 and AMX in plain C++ (csrc/emulate). It is built once, into build/emulated, and all
kernel tests run over it in a process of their own, since a process keeps the library that it loaded first. Of a level that the
processor has, tests that name levels run elsewhere, so that only the others do here, on its own instructions.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemcutter import native
from gemcutter.errors import KernelError

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = sorted(path.name for path in Path(__file__).parent.glob("test_native_*.py"))
EMULATED = ("avx_vnni", "avx512", "avx512_bf16", "amx")
ARM = ("neon", "neon_i8mm")  # levels that `test_arm.py` tests
# What a level does otherwise than the one below it, where that is little: the rest would only be emulated twice.
OWN = {
    "avx_vnni": ("test_native_packed.py",),
    "avx512_bf16": ("test_native_attention.py", "test_native_dense.py", "test_native_vision.py"),
    "amx": tuple(name for name in KERNEL_TESTS if name != "test_native_audio.py"),  # whose products are the others'
}


@pytest.fixture(scope="module")
def present() -> frozenset[str]:
    """Return the levels that this processor has."""
    before, found = native.level(), set[str]()
    for level in EMULATED if before is not None else ():
        try:
            native.set_level(level)
        except KernelError:
            continue
        found.add(level)
    if before is not None:
        native.set_level(before)
    return frozenset(found)


@pytest.fixture(scope="module")
def emulated() -> Path:
    """Build the library with emulated levels, unless it is there and new; skip where that can't be done."""
    if platform.machine() not in ("x86_64", "AMD64") or native.level() in (None, "portable"):
        pytest.skip("emulation needs AVX2")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    folder = ROOT / "build" / "emulated"
    subprocess.run([ROOT / "tools" / "native.sh", folder, "-DGC_EMULATE=ON"], check=True)
    return folder


NAME_NO_LEVEL = f"not ({' or '.join(native.LEVELS)})"  # for -k


def chosen_tests(level: str) -> str:
    """Return what -k takes to run the tests that name this level, and those that name none."""
    longer = [other for other in native.LEVELS if level in other and other != level]  # -k looks for parts of names
    own = f"({level} and not ({' or '.join(longer)}))" if longer else level
    return f"{own} or {NAME_NO_LEVEL}"


def run_kernel_tests(name: str, chosen: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the kernel tests of a file in a process of their own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rs", Path(__file__).with_name(name), "-k", chosen],
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "level"), [(name, level) for name in KERNEL_TESTS for level in EMULATED if name in OWN.get(level, KERNEL_TESTS)]
)
def test_kernels_of_wider_processors(name: str, level: str, present: frozenset[str], request: pytest.FixtureRequest) -> None:
    if level in present:
        pytest.skip("this processor has the level")
    library = request.getfixturevalue("emulated") / "_cpu.so"
    found = run_kernel_tests(name, chosen_tests(level), GEMCUTTER_NATIVE=str(library), GEMCUTTER_LEVEL=level)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert "kernel level" not in found.stdout, "the emulated library lacks a level"


@pytest.mark.parametrize("level", EMULATED)
def test_kernels_that_a_wider_processor_passes_over(level: str, present: frozenset[str]) -> None:
    """Of a level that this processor has and does not use by itself: tests that run at whatever level is in use."""
    if level not in present or level == native.level():
        pytest.skip("the level is missing, or in use")
    for name in OWN.get(level, KERNEL_TESTS):
        found = run_kernel_tests(name, NAME_NO_LEVEL, GEMCUTTER_LEVEL=level)
        assert found.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), found.stdout[-4000:] + found.stderr[-2000:]


def test_levels_share_no_code(request: pytest.FixtureRequest) -> None:
    """An inline function compiled for one level must not be the copy that the linker keeps for all: none may be shared."""
    nm, built = shutil.which("nm"), ROOT / "build" / "native"  # which `make native` builds
    if nm is None:
        pytest.skip("no nm")
    if platform.machine() not in ("x86_64", "AMD64") or not (built / "CMakeFiles").exists():
        built = request.getfixturevalue("emulated")
    check_objects(built, nm, set(native.LEVELS) - set(ARM))


def check_objects(built: Path, nm: str, levels: set[str]) -> None:
    """Check the objects of all levels of a library, which are these."""
    objects = sorted((built / "CMakeFiles").glob("level_*.dir/**/*.o"))
    assert {path.relative_to(built / "CMakeFiles").parts[0] for path in objects} == {f"level_{name}.dir" for name in levels}
    for path in objects:
        level = path.relative_to(built / "CMakeFiles").parts[0].removeprefix("level_").removesuffix(".dir")
        listed = subprocess.run([nm, "-C", path], check=True, capture_output=True, text=True).stdout
        for kind, name in re.findall(r"^(?:[0-9a-f]+| +) (\w) (.*)$", listed, re.MULTILINE):
            if kind in "TDBRVWuvwi":  # seen by, or merged with, other objects
                assert re.fullmatch(rf"gemcutter::\w+_{level}(\(.*\))?", name), f"{path.name} of {level} offers {name}"
            if kind == "U":  # and it calls nothing but the C library, and the tables that higher levels fall back on
                assert not name.startswith(("std::", "operator ")), f"{path.name} of {level} needs {name}"
