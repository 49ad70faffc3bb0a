"""A kernel as it is compiled ahead of time: what `report.py` lists and tests hold to limits.

Owns the type; every file of Triton kernels exports `VARIANTS`, its hot kernels in the shapes of the family. Imports no torch and
no Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of one kernel: argument types as Triton spells them ("*bf16", "i32"; ":16" after a type promises a
    multiple of 16), constants by name, the launch shape, and the targets on which it is launched so.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    name: str
    targets: tuple[int, ...] = (80, 90, 100)


def variant_of(kernel: Any, name: str, warps: int, types: str, **constants: Any) -> Variant:
    """Name a compilation; `types` are those of the leading arguments in order, "-" for one that is None."""
    given = dict(zip(kernel.arg_names, types.split(), strict=False))
    absent = {argument: None for argument, kind in given.items() if kind == "-"}
    signature = {argument: kind for argument, kind in given.items() if kind != "-"}
    return Variant(kernel, signature, {**absent, **constants}, warps, 1, name)
