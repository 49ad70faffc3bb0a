"""Panels of 16 rows: how packed matrices lie in memory for the native kernels, and the way there and back in plain PyTorch.

Owns `PackedLayout`, `UnpackedWeight` (a matrix as codes by row and column, scales by row and group) and the two transforms
between a grid and panels, which are the definition that csrc/cpu/repack.cpp and the kernels are tested against. The bytes are
those of csrc/cpu/layout.h. Refuses to know schemes: read `cpu_packing.py` for what becomes of those, `cpu_packed.py` for the
weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gemcutter.quant.bits import float8

U4, U6, S8, T4, E4M3 = 0, 1, 2, 6, 7  # enum gc_codes; E4M3 are 8-bit floats
F16, BF16, F32, SUPER32, SUPER16 = range(5)  # enum gc_scales

PANEL, BLOCK, SUPER = 16, 32, 256  # rows of a panel, columns of a code block and of a super-block
ALIGN_BYTES = 64  # of panels

SCALE_DTYPES = {F16: torch.float16, BF16: torch.bfloat16, F32: torch.float32}
SCALES_OF = {dtype: scales for scales, dtype in SCALE_DTYPES.items()}
_CODE_BYTES = {U4: 256, T4: 256, U6: 384, S8: 512, E4M3: 512}  # of a code block

Head = tuple[torch.dtype, int]  # numbers of this dtype, so many for each row


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """How a matrix is coded: value = scale * (code + offset) + bias. Codes are unsigned but for S8; fields as in `gc_matrix`.

    Codes of T4 count as what `levels` has for them, 16 signed bytes; those of E4M3 are 8-bit floats, which have neither offset
    nor bias. The float16 scales of super-blocks count in units of 2^exponent: where a format multiplies them with a fraction, the
    product would not always be a float16.
    """

    codes: int
    scales: int
    group: int
    has_bias: bool = False
    offset: int = 0
    levels: tuple[int, ...] = ()
    exponent: int = 0

    @property
    def run(self) -> int:
        """Count the columns of a unit, which begins with numbers of its own: a group, two short ones, or a super-block."""
        return SUPER if self.scales in (SUPER32, SUPER16) else max(self.group, BLOCK)

    @property
    def heads(self) -> tuple[Head, ...]:
        """List what stands at the beginning of a unit."""
        if self.scales == SUPER32:
            return ((torch.float16, 1), (torch.float16, 1))
        if self.scales == SUPER16:
            return ((torch.float16, 1),)
        each = (SCALE_DTYPES[self.scales], self.run // self.group)
        return (each, each) if self.has_bias else (each,)

    @property
    def block_heads(self) -> tuple[Head, ...]:
        """List what stands before each code block of a unit."""
        if self.scales == SUPER32:
            return ((torch.uint8, 1), (torch.uint8, 1))
        return ((torch.int8, 2),) if self.scales == SUPER16 else ()

    @property
    def unit_bytes(self) -> int:
        """Count the bytes of a unit of 16 rows."""
        return _head_bytes(self.heads) + self.run // BLOCK * (_head_bytes(self.block_heads) + _CODE_BYTES[self.codes])

    def panel_bytes(self, columns: int) -> int:
        """Count the bytes of a panel of so many columns."""
        return columns // self.run * self.unit_bytes

    def stride(self, columns: int) -> int:
        """Count the bytes from one panel to the next."""
        return -(-self.panel_bytes(columns) // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class UnpackedWeight:
    """Rows of a matrix, taken apart: codes uint8 [rows, columns], and an array [rows, numbers] for each of the layout's heads.

    Codes of S8 are the bytes of int8. Arrays come in the order of `heads`, then `block_heads`.
    """

    layout: PackedLayout
    codes: Tensor
    arrays: tuple[Tensor, ...]

    def values(self) -> Tensor:
        """Compute scale * (code + offset) + bias in float32, each operation rounded once: [rows, columns]."""
        scale, bias = self.scales()
        wide = _split(self._numbers(), scale.shape[-1]).mul_(scale.unsqueeze(-1))
        return (wide if bias is None else wide.add_(bias.unsqueeze(-1))).flatten(-2)

    def _numbers(self) -> Tensor:
        if self.layout.codes == E4M3:
            return float8(self.codes, torch.float8_e4m3fn)
        codes = self.codes if self.layout.codes in (U4, U6) else self.signed()
        return codes.float().add_(self.layout.offset)

    def signed(self) -> Tensor:
        """Return what the codes of S8 and T4 count as, int8 [rows, columns]."""
        if self.layout.codes == S8:
            return self.codes.view(torch.int8)
        return torch.tensor(self.layout.levels, dtype=torch.int8, device=self.codes.device)[self.codes.int()]

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Compute the scale of every group in float32, and the bias where there are any: [rows, groups]."""
        arrays = [array.float() for array in self.arrays]
        unit = 2.0**self.layout.exponent
        if self.layout.scales == SUPER32:
            d, minimum, sc, m = arrays
            return _times(d * unit, sc), -_times(minimum * unit, m)
        if self.layout.scales == SUPER16:
            d, sc = arrays
            return _times(d * unit, sc), None
        return arrays[0], arrays[1] if self.layout.has_bias else None


