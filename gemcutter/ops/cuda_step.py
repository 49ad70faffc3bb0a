"""A step as the Triton kernels see it: whose each row is, and where every key of a sequence lies.

Owns `Paged`, the device tensors that stand for a step's spans in one group, made once a step and window and kept with the step.
Their shapes and the numbers beside them are all that a launch may depend on, so a runner can fill the same tensors anew and
replay a captured graph. Refuses to know layers and storage. Read `ops/step.py` for the step, `triton_attention.py` for who reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, pairwise, repeat

import torch
from torch import Tensor

from gemcutter.errors import KernelError
from gemcutter.ops.step import Span, Step, send
from gemcutter.quant import Weight
from gemcutter.quant.gpu_packing import GpuPackedWeight


@dataclass(frozen=True, slots=True)
class Paged:
    """S sequences of one group over N rows; int32 on the rows' device but for `slots_N`, which is int64.

    Row n belongs to sequence row_sequence_N[n], whose rows are row_start_S1[s] to row_start_S1[s + 1] - 1, in ascending order
    of position. Key position p of sequence s lies in slot pages_SP[s, p // page_tokens - first_S[s]] * page_tokens +
    p % page_tokens of every layer of the group. `slots_N` says where each row's own keys go, None where nothing is written. No
    sequence has more than `max_rows` rows. A row at position -1 is padding: it sees no key.
    """

    positions_N: Tensor
    row_sequence_N: Tensor
    row_start_S1: Tensor
    pages_SP: Tensor
    first_S: Tensor
    page_tokens: int
    slots_N: Tensor | None
    max_rows: int

    @property
    def sequences(self) -> int:
        """Count the sequences."""
        return self.first_S.shape[0]


def paged_key(window: int | None) -> str:
    """Give the key of a step's memo under which the group of this window keeps its `Paged`."""
    return f"paged {window}"


def paged(step: Step, window: int | None) -> Paged:
    """Give the group's view of a step, made at the first call. Raises KernelError if its spans do not name their pages."""
    key = paged_key(window)
    found: Paged | None = step.memo.get(key)
    if found is None:
        found = step.memo[key] = _paged(step, window)
    return found


def _paged(step: Step, window: int | None) -> Paged:
    spans, counts = step.spans[window], [stop - start for start, stop in pairwise(step.row_start)]
    (page_tokens,) = {span.page_tokens for span in spans}
    if not page_tokens:
        raise KernelError("Triton kernels read keys page by page, but this step's spans name no pages")
    width = max(1, max(len(span.pages) for span in spans))
    fields = (
        chain.from_iterable(repeat(index, count) for index, count in enumerate(counts)),
        step.row_start,
        chain.from_iterable(_padded(span, width) for span in spans),
        (span.start // page_tokens for span in spans),
    )
    device = step.positions_N.device
    row_sequence, row_start, pages, first = send(fields, torch.int32, device)
    return Paged(
        positions_N=step.positions_N.to(torch.int32),
        row_sequence_N=row_sequence,
        row_start_S1=row_start,
        pages_SP=pages.view(len(spans), width),
        first_S=first,
        page_tokens=page_tokens,
        slots_N=step.slots.get(window),
        max_rows=max(counts),
    )


def _padded(span: Span, width: int) -> Iterable[int]:
    return chain(span.pages, repeat(0, width - len(span.pages)))


def is_near(table: Weight, device: torch.device) -> bool:
    """Tell whether kernels of a device can read a table: it lies there, or in pinned memory of the host."""
    held = [each for part in table.parts for each in (part.tensors() if isinstance(part, GpuPackedWeight) else (part,))]
    return all(isinstance(each, Tensor) and (each.device == device or each.is_pinned()) for each in held)
