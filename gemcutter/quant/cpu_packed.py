"""Weights repacked for the native kernels: any lossless scheme as panels of 16 rows.

Owns `CpuPackedWeight`, a packed weight like all others, so that whoever has no native kernel can still cut and dequantize it.
Refuses to know where the values came from. Read `cpu_layout.py` for the bytes, `cpu_packing.py` for which schemes can be
repacked, `native.py` for what a kernel sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemcutter.native import Matrix
from gemcutter.quant import Part
from gemcutter.quant.cpu_layout import PANEL, PackedLayout, UnpackedWeight, from_panels, to_panels
from gemcutter.quant.packed import check_cut

PREFIX = "cpu-packed-"  # of the schemes of packed weights, before the name of the scheme that was repacked
APART = "-apart"  # behind it: no product takes these and other parts of their weight together


@dataclass(frozen=True, slots=True, eq=False)
class CpuPackedWeight:
    """A matrix as panels, uint8 [panels, bytes], or a stack of them, [experts, panels, bytes].

    Panels may lie further apart than they are long, as those of a cut by columns do; rows beyond `num_rows` mean nothing. Where
    groups were scattered, panels hold the columns sorted by group, and `order` int32 [columns] says which column each one is.
    """

    data: Tensor
    num_rows: int
    num_columns: int
    layout: PackedLayout
    origin: str  # the scheme that was repacked
    order: Tensor | None = None

    @property
    def scheme(self) -> str:
        """Name the scheme that was repacked: cpu-packed-Q4_0."""
        return PREFIX + self.origin

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape."""
        return (*self.data.shape[:-2], self.num_rows, self.num_columns)

    @property
    def nbytes(self) -> int:
        """Count the stored bytes."""
        return self.data.nbytes

    def rows(self, start: int, stop: int) -> CpuPackedWeight:
        """Return rows start to stop - 1 of every expert, without copying where `start` begins a panel."""
        start, stop = min(start, self.num_rows), min(stop, self.num_rows)
        if start % PANEL:
            return self.gather(torch.arange(start, stop))
        panels = self.data[..., start // PANEL : -(-stop // PANEL), :]
        return replace(self, data=panels, num_rows=stop - start)

    def columns(self, start: int, stop: int) -> CpuPackedWeight:
        """Return columns start to stop - 1, whole groups or super-blocks, without copying."""
        if self.order is not None:
            raise ValueError(f"columns {start} to {stop}: the groups of {self.scheme} are scattered")
        run = self.layout.run
        check_cut(start, stop, self.num_columns, run)
        size = self.layout.unit_bytes
        return replace(self, data=self.data[..., start // run * size : stop // run * size], num_columns=stop - start)

    def expert(self, index: int) -> CpuPackedWeight:
        """Return one matrix of a stack without copying. Raises ValueError where there is no stack."""
        if self.data.ndim != 3:
            raise ValueError(f"expert {index}: found a single matrix {list(self.shape)}")
        return replace(self, data=self.data[index])

    def gather(self, ids_N: Tensor) -> CpuPackedWeight:
        """Copy the rows that ids name, into panels of their own."""
        if self.data.ndim == 3:
            each = [self.expert(index).gather(ids_N) for index in range(len(self.data))]
            return replace(each[0], data=torch.stack([one.data for one in each]))
        panels, places = torch.unique(ids_N // PANEL, return_inverse=True)
        grid = from_panels(self.data.index_select(0, panels), self.layout, self.num_columns)
        chosen = places * PANEL + ids_N % PANEL
        picked = UnpackedWeight(self.layout, grid.codes[chosen], tuple(array[chosen] for array in grid.arrays))
        return replace(self, data=to_panels(picked), num_rows=len(ids_N))

    def dequantize(self) -> Tensor:
        """Compute scale * (code + offset) + bias in float32, each operation rounded once."""
        flat = from_panels(self.data.flatten(0, -2), self.layout, self.num_columns).values()
        flat = flat.view(*self.data.shape[:-2], -1, self.num_columns)[..., : self.num_rows, :].contiguous()
        return flat if self.order is None else flat.index_select(-1, self.order.argsort())

    def matrix(self) -> Matrix:
        """Describe a single matrix for the native kernels; valid as long as this weight lives.

        Raises ValueError for a stack: ask for `expert(index).matrix()`.
        """
        if self.data.ndim != 2:
            raise ValueError(f"matrix: a single one expected, found a stack {list(self.shape)}")
        form = self.layout
        return Matrix(
            data=self.data.data_ptr(),
            rows=self.num_rows,
            columns=self.num_columns,
            stride=self.data.stride(0),
            codes=form.codes,
            scales=form.scales,
            group=form.group,
            has_bias=form.has_bias,
            offset=form.offset,
            exponent=form.exponent,
            levels=form.levels,
            order=None if self.order is None else self.order.data_ptr(),
        )


def one_order(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts of a weight, told APART by their scheme where they do not take rows in the same order of columns."""
    orders = [None if not isinstance(part, CpuPackedWeight) or part.order is None else part.order.tolist() for part in parts]
    if all(order == orders[0] for order in orders):
        return tuple(parts)
    return tuple(
        replace(part, origin=part.origin + APART) if isinstance(part, CpuPackedWeight) and part.order is not None else part
        for part in parts
    )
