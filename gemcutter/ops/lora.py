"""Adapters at run time: the low-rank products that are added to the rows whose sequence asked for an adapter.

Owns these products; the full product stays whichever kernel was selected. Refuses to know requests and files. Rows without an
adapter are never touched. Shape letters: N rows, D columns, F outputs. Read `quant/lora.py` for a delta, `step.py` for which rows
get which adapter.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor

from gemcutter.ops.step import AdapterRows, Rows
from gemcutter.quant import Weight
from gemcutter.quant.lora import Delta

if TYPE_CHECKING:
    from gemcutter.ops.types import Linear


def add_low_rank(out_NF: Tensor, x_ND: Tensor, weight: Weight, adapters: AdapterRows, low_rank: Linear) -> None:
    """Add each adapter's change to its rows of a product, in place; `low_rank` multiplies float32 rows with float32 factors."""
    for adapter, deltas in groupby(weight.deltas, key=lambda delta: delta.adapter):
        if adapter in adapters:
            rows = adapters[adapter]
            wide = x_ND[rows].float()
            for delta in deltas:
                change = low_rank(low_rank(wide, Weight((delta.down,))), Weight((delta.up,)))
                _add(out_NF, rows, delta, change)


def _add(out: Tensor, rows: Rows, delta: Delta, change: Tensor) -> None:
    """Add in float32 and round once; each row and column occurs once, so indexed assignment is exact."""
    columns = slice(delta.start, delta.start + change.shape[1])
    out[rows, columns] = (out[rows, columns].float() + change).to(out.dtype)
