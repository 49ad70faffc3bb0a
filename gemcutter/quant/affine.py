"""MLX's affine scheme: unsigned integers of 1 to 8 bits, with a scale and a bias for each group of columns.

Owns `Affine`, how to recognise its parameters from shapes, and a quantizer that equals MLX's bit for bit. Refuses to know files
and names. Read `packed.py` for the protocol, `bits.py` for the bit stream, `microscaling.py` for MLX's other modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.quant.bits import in_runs, pack, unpack
from gemcutter.quant.packed import FLOATS, cut_columns, cut_expert, cut_rows, gather_rows, mismatches, refuse, stored_bytes

BITS = (1, 2, 3, 4, 5, 6, 8)
_WORDS = (torch.uint32, torch.int32)
_SMALLEST_SCALE = 1e-7  # what MLX gives a group of equal values


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """w = scale * q + bias, with q unsigned; the sign of a scale is free.

    `codes` are uint8 [..., rows, columns * bits / 8], the bytes of MLX's uint32 words; `scales` and `biases` are [..., rows,
    columns / group].
    """

    codes: Tensor
    scales: Tensor
    biases: Tensor
    bits: int
    group: int

    @property
    def scheme(self) -> str:
        """Name the layout: affine4g64 has 4 bits and groups of 64 columns."""
        return f"affine{self.bits}g{self.group}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the logical shape."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group)

    @property
    def nbytes(self) -> int:
        """Count the stored bytes."""
        return stored_bytes(self)

    def rows(self, start: int, stop: int) -> Affine:
        """Give rows start to stop - 1 of every expert without copying."""
        return cut_rows(self, start, stop)

    def columns(self, start: int, stop: int) -> Affine:
        """Give columns start to stop - 1, whole groups in whole bytes, without copying."""
        return cut_columns(self, start, stop, math.lcm(self.group, 8 // math.gcd(8, self.bits)))

    def expert(self, index: int) -> Affine:
        """Give one matrix of a stack without copying."""
        return cut_expert(self, index)

    def gather(self, ids_N: Tensor) -> Affine:
        """Copy the rows that ids name."""
        return gather_rows(self, ids_N)

    def dequantize(self) -> Tensor:
        """Compute scale * q + bias in float32, each operation rounded once."""
        q = in_runs(unpack(self.codes, self.bits), self.group)
        return q.mul_(self.scales.float().unsqueeze(-1)).add_(self.biases.float().unsqueeze(-1)).flatten(-2)


def infer(words_shape: tuple[int, ...], scales_shape: tuple[int, ...], columns: int) -> tuple[int, int]:
    """Give (bits, group) of a matrix with so many columns. Raises ValueError where the shapes fit no affine layout."""
    if len(words_shape) not in (2, 3) or words_shape[:-1] != scales_shape[:-1]:
        raise ValueError(
            "words and scales: [rows, ...] or [experts, rows, ...], alike but for the last axis, expected, "
            f"found {list(words_shape)} and {list(scales_shape)}"
        )
    words, groups = words_shape[-1], scales_shape[-1]
    bits, spare_bits = divmod(words * 32, columns)
    problems = []
    if spare_bits or bits not in BITS:
        problems.append(f"words: {words} of 32 bits do not hold {columns} columns of {', '.join(map(str, BITS[:-1]))} or 8 bits")
    if not groups or columns % groups:
        problems.append(f"scales: {groups} groups do not divide {columns} columns")
    refuse(problems)
    return bits, columns // groups


def from_arrays(words: Tensor, scales: Tensor, biases: Tensor, columns: int) -> Affine:
    """Take the three arrays of an MLX module as they are stored; bits and group follow from the shapes.

    Raises ValueError, naming every array that does not fit.
    """
    bits, group = infer(tuple(words.shape), tuple(scales.shape), columns)
    problems = mismatches("words", words, words.shape, _WORDS)
    problems += mismatches("scales", scales, scales.shape, FLOATS)
    problems += mismatches("biases", biases, scales.shape, FLOATS)
    refuse(problems)
    return Affine(words.view(torch.uint8), scales, biases, bits, group)


def quantize(x: Tensor, bits: int, group: int) -> Affine:
    """Quantize values [..., rows, columns] as MLX does; scales and biases take the dtype of x.

    The edge of larger magnitude of each group is met exactly (up to that dtype) and takes code 0, so scales may be negative;
    another code is chosen for it if that makes zero exact. Rows do not depend on each other, so a large table may be quantized
    in pieces.

    Raises ValueError for parameters that MLX has no layout for, and for values that are not finite.
    Source: mlx.core.quantize on CPU.
    """
    problems = [] if bits in BITS else [f"bits: one of {', '.join(map(str, BITS))} expected, found {bits}"]
    if group not in (32, 64, 128) or x.shape[-1] % group:
        problems.append(f"group: 32, 64 or 128 that divides {x.shape[-1]} columns expected, found {group}")
    if x.dtype not in FLOATS or not x.isfinite().all():
        problems.append("values: finite float32, float16 or bfloat16 expected")
    refuse(problems)
    values, top = in_runs(x.float().contiguous(), group), (1 << bits) - 1
    scale, bias = _fit(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), top)
    codes = ((values - bias) / scale).round_().clamp_(0, top).to(torch.uint8).flatten(-2)
    return Affine(pack(codes, bits), scale.squeeze(-1).to(x.dtype), bias.squeeze(-1).to(x.dtype), bits, group)


def _fit(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Choose scale and bias for groups that reach from low to high, with codes from 0 to top."""
    scale = ((high - low) / top).clamp_(min=_SMALLEST_SCALE)
    if top == 1:
        return scale, low
    is_low_larger = low.abs() > high.abs()
    edge, scale = torch.where(is_low_larger, low, high), torch.where(is_low_larger, scale, -scale)
    zero_code = (edge / scale).round_()
    is_exact = zero_code != 0
    return torch.where(is_exact, edge / zero_code, scale), torch.where(is_exact, edge, 0.0)
