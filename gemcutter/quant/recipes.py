"""Quantizers by name: which scheme each weight gets, and how a dense matrix becomes a packed one some rows at a time.

Owns the recipes. A recipe is a scheme for the matrices that every token multiplies, and a better one where bits buy more than
they cost: the table of per-layer embeddings (whose rows are only gathered), the head, the router. "q4" and "q8" are the ones
to recommend, measured in `docs/numerics.md`; "mlx4" and "mlx8" do what mlx-lm does, "Q4_0" and "Q8_0" hold llama.cpp's
blocks. Refuses to know files and layers. Read `affine.py` and `gguf_blocks.py` for the rounding,
`checkpoint/convert/convert.py` for a user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gemcutter.quant import affine, gguf_blocks
from gemcutter.quant.affine import Affine
from gemcutter.quant.gguf_blocks import Blocks
from gemcutter.quant_names import RECIPE_NAMES


@dataclass(frozen=True, slots=True)
class AffineScheme:
    """MLX's affine layout with so many bits and columns to a scale."""

    bits: int
    group: int

    @property
    def name(self) -> str:
        """Return the name that weights of the scheme give themselves."""
        return f"affine{self.bits}g{self.group}"

    def fits(self, columns: int) -> bool:
        """Return whether whole groups fill a row."""
        return columns % self.group == 0

    def quantize(self, x: Tensor) -> Affine:
        """Quantize rows. Raises ValueError for values that are not finite."""
        return affine.quantize(x, self.bits, self.group)


@dataclass(frozen=True, slots=True)
class BlockScheme:
    """One of GGUF's block types."""

    name: str

    def fits(self, columns: int) -> bool:
        """Return whether whole blocks fill a row."""
        return columns % gguf_blocks.TYPES[self.name].values == 0

    def quantize(self, x: Tensor) -> Blocks:
        """Quantize rows. Raises ValueError for values that are not finite."""
        return gguf_blocks.quantize(x, self.name)


Scheme = AffineScheme | BlockScheme


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which scheme a matrix gets: that of its role, else the usual one; where none fits its columns it stays dense.

    Roles are the last words of canonical names, such as "embed.ple" or "moe.router"; an empty tuple means dense.
    """

    usual: tuple[Scheme, ...]  # tried in order until one fits
    roles: Mapping[str, tuple[Scheme, ...]]

    def scheme(self, name: str, columns: int) -> Scheme | None:
        """Choose the scheme for a matrix of so many columns, or None: it stays dense."""
        role = name.split(".", 2)[2] if name.startswith("layers.") else name
        return next((scheme for scheme in self.roles.get(role, self.usual) if scheme.fits(columns)), None)


A4 = (AffineScheme(4, 64), AffineScheme(4, 32))
A6 = (AffineScheme(6, 64), AffineScheme(6, 32))
A8 = (AffineScheme(8, 64), AffineScheme(8, 32))
Q4_0, Q8_0 = (BlockScheme("Q4_0"),), (BlockScheme("Q8_0"),)
DENSE: tuple[Scheme, ...] = ()

RECIPES = {
    # On the demo, 8 bits for all that makes per-layer embeddings and 6 for the head win back three quarters of what "mlx4"
    # loses. Most of the cost is their table, which takes disk and not memory: only the rows of a step's tokens are read.
    # A router is tiny, and a wrong choice costs a whole expert.
    "q4": Recipe(
        A4,
        {"embed.tokens": A6, "head": A6, "embed.ple": A8, "ple.in": A8, "ple.gate": A8, "ple.out": A8, "moe.router": DENSE},
    ),
    "q8": Recipe(A8, {"moe.router": DENSE}),
    "mlx4": Recipe(A4[:1], {"moe.router": A8[:1]}),
    "mlx8": Recipe(A8[:1], {"moe.router": A8[:1]}),
    # llama.cpp wants dense routers and a dense projection of the per-layer embeddings.
    "Q4_0": Recipe(
        Q4_0,
        {
            "embed.tokens": Q8_0,
            "head": Q8_0,
            "embed.ple": Q8_0,
            "ple.in": DENSE,
            "ple.gate": Q8_0,
            "ple.out": Q8_0,
            "moe.router": DENSE,
        },
    ),
    "Q8_0": Recipe(Q8_0, {"ple.in": DENSE, "moe.router": DENSE}),
}
assert tuple(RECIPES) == RECIPE_NAMES


def pack(chunks: Iterable[Tensor], shape: tuple[int, ...], scheme: Scheme, device: torch.device | str = "cpu") -> Affine | Blocks:
    """Quantize a matrix or a stack of them, `shape`, that comes as chunks of whole rows in order: [rows of the chunk, columns].

    Never more than one chunk is dense at a time. Raises ValueError for values that are not finite.
    """
    rows = torch.Size(shape[:-1]).numel()
    whole: Affine | Blocks | None = None
    start = 0
    for chunk in chunks:
        piece = scheme.quantize(chunk)
        if whole is None:
            whole = replace(piece, **{name: _room(array, rows, device) for name, array in _arrays(piece).items()})
        for name, array in _arrays(piece).items():
            getattr(whole, name)[start : start + len(array)] = array
        start += len(chunk)
    if whole is None or start != rows:
        raise ValueError(f"chunks: {rows} rows expected, found {start}")
    return replace(whole, **{name: array.unflatten(0, shape[:-1]) for name, array in _arrays(whole).items()})


def _arrays(packed: Affine | Blocks) -> dict[str, Any]:
    found = {each.name: getattr(packed, each.name) for each in fields(packed)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _room(array: Tensor, rows: int, device: torch.device | str) -> Any:
    return torch.empty((rows, *array.shape[1:]), dtype=array.dtype, device=device)


def widest_group(quant: str) -> int:
    """Return the most columns that a scheme of a recipe keeps together: those of a group, or of a block."""
    return max(
        scheme.group if isinstance(scheme, AffineScheme) else gguf_blocks.TYPES[scheme.name].values
        for scheme in RECIPES[quant].usual
    )
