"""A step's pages as tensors: made once, from real block tables, and refused where pages are unknown. Runs without Triton too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.errors import KernelError
from gemcutter.ops.step import KVRange, Step, prepare
from gemcutter.ops.triton.attn_metadata import TritonAttnMetadata, build, of_group
from gemcutter.plan import GLOBAL_GROUP, Attn, LayerPlan, ModelPlan, Proj, RopeSpec, group_of

WINDOW, PAGE = 5, 4


def plan_of(window: int | None) -> ModelPlan:
    layer = LayerPlan(0, Attn.SLIDING, Proj.QKV, 0, "self", 1, 1, 2, window, RopeSpec(1e4, 2, 1), 4, None, 0)
    return ModelPlan((layer,), 8, 8, None, 1e-6, 999, 0, 0, 0, True, False)


def make_step(window: int | None, device: torch.device, lengths: tuple[int, ...] = (13, 0, 9)) -> tuple[Step, list[BlockTable]]:
    """Return a step of 2, 6 and 1 rows over tables whose pages interleave."""
    pool = PagedKVCache(plan_of(window), {group_of(window): PoolSize(40, PAGE)}, torch.float32)
    tables, rows = [BlockTable(pool) for _ in lengths], (2, 6, 1)
    while any(table.length < length for table, length in zip(tables, lengths, strict=True)):
        for table, length in zip(tables, lengths, strict=True):
            if table.length < length:
                table.reserve(1)
                table.commit(1)
    for table, count in zip(tables, rows, strict=True):
        table.reserve(count)
    positions = torch.cat([table.length + torch.arange(count) for table, count in zip(tables, rows, strict=True)]).to(device)
    spans = {group_of(window): tuple(table.kv_range(group_of(window)) for table in tables)}
    slots = {
        group_of(window): torch.tensor([slot for table in tables for slot in table.slot_mapping(group_of(window))], device=device)
    }
    return prepare(Step(positions, positions, positions, (0, 2, 8, 9), spans, slots, None, {}), build), tables


@pytest.mark.parametrize("window", [None, WINDOW])
def test_every_key_is_found_where_the_span_has_it(window: int | None, device: torch.device) -> None:
    step, tables = make_step(window, device)
    here = of_group(step, group_of(window))
    for s, table in enumerate(tables):
        span = step.kv_ranges[group_of(window)][s]
        count = table.length + table.reserved - span.start
        wanted = list(range(span.where.start, span.where.stop)) if isinstance(span.where, slice) else span.where.tolist()
        assert len(wanted) == count
        found = []
        for p in range(span.start, span.start + count):
            page = here.pages_SP[s, p // here.page_tokens - here.first_S[s]]
            found.append(int(page) * here.page_tokens + p % here.page_tokens)
        assert found == wanted
        rows = slice(step.query_start[s], step.query_start[s + 1])
        assert here.slot_mapping_N is not None
        assert here.slot_mapping_N[rows].tolist() == found[table.length - span.start :]


def test_rows_name_their_sequences(device: torch.device) -> None:
    here = of_group(make_step(None, device)[0], GLOBAL_GROUP)
    assert here.row_sequence_N.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2]
    assert here.query_start_S1.tolist() == [0, 2, 8, 9]
    assert here.positions_N.tolist() == [13, 14, 0, 1, 2, 3, 4, 5, 9]
    assert (here.max_rows, here.sequences, here.page_tokens) == (6, 3, PAGE)
    small = (here.positions_N, here.row_sequence_N, here.query_start_S1, here.pages_SP, here.first_S)
    assert {(each.dtype, each.device.type) for each in small} == {(torch.int32, device.type)}


def test_it_is_made_once_a_step_for_its_groups_alone(device: torch.device) -> None:
    step, _ = make_step(WINDOW, device)
    assert of_group(step, group_of(WINDOW)) is of_group(step, group_of(WINDOW))
    with pytest.raises(KernelError, match="no Triton attention metadata for the group 'global'"):
        of_group(step, GLOBAL_GROUP)


def test_last_visible_positions_come_along(device: torch.device) -> None:
    step, _ = make_step(None, device)
    last = torch.arange(9, device=device) + 20
    step = prepare(replace(step, last_visible={GLOBAL_GROUP: last}, logit_rows=(1, 8)), build)
    whole, kept = of_group(step, GLOBAL_GROUP), of_group(step.remaining, GLOBAL_GROUP)
    assert whole.last_visible_N is not None
    assert kept.last_visible_N is not None
    assert (whole.last_visible_N.dtype, whole.last_visible_N.tolist()) == (torch.int32, last.tolist())
    assert kept.last_visible_N.tolist() == [21, 28]
    assert TritonAttnMetadata.__dataclass_fields__["last_visible_N"].default is None


def test_kept_rows_read_the_same_pages_and_write_nothing(device: torch.device) -> None:
    step, _ = make_step(WINDOW, device)
    kept = prepare(replace(step, logit_rows=(1, 8)), build).remaining
    whole, here = of_group(step, group_of(WINDOW)), of_group(kept, group_of(WINDOW))
    assert here.slot_mapping_N is None
    assert here.query_start_S1.tolist() == [0, 1, 1, 2]
    assert here.positions_N.tolist() == [14, 9]
    assert torch.equal(here.pages_SP, whole.pages_SP)


def test_spans_without_pages_are_refused(device: torch.device) -> None:
    step, _ = make_step(None, device)
    blind = replace(
        step, kv_ranges={GLOBAL_GROUP: tuple(KVRange(span.start, span.where) for span in step.kv_ranges[group_of(None)])}
    )
    with pytest.raises(KernelError, match="name no pages"):
        build(blind)
