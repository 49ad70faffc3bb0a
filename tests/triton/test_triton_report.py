"""Every listed kernel variant, compiled ahead of time for GPUs that need not be here: no spills, and shared memory that exists.

Compiles in a process of its own, since the one of the other tests may run under Triton's interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl

from gemcutter.ops.triton.report import RESOURCES, SHARED_LIMITS, Cost, runs_on, variants
from gemcutter.ops.triton.variant import Variant

LINE = re.compile(r"(\S.*?) +sm_(\d+) +(\d+) +(\d+) +(\d+)")


def compile_apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run python in a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_hot_variants_neither_spill_nor_outgrow_shared_memory(target: int) -> None:
    found = compile_apart("-m", "gemcutter.ops.triton.report", str(target))
    assert found.returncode == 0, found.stdout + found.stderr
    lines = [LINE.fullmatch(line) for line in found.stdout.splitlines()[1:]]
    listed = {line[1]: [int(number) for number in line.groups()[1:]] for line in lines if line is not None}
    assert set(listed) == {variant.name for variant in variants() if runs_on(variant, target)}
    for where, registers, shared, spilled in listed.values():
        assert where == target
        assert 0 < registers <= 255
        assert shared <= SHARED_LIMITS[target]
        assert not spilled


def test_names_are_distinct() -> None:
    names = [(variant.name, target) for variant in variants() for target in SHARED_LIMITS if runs_on(variant, target)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("cost", "problems"),
    [
        (Cost("norm", 90, 32, 227 << 10, 0), ()),
        (Cost("norm", 90, 32, 64, 8), ("norm on sm_90 spills 8 bytes a thread",)),
        (
            Cost("norm", 80, 255, 200_000, 16),
            ("norm on sm_80 spills 16 bytes a thread", "norm on sm_80 takes 200000 bytes of shared memory, 166912 are to be had"),
        ),
    ],
)
def test_problems_are_told(cost: Cost, problems: tuple[str, ...]) -> None:
    assert cost.problems == problems


@triton.jit
def _copy(source, target, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(target + lanes, tl.load(source + lanes))


def test_old_targets_have_no_8_bit_floats() -> None:
    wide, narrow = (Variant(_copy, {"source": kind, "target": kind}, {"SIZE": 32}, 1, 1, kind) for kind in ("*bf16", "*fp8e4nv"))
    assert [runs_on(wide, target) for target in SHARED_LIMITS] == [True, True, True]
    assert [runs_on(narrow, target) for target in SHARED_LIMITS] == [False, True, True]
    assert [runs_on(replace(wide, targets=(80,)), target) for target in SHARED_LIMITS] == [True, False, False]


def test_resources_are_read_from_the_assemblers_words() -> None:
    text = " Function _copy:\n  REG:40 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert RESOURCES.findall(text) == [("40", "8", "16", "4")]


SPILLS = """
import triton, triton.language as tl
from gemcutter.ops.triton.report import measure
from gemcutter.ops.triton.variant import Variant

@triton.jit
def scan(source, target, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    x, y = tl.load(source + lanes), tl.load(source + SIZE + lanes)
    for _ in range(3):
        x, y = x * y + tl.sum(x, 0), y * x + tl.sum(y, 0)
    tl.store(target + lanes, x + y)

kinds = {"source": "*fp32", "target": "*fp32"}
for size in (256, 32768):
    print(measure(Variant(scan, kinds, {"SIZE": size}, 1, 1, "scan"), 90).spilled > 0)
"""


def test_a_kernel_that_spills_is_found_out(tmp_path: Path) -> None:
    """Without this, a report that misread its numbers would let everything pass."""
    script = tmp_path / "spills.py"  # Triton reads a kernel's source from its file
    script.write_text(SPILLS)
    found = compile_apart(str(script))
    assert found.stdout.split() == ["False", "True"], found.stderr
