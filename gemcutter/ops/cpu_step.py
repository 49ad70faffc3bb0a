"""A step as the native kernels see it: pointers to its rows, positions and slots.

Owns the translation of `Step` and its spans to `gc_step`, made once for every pair of window and rotation and kept with the step.
Refuses to know layers and weights. Read `ops/step.py` for the step, `csrc/cpu/api.h` for the struct.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcutter.native import StepView
from gemcutter.ops.step import Span, Step
from gemcutter.plan import RopeSpec


@dataclass(frozen=True, slots=True)
class View:
    """A `gc_step` at `address`, and everything that its pointers point to."""

    address: int
    alive: tuple[Any, ...]


class Viewer:
    """Gives the view of any step for layers of one window and one rotation."""

    def __init__(self, window: int | None, rope: RopeSpec) -> None:
        self.window, self.rope = window, rope
        self.key = f"view {window} {rope}"  # a string knows its hash, which is asked for in every call

    def __call__(self, step: Step) -> View:
        """Give the view, made once; keep it until the call of the library returns."""
        found: View | None = step.memo.get(self.key)
        if found is None:
            found = step.memo[self.key] = _view(step, self.window, self.rope)
        return found


def _view(step: Step, window: int | None, rope: RopeSpec) -> View:
    spans = step.spans.get(window, ())
    query_start = _array(step.row_start)
    kv_start = _array([span.start for span in spans])
    kv_first_slot = _array([span.where.start if isinstance(span.where, slice) else -1 for span in spans])
    listed = [_listed(span) for span in spans]
    kv_slots = (c_void_p * len(spans))(*(None if slots is None else slots.data_ptr() for slots in listed))
    positions, slots = _longs(step.positions_N), step.slots.get(window)
    slot_mapping = None if slots is None else _longs(slots)
    cos, sin = (table.float().contiguous() for table in step.rope[rope]) if rope in step.rope else (None, None)
    struct = StepView(
        rows=step.num_rows,
        sequences=len(step.row_start) - 1,
        query_start=ctypes.addressof(query_start),
        positions=positions.data_ptr(),
        kv_start=ctypes.addressof(kv_start),
        kv_first_slot=ctypes.addressof(kv_first_slot),
        kv_slots=ctypes.addressof(kv_slots),
        slot_mapping=None if slot_mapping is None else slot_mapping.data_ptr(),
        cos=None if cos is None else cos.data_ptr(),
        sin=None if sin is None else sin.data_ptr(),
    )
    alive = (struct, query_start, kv_start, kv_first_slot, kv_slots, listed, positions, slot_mapping, cos, sin)
    return View(ctypes.addressof(struct), alive)


def _array(values: Any) -> ctypes.Array[c_int64]:
    return (c_int64 * len(values))(*values)


def _listed(span: Span) -> Tensor | None:
    return None if isinstance(span.where, slice) else _longs(span.where)


def _longs(tensor: Tensor) -> Tensor:
    return tensor.to(torch.long).contiguous()
