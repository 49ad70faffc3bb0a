"""Adapters on the native kernels: factors as `gc_delta` structs, and the numbers by which rows ask for adapters.

Owns how factors are packed: up factors in panels of 16 rows, and either factor in 16 bits where bfloat16 holds it exactly, since
a token reads all of them. Refuses arithmetic. Read `csrc/cpu/adapters.h` for the other side, `ops/lora.py` for the definition.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.native import DeltaView, Matrix
from gemcutter.ops.cpu.bindings import CODES, matrix_of
from gemcutter.ops.step import AdapterRows
from gemcutter.quant.cpu_layout import PANEL
from gemcutter.quant.lora import Delta

NO_ADAPTER = -1  # the number of rows that ask for none

_NUMBERS: dict[str, int] = {}  # of every name that was ever used, so that no other adapter gets a number that a step holds
_NEXT = count()


def number_of(adapter: str) -> int:
    """Return the number that stands for an adapter's name in this process; any thread may ask."""
    found = _NUMBERS.get(adapter)
    return _NUMBERS.setdefault(adapter, next(_NEXT)) if found is None else found


def numbers_of_rows(adapters: AdapterRows, rows: int) -> Tensor | None:
    """Return the number of the adapter that each of so many rows asks for, int32 [N]; None where no row asks for any."""
    if not adapters:
        return None
    found = torch.full((rows,), NO_ADAPTER, dtype=torch.int32)
    for adapter, some in adapters.items():
        found[some] = number_of(adapter)
    return found


def address_of(wanted: Tensor | None) -> int | None:
    """Return where such numbers lie."""
    return None if wanted is None else wanted.data_ptr()


def carry_deltas(found: Matrix, deltas: Sequence[Delta]) -> object:
    """Let a matrix carry what adapters add to it; returns what it points to, which is to be kept as long as the matrix."""
    ordered = sorted(deltas, key=lambda delta: number_of(delta.adapter))
    packed = [(_narrowed(delta.down), _narrowed(_panels(delta))) for delta in ordered]
    views = (DeltaView * len(ordered))()
    for view, delta, (down, up) in zip(views, ordered, packed, strict=True):
        view.down, view.up, view.up_codes = matrix_of(down), up.data_ptr(), CODES[up.dtype]
        first = delta.start // PANEL * PANEL
        view.start, view.rows = first, delta.start - first + len(delta.up)
        view.adapter = number_of(delta.adapter)
    found.deltas, found.num_deltas = ctypes.addressof(views), len(ordered)
    return views, packed


def _panels(delta: Delta) -> Tensor:
    """Return an up factor as [panels, R, 16], the columns of panels of 16 rows; zero where these have rows beyond its own."""
    before = delta.start % PANEL
    rows, rank = delta.up.shape
    padded = F.pad(delta.up.float(), (0, 0, before, -(before + rows) % PANEL))
    return padded.view(-1, PANEL, rank).transpose(1, 2).contiguous()


def _narrowed(factor: Tensor) -> Tensor:
    """Return a factor as bfloat16 where that changes no value, else as it is."""
    narrow = factor.to(torch.bfloat16)
    return narrow if torch.equal(narrow.float(), factor) else factor.contiguous()
