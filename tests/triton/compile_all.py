"""Compiles every kernel that models of released sizes launch, at any batch, draft and prompt: minutes, and no GPU.

`python -m tests.triton.compile_all [--presets E4B,31B] [--quants bf16,q4_0] [--targets 90]` prints a line for each that spills
registers, takes more shared memory than there is, or does not compile; exit status 1 if there are any. `triton_report.py`'s own
list, which the tests hold to the same limits, is a selection. Read `dry.py` for how launches are found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gemcutter.benchmark.synthetic import SIZES
from gemcutter.engine.cuda_graphs import TokenSource
from gemcutter.engine.step import build_step
from gemcutter.ops.triton.linear import TYPES
from gemcutter.ops.triton.report import measure, runs_on
from gemcutter.ops.triton.variant import Variant
from tests.triton.dry import pretend, setting, static_step, works_of

STATIC = ((1, 1), (8, 1), (32, 1), (1, 5), (4, 5))  # sequences, and rows of each
PROMPTS = (((0, 512),), ((0, 2048), (100, 1), (100, 1)), ((700, 300),), ((0, 4),))  # of each sequence: its depth, its rows
LAUNCH = {"num_warps": 4, "num_stages": 3}  # and Triton's own choice


def variant_of(kernel: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> Variant:
    """Describe what a launch would compile."""
    plain, signature = set(kernel.do_not_specialize or ()), dict[str, str]()
    fixed = {name: value for name, value in constants.items() if name not in LAUNCH}
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, Tensor):
            assert not value.storage_offset() * value.itemsize % 16, f"{kernel.fn.__name__}: {name} is not aligned"
            signature[name] = TYPES[value.dtype]
        elif value is None or (value == 1 and isinstance(value, int) and name not in plain):
            fixed[name] = value
        else:
            is_even = isinstance(value, int) and not value % 16 and name not in plain
            signature[name] = "fp32" if isinstance(value, float) else "i32:16" if is_even else "i32"
    warps, stages = (constants.get(name, usual) for name, usual in LAUNCH.items())
    return Variant(kernel, signature, fixed, warps, stages, f"{kernel.fn.__name__} {sorted(fixed.items(), key=str)}")


def launches(presets: Sequence[str], quants: Sequence[str]) -> dict[str, Variant]:
    """List what models launch, each compilation once."""
    found = dict[str, Variant]()

    def note(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        variant = variant_of(kernel, arguments, constants)
        found.setdefault(f"{variant.name} {sorted(variant.signature.items())} {variant.num_warps} {variant.num_stages}", variant)

    with pretend(note):
        for preset in presets:
            for quant in quants:
                decoder, pool = setting(preset, quant)
                for shape in STATIC:
                    static_step(decoder, pool, *shape).launch(TokenSource.GREEDY, is_captured=False)
                for prompts in PROMPTS:
                    works = [work for depth, rows in prompts for work in works_of(pool, [depth], rows)]
                    decoder.logits(decoder.forward(build_step(decoder, works), pool))
                    for work in works:
                        work.table.release()
    return found


def problems_of(variant: Variant, target: int) -> tuple[str, ...]:
    """Compile one, and say what is wrong with it."""
    try:
        return measure(variant, target).problems
    except Exception as error:  # whatever a compiler raises
        return (f"{variant.name} on sm_{target} does not compile: {error!r}"[:600],)


def main(arguments: Sequence[str]) -> int:
    """Compile all, print problems as they are found; give 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, usual in (("presets", ",".join(SIZES)), ("quants", "bf16,q4_0"), ("targets", "90")):
        parser.add_argument(f"--{name}", default=usual)
    options = parser.parse_args(arguments)
    found, bad = launches(options.presets.split(","), options.quants.split(",")), 0
    for target in map(int, options.targets.split(",")):
        for variant in found.values():
            problems = problems_of(variant, target) if runs_on(variant, target) else ()
            print(*problems, sep="\n", end="\n" if problems else "", flush=True)
            bad += bool(problems)
    print(f"{len(found)} kernels of {options.presets} in {options.quants} for sm_{options.targets}: {bad} with problems")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
