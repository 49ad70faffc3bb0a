"""What Triton kernels take before they run: compiles every listed variant ahead of time, on any machine, and reads the result.

Owns the targets and their limits; `python -m gemcutter.ops.triton.report [80 90 100]` prints registers, shared memory and spilled
bytes of each variant on each target. Needs Triton, whose wheels bring the assembler, and no GPU; a process under Triton's
interpreter can't compile. Refuses to know what kernels compute. Read the `VARIANTS` of their files for what is listed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from gemcutter.ops.triton.variant import Variant

FILES = ("fused_norm", "elementwise", "attention", "linear", "moe")
SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory that one program may take
FP8_TARGET = 89  # the first target that converts 8-bit floats
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one variant takes on one target: registers of a thread, bytes of shared memory of a program, bytes that each thread
    keeps in local memory because no register was left.
    """

    name: str
    target: int
    registers: int
    shared: int
    spilled: int

    @property
    def problems(self) -> tuple[str, ...]:
        """Describe what is wrong with it."""
        limit = SHARED_LIMITS[self.target]
        where = f"{self.name} on sm_{self.target}"
        spills = f"{where} spills {self.spilled} bytes a thread"
        room = f"{where} takes {self.shared} bytes of shared memory, {limit} are to be had"
        return (*([spills] if self.spilled else []), *([room] if self.shared > limit else []))


def variants() -> Iterator[Variant]:
    """List the hot variants of all files."""
    for file in FILES:
        yield from import_module(f"gemcutter.ops.triton.{file}").VARIANTS


def runs_on(variant: Variant, target: int) -> bool:
    """Return whether a variant is launched on a target, which has its types."""
    has_types = target >= FP8_TARGET or not any("fp8e4nv" in kind for kind in variant.signature.values())
    return target in variant.targets and has_types


def measure(variant: Variant, target: int) -> Cost:
    """Compile a variant for a target and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    kinds = {name: variant.signature.get(name, "constexpr").partition(":")[0] for name in names}
    source = ASTSource(variant.kernel, kinds, dict(variant.constexprs), _alignments(variant))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, stack, local = _resources(compiled.asm["cubin"])
    return Cost(variant.name, target, registers, compiled.metadata.shared, stack + local)


def _alignments(variant: Variant) -> dict[tuple[int], list[Any]]:
    """Promise what a launch finds out by itself: tensors lie at multiples of 16 bytes, and so do numbers that say so."""
    names, sixteen = variant.kernel.arg_names, [["tt.divisibility", 16]]
    aligned = (name for name, kind in variant.signature.items() if kind.startswith("*") or kind.endswith(":16"))
    return {(names.index(name),): sixteen for name in aligned}


def _resources(binary: bytes) -> tuple[int, int, int]:
    """Read registers, stack and local memory of the one kernel of a binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = RESOURCES.findall(text)
    registers, stack, _, local = map(int, found)
    return registers, stack, local


def costs(targets: Sequence[int]) -> Iterator[Cost]:
    """Measure all variants on those targets that have their types."""
    for variant in variants():
        for target in targets:
            if runs_on(variant, target):
                yield measure(variant, target)


def main(arguments: Sequence[str]) -> int:
    """Print one line a variant and target, all targets or the given ones; give 1 where something is wrong with any."""
    print(f"{'variant':48} {'target':>7} {'registers':>10} {'shared':>8} {'spilled':>8}")
    problems = list[str]()
    for cost in costs(tuple(map(int, arguments)) or tuple(SHARED_LIMITS)):
        print(f"{cost.name:48} {f'sm_{cost.target}':>7} {cost.registers:10} {cost.shared:8} {cost.spilled:8}", flush=True)
        problems += cost.problems
    print(*problems, sep="\n", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
