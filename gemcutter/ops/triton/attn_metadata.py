"""Attention metadata for the Triton kernels: the map from rows to sequences, and block tables on the device.

Owns `TritonAttnMetadata`, the device tensors that stand for a step's KV ranges in one group. Their shapes and the numbers beside
them are all that a launch may depend on, so a runner can fill the same tensors anew and replay a captured graph. Refuses to know
layers and storage. Read `gemcutter/ops/step.py` for the step, `attention.py` for who reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise, repeat

import torch
from torch import Tensor

from gemcutter.errors import KernelError
from gemcutter.ops.step import KVRange, Step, send
from gemcutter.plan import GroupId
from gemcutter.quant import Weight
from gemcutter.quant.gpu_packing import GpuPackedWeight


@dataclass(frozen=True, slots=True)
class TritonAttnMetadata:
    """S sequences of one group over N rows; int32 on the rows' device but for `slot_mapping_N`, which is int64.

    Row n belongs to sequence row_sequence_N[n], whose rows are query_start_S1[s] to query_start_S1[s + 1] - 1, in ascending order
    of position. Key position p of sequence s is in slot pages_SP[s, p // page_tokens - first_S[s]] * page_tokens +
    p % page_tokens of every layer of the group. `slot_mapping_N` says where each row's own keys go, None where nothing is
    written. No sequence has more than `max_rows` rows. A row at position -1 is padding: it sees no key. `last_visible_N` is the
    last position that each row sees where that is later than its own; None: its own for all rows.
    """

    positions_N: Tensor
    row_sequence_N: Tensor
    query_start_S1: Tensor
    pages_SP: Tensor
    first_S: Tensor
    page_tokens: int
    slot_mapping_N: Tensor | None
    max_rows: int
    last_visible_N: Tensor | None = None

    @property
    def sequences(self) -> int:
        """Count the sequences."""
        return self.first_S.shape[0]


def of_group(step: Step, group: GroupId) -> TritonAttnMetadata:
    """Return a step's metadata for a group. Raises KernelError where the step was not prepared for these kernels."""
    found = step.attn_metadata.get(group)
    if not isinstance(found, TritonAttnMetadata):
        raise KernelError(
            f"the step holds no Triton attention metadata for the group {group!r}: it was prepared for other kernels"
        )
    return found


def build(step: Step) -> Mapping[GroupId, TritonAttnMetadata]:
    """Build the metadata of a step's groups. Raises KernelError if its KV ranges do not name their pages."""
    return {group: _build(step, group) for group in step.kv_ranges}


def _build(step: Step, group: GroupId) -> TritonAttnMetadata:
    ranges, counts = step.kv_ranges[group], [stop - start for start, stop in pairwise(step.query_start)]
    (page_tokens,) = {each.page_tokens for each in ranges}
    if not page_tokens:
        raise KernelError("Triton kernels read keys page by page, but this step's KV ranges name no pages")
    width = max(1, max(len(each.pages) for each in ranges))
    fields = (
        chain.from_iterable(repeat(index, count) for index, count in enumerate(counts)),
        step.query_start,
        chain.from_iterable(_padded(each, width) for each in ranges),
        (each.start // page_tokens for each in ranges),
    )
    device, last_N = step.positions_N.device, step.last_visible.get(group)
    row_sequence, query_start, pages, first = send(fields, torch.int32, device)
    return TritonAttnMetadata(
        positions_N=step.positions_N.to(torch.int32),
        row_sequence_N=row_sequence,
        query_start_S1=query_start,
        pages_SP=pages.view(len(ranges), width),
        first_S=first,
        page_tokens=page_tokens,
        slot_mapping_N=step.slot_mapping.get(group),
        max_rows=max(counts),
        last_visible_N=None if last_N is None else last_N.to(torch.int32),
    )


def _padded(kv_range: KVRange, width: int) -> Iterable[int]:
    return chain(kv_range.pages, repeat(0, width - len(kv_range.pages)))


def is_near(table: Weight, device: torch.device) -> bool:
    """Return whether kernels of a device can read a table: it is there, or in pinned memory of the host."""
    held = [each for part in table.parts for each in (part.tensors() if isinstance(part, GpuPackedWeight) else (part,))]
    return all(isinstance(each, Tensor) and (each.device == device or each.is_pinned()) for each in held)