def to_panels(grid: UnpackedWeight) -> Tensor:
    """Lay rows out as panels, uint8 [panels, stride]; rows that the last panel lacks are zeros."""
    layout, (rows, columns) = grid.layout, grid.codes.shape
    missing = -rows % PANEL
    arrays = [array.contiguous().view(torch.uint8).view(*array.shape, -1) for array in grid.arrays]  # bytes of each number
    codes, *arrays = (pad(array, (0, 0) * (array.ndim - 1) + (0, missing)) for array in (grid.codes, *arrays))
    units, blocks = columns // layout.run, layout.run // BLOCK
    heads = [_head_in(array, units) for array in arrays[: len(layout.heads)]]
    block_heads = [_head_in(array, units * blocks) for array in arrays[len(layout.heads) :]]
    coded = _codes_in(codes, layout.codes)
    inner = torch.cat([*block_heads, coded], dim=-1).view(len(coded), units, -1)
    panels = torch.cat([*heads, inner], dim=-1).flatten(1)
    return pad(panels, (0, layout.stride(columns) - panels.shape[1]))


def from_panels(panels: Tensor, layout: PackedLayout, columns: int) -> UnpackedWeight:
    """Take panels, uint8 [panels, bytes], apart into rows, those beyond the last included."""
    units, blocks = columns // layout.run, layout.run // BLOCK
    rest = panels[:, : layout.panel_bytes(columns)].reshape(len(panels), units, layout.unit_bytes)
    arrays, rest = _heads_out(rest, layout.heads)
    rest = rest.reshape(len(panels), units * blocks, rest.shape[-1] // blocks)
    block_arrays, rest = _heads_out(rest, layout.block_heads)
    return UnpackedWeight(layout, _codes_out(rest, layout.codes), (*arrays, *block_arrays))


def _head_bytes(heads: tuple[Head, ...]) -> int:
    return sum(PANEL * count * dtype.itemsize for dtype, count in heads)


def _head_in(array: Tensor, units: int) -> Tensor:
    """Interleave numbers [rows, numbers, bytes] of 16 rows each: [panels, units, bytes]."""
    rows, _, size = array.shape
    return array.view(rows // PANEL, PANEL, units, -1, size).permute(0, 2, 3, 1, 4).flatten(2)


def _heads_out(units: Tensor, heads: tuple[Head, ...]) -> tuple[list[Tensor], Tensor]:
    """Undo `_head_in`: give the numbers [rows, numbers] of each head of units [panels, units, bytes], and what follows them."""
    arrays = []
    for dtype, count in heads:
        size = _head_bytes(((dtype, count),))
        numbers = _split(units[..., :size].contiguous().view(dtype), count)
        arrays.append(numbers.permute(0, 3, 1, 2).flatten(2).flatten(0, 1))
        units = units[..., size:]
    return arrays, units


def _codes_in(codes: Tensor, kind: int) -> Tensor:
    """Interleave codes [rows, columns] into code blocks: [panels, blocks, bytes]."""
    rows, columns = codes.shape
    if kind == E4M3:
        return codes.view(rows // PANEL, PANEL, columns // BLOCK, BLOCK).permute(0, 2, 3, 1).flatten(2)
    quads = codes.view(rows // PANEL, PANEL, columns // BLOCK, 8, 4).permute(0, 2, 3, 1, 4).flatten(3)  # 8 vectors of 64
    if kind == S8:
        return quads.flatten(2)
    low = quads[:, :, :4] & 15 | quads[:, :, 4:] << 4
    if kind != U6:
        return low.flatten(2)
    upper = (quads >> 4).view(*quads.shape[:2], 2, 4, 64)
    high = upper[:, :, :, 0] | upper[:, :, :, 1] << 2 | upper[:, :, :, 2] << 4 | upper[:, :, :, 3] << 6
    return torch.cat((low, high), dim=2).flatten(2)


def _codes_out(blocks: Tensor, kind: int) -> Tensor:
    """Undo `_codes_in`."""
    if kind == E4M3:
        return _split(blocks, BLOCK).permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
    vectors = _split(blocks, blocks.shape[-1] // 64)
    if kind == S8:
        quads = vectors
    else:
        low = vectors[:, :, :4]
        quads = torch.cat((low & 15, low >> 4), dim=2)
    if kind == U6:
        quads |= torch.stack([vectors[:, :, 4:] >> 2 * k & 3 for k in range(4)], dim=3).flatten(2, 3) << 4
    panels, count = blocks.shape[:2]
    return quads.view(panels, count, 8, PANEL, 4).permute(0, 3, 1, 2, 4).reshape(panels * PANEL, count * BLOCK)


def _times(scale: Tensor, factors: Tensor) -> Tensor:
    """Multiply a super-block's scale [rows, supers] with the small scales of its runs [rows, runs]."""
    return _split(factors, scale.shape[-1]).mul(scale.unsqueeze(-1)).flatten(-2)


def _split(x: Tensor, count: int) -> Tensor:
    """View the last axis as so many runs."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)
