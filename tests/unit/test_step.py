"""What a step brings to the device: lists of integers in one copy, and the rows that it keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemcutter.ops.step import ALIGNMENT, Step, prepare, send
from gemcutter.plan import GLOBAL_GROUP

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lists_arrive_apart_and_aligned(dtype: torch.dtype) -> None:
    """In one piece of memory, each at a multiple of 16 bytes from its start."""
    given = [[5], [], [1, 2, 3], range(7, 12)]
    found = send(given, dtype, CPU)
    assert [each.tolist() for each in found] == [list(each) for each in given]
    assert {each.dtype for each in found} == {dtype}
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1
    assert not any(each.storage_offset() * dtype.itemsize % ALIGNMENT for each in found)


def test_no_numbers_at_all() -> None:
    assert [each.tolist() for each in send([[], []], torch.long, CPU)] == [[], []]


def test_kept_rows_are_narrowed_once() -> None:
    ids = torch.arange(10, 16)
    bare = Step(ids, ids, ids, (0, 4, 6), {}, {GLOBAL_GROUP: ids}, (1, 3, 5), {}, last_visible={GLOBAL_GROUP: ids})
    step = prepare(bare)
    kept = step.kept
    assert kept is step.remaining is not None
    assert kept.ids_N.tolist() == [11, 13, 15]
    assert {group: last_N.tolist() for group, last_N in kept.last_visible.items()} == {GLOBAL_GROUP: [11, 13, 15]}
    assert (kept.query_start, kept.slot_mapping, kept.logit_rows, kept.kept) == ((0, 2, 3), {}, None, None)
    assert step.logit_rows_M is not None
    assert step.logit_rows_M.tolist() == [1, 3, 5]
    assert not step.keeps_none
    nothing = prepare(replace(bare, logit_rows=()))
    assert nothing.keeps_none
    assert nothing.remaining.num_rows == 0
    everything = prepare(replace(bare, logit_rows=None))
    assert everything.remaining is everything
    assert (everything.kept, everything.logit_rows_M, everything.keeps_none) == (None, None, False)
