"""Adapters at run time: a linear that adds what each row's adapter asks for.

Owns which rows of a step use which adapter and the low-rank products; the full product stays whichever kernel was bound.
Refuses to know requests and files. Rows without an adapter are never touched. Shape letters: N rows, D columns. Read
`quant/lora.py` for a delta, `model/text.py` for who tells the rows.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from gemcutter.ops.reference import Linear
from gemcutter.ops.step import Step
from gemcutter.quant import Weight
from gemcutter.quant.lora import Delta

Rows = slice | Tensor  # neighbours as a slice, others as row numbers


class AdapterRows:
    """The adapters' rows of the step that runs now. A linear sees either all rows of a step or those it keeps, and is told
    apart by their number; where the numbers are equal, so are the rows.
    """

    def __init__(self) -> None:
        self._by_count: dict[int, dict[str, Rows]] = {}

    def begin(self, step: Step, kept: Step) -> None:
        """Note whose rows a step brings, and whose it keeps; nothing is noted of a step without adapters."""
        self._by_count = {each.num_rows: _rows(each) for each in (kept, step)} if any(step.adapters) else {}

    def of(self, count: int) -> dict[str, Rows]:
        """Give the rows of every adapter among the `count` rows of a linear."""
        return self._by_count[count] if self._by_count else {}


def _rows(step: Step) -> dict[str, Rows]:
    found: dict[str, list[int]] = {}
    for index, adapter in enumerate(step.adapters):
        if adapter is not None:
            found.setdefault(adapter, []).extend(range(step.row_start[index], step.row_start[index + 1]))
    device = step.positions_N.device
    return {adapter: _compact(rows, device) for adapter, rows in found.items() if rows}


def _compact(rows: list[int], device: torch.device) -> Rows:
    """Give ascending row numbers as a slice if there is no gap."""
    is_run = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if is_run else torch.tensor(rows, device=device)


def adapt(linear: Linear, low_rank: Linear, active: AdapterRows) -> Linear:
    """Build the linear that also applies deltas; `low_rank` multiplies float32 rows with float32 factors."""

    def adapted(x_ND: Tensor, weight: Weight) -> Tensor:
        out = linear(x_ND, weight)
        found = active.of(x_ND.shape[0]) if weight.deltas else {}
        if not found:
            return out
        for adapter, deltas in groupby(weight.deltas, key=lambda delta: delta.adapter):
            if adapter in found:
                wide = x_ND[found[adapter]].float()
                for delta in deltas:
                    change = low_rank(low_rank(wide, Weight((delta.down,))), Weight((delta.up,)))
                    _add(out, found[adapter], delta, change)
        return out

    return adapted


def _add(out: Tensor, rows: Rows, delta: Delta, change: Tensor) -> None:
    """Add in float32 and round once; each row and column occurs once, so indexed assignment is exact."""
    columns = slice(delta.start, delta.start + change.shape[1])
    out[rows, columns] = (out[rows, columns].float() + change).to(out.dtype)
