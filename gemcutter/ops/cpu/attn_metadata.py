"""Attention metadata for the native kernels: `gc_step` structs, which point to a step's rows, positions and slots.

Owns the translation of a `Step` and its KV ranges to `gc_step`, made once a step for every group and rotation. Refuses to know
layers and weights. Read `gemcutter/ops/step.py` for the step, `csrc/cpu/api.h` for the struct.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcutter.errors import KernelError
from gemcutter.native import StepView
from gemcutter.ops.backend import AttnKinds
from gemcutter.ops.cpu.adapters import numbers_of_rows
from gemcutter.ops.cpu.bindings import rows_of
from gemcutter.ops.step import KVRange, Step
from gemcutter.plan import GroupId, RopeSpec


@dataclass(frozen=True, slots=True)
class CpuAttnMetadata:
    """One group's `gc_step` structs by rotation, as addresses, and everything that their pointers point to."""

    addresses: tuple[tuple[RopeSpec, int], ...]  # one or two; to hash a rotation takes longer than to find the same object
    alive: tuple[Any, ...]


def of_group(step: Step, group: GroupId, rope: RopeSpec) -> int:
    """Return the address of a step's `gc_step` for a group and a rotation.

    Raises KernelError where the step was not prepared for these kernels.
    """
    found = step.attn_metadata.get(group)
    if not isinstance(found, CpuAttnMetadata):
        raise KernelError(
            f"the step holds no native attention metadata for the group {group!r}: it was prepared for other kernels"
        )
    for each, address in found.addresses:
        if each is rope or each == rope:
            return address
    raise KernelError(f"the step holds no native attention metadata for the rotation {rope} in the group {group!r}")


def build(step: Step, kinds: AttnKinds) -> Mapping[GroupId, CpuAttnMetadata]:
    """Build the structs of a step for every pair of group and rotation among a model's layers."""
    return {group: _build(step, group, [rope for each, rope in kinds if each == group]) for group in dict(kinds)}


def _build(step: Step, group: GroupId, ropes: list[RopeSpec]) -> CpuAttnMetadata:
    ranges = step.kv_ranges.get(group, ())
    query_start = _array(step.query_start)
    kv_start = _array([each.start for each in ranges])
    kv_length = _array([_held(each) for each in ranges])
    first_slot = _array([each.where.start if isinstance(each.where, slice) else -1 for each in ranges])
    listed = [_listed(each) for each in ranges]
    slots_of = (c_void_p * len(ranges))(*(None if slots is None else slots.data_ptr() for slots in listed))
    positions, slots = _longs(step.positions_N), step.slot_mapping.get(group)
    slots = None if slots is None else _longs(slots)
    last = step.last_visible.get(group)
    last = None if last is None else _longs(last)
    adapters = numbers_of_rows(step.adapter_rows, step.num_rows)
    alive: list[Any] = [query_start, kv_start, kv_length, first_slot, slots_of, listed, positions, slots, last, adapters]
    addresses = list[tuple[RopeSpec, int]]()
    for rope in ropes:
        cos, sin = map(rows_of, step.rope[rope]) if rope in step.rope else (None, None)
        struct = StepView(
            rows=step.num_rows,
            sequences=len(ranges),  # none where a step only writes
            query_start=ctypes.addressof(query_start),
            positions=positions.data_ptr(),
            kv_start=ctypes.addressof(kv_start),
            kv_first_slot=ctypes.addressof(first_slot),
            kv_slots=ctypes.addressof(slots_of),
            kv_length=ctypes.addressof(kv_length),
            slot_mapping=None if slots is None else slots.data_ptr(),
            cos=None if cos is None else cos.data_ptr(),
            sin=None if sin is None else sin.data_ptr(),
            last_visible=None if last is None else last.data_ptr(),
            adapters=None if adapters is None else adapters.data_ptr(),
        )
        alive += [struct, cos, sin]
        addresses.append((rope, ctypes.addressof(struct)))
    return CpuAttnMetadata(tuple(addresses), tuple(alive))


def _array(values: Any) -> ctypes.Array[c_int64]:
    return (c_int64 * len(values))(*values)


def _listed(kv_range: KVRange) -> Tensor | None:
    return None if isinstance(kv_range.where, slice) else _longs(kv_range.where)


def _held(kv_range: KVRange) -> int:
    where = kv_range.where
    return where.stop - where.start if isinstance(where, slice) else where.numel()


def _longs(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.long and tensor.is_contiguous() else tensor.to(torch.long).contiguous()
