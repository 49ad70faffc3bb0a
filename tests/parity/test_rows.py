"""What enters and leaves the layers is rows: those of a drafter that reads its target, of media, and of a few wanted states.

Owns whole decoders on steps that text generation never makes; `tests/kernels/test_ops.py` holds single kernels against formulas.
No outside oracle: rows that are computed together are compared with rows computed alone, kernels with the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.model.text import Decoder
from gemcutter.ops.step import MediaRows, Step
from gemcutter.ops.types import Param
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight
from tests.topologies import KERNELS, SIZES, plan_of, prompt, relative_error

WIDE = {"head_dim": 32, "global_head_dim": 64}  # heads that the native kernels take
TOKENS = 40


def params_of(plan: ModelPlan) -> dict[str, Param]:
    """Draw parameters: vectors around 1, matrices that keep the size of what they multiply."""
    generator, found = torch.Generator().manual_seed(3), dict[str, Param]()
    for spec in plan.params():
        drawn = torch.randn(spec.shape, generator=generator)
        if len(spec.shape) == 1:
            found[spec.name] = 1 + drawn / 8
            continue
        whole = drawn * spec.shape[-1] ** -0.5
        parts = whole.split([rows for _, rows in spec.parts], dim=-2) if spec.parts else (whole,)
        found[spec.name] = Weight(tuple(parts), tuple(name for name, _ in spec.parts))
    return found


def decoder_of(plan: ModelPlan, kernels: str) -> Decoder:
    return Decoder(plan, params_of(plan), torch.float32, "cpu", kernels)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def filled(decoder: Decoder, page_tokens: int = 16) -> tuple[PagedKVCache, SequenceState, BlockTable]:
    """Return a cache in which a sequence of TOKENS has been computed but for its last 12 rows, which are reserved."""
    counts = page_counts(decoder.plan, TOKENS, TOKENS, page_tokens=page_tokens)
    cache = PagedKVCache(decoder.plan, counts, torch.float32)
    for storage in (*cache.keys.values(), *cache.values.values()):
        storage.fill_(torch.nan)
    sequence = SequenceState(0, Request(prompt(TOKENS)))
    sequence.table = table = BlockTable(cache)
    table.reserve(TOKENS - 12)
    decoder.forward(build_step(decoder, [ScheduledChunk.of(sequence, table, TOKENS - 12)]), cache)
    table.commit(TOKENS - 12)
    table.reserve(12)
    return cache, sequence, table


def bare(step: Step, **changes: object) -> Step:
    """Return a step that is still to be prepared, with other fields."""
    return replace(step, kept=None, attn_metadata={}, logit_rows_M=None, **changes)  # type: ignore[arg-type]


# ---- drafters ----


def drafter_of(target: ModelPlan) -> ModelPlan:
    """Make a drafter of the target's readers: no layer of it writes."""
    readers = [layer for layer in target.layers if not layer.writes]
    layers = tuple(replace(layer, index=i, kv_owner="target", ple_dim=0) for i, layer in enumerate(readers))
    return replace(target, layers=layers, ple_dim=0, backbone=target.hidden)


def draft_step(decoder: Decoder, table: BlockTable, rows: int) -> Step:
    """Make a step of the next rows of a sequence, all of whose keys its target has written."""
    positions = torch.arange(table.length, table.length + rows)
    ranges = {group: (table.kv_range(group),) for group in table.cache.allocators}
    rope = decoder.rope_tables(positions)
    return Step(positions, positions, positions, (0, rows), ranges, {}, None, rope)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("wanted", [(0, 5, 11), (11,), ()], ids=str)
def test_a_drafters_unwanted_rows_end_before_its_first_layer(kernels: str, wanted: tuple[int, ...]) -> None:
    plan = plan_of(SIZES["E2B"] | WIDE)
    target, drafter = decoder_of(plan, kernels), decoder_of(drafter_of(plan), kernels)
    assert (drafter.plan.first_reader, drafter.plan.num_full_layers) == (0, 0)
    cache, sequence, table = filled(target)
    target.forward(build_step(target, [ScheduledChunk.of(sequence, table, 12)]), cache)
    x_ND = torch.randn(12, plan.hidden, generator=torch.Generator().manual_seed(5))
    step, seen = draft_step(drafter, table, 12), list[int]()
    every = drafter.run_layers(x_ND, drafter.prepare(step), cache)
    assert every.shape == x_ND.shape
    some = drafter.prepare(bare(step, logit_rows=wanted))
    found = drafter.run_layers(x_ND, some, cache, lambda _, rows_MD: seen.append(len(rows_MD)))
    assert found.shape == (len(wanted), plan.hidden)
    assert seen == ([len(wanted)] * len(drafter.layers) if wanted else [])
    assert not wanted or relative_error(found, every[list(wanted)]) < (1e-5 if kernels == "auto" else 1e-12)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_a_drafter_computes_alike_with_all_kernels() -> None:
    plan = plan_of(SIZES["E4B"] | WIDE)
    found = []
    for kernels in ("reference", "auto"):
        target, drafter = decoder_of(plan, kernels), decoder_of(drafter_of(plan), kernels)
        cache, sequence, table = filled(target)
        target.forward(build_step(target, [ScheduledChunk.of(sequence, table, 12)]), cache)
        x_ND = torch.randn(12, plan.hidden, generator=torch.Generator().manual_seed(5))
        found.append(drafter.run_layers(x_ND, drafter.prepare(draft_step(drafter, table, 12)), cache))
    assert relative_error(found[1], found[0]) < 1e-4


# ---- rows that are no tokens ----


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_media_rows_enter_in_place_of_their_ids(size: str, kernels: str) -> None:
    """Rows that carry the embeddings of some tokens give what these tokens give, whatever ids stand in their place."""
    decoder = decoder_of(plan_of(SIZES[size] | WIDE), kernels)
    states = []
    for is_media in (False, True):
        cache, sequence, table = filled(decoder)
        step = build_step(decoder, [ScheduledChunk.of(sequence, table, 12)])
        if is_media:
            rows = torch.tensor([2, 3, 7])
            ids = step.ids_N.clone()
            ids[rows] = 0
            media = MediaRows(rows, decoder.embed(step.ids_N[rows]))
            step = replace(step, ids_N=ids, media=media)  # per-layer embeddings keep the ids of their own
        states.append(decoder.forward(step, cache))
    assert torch.equal(*states)


@pytest.mark.parametrize("kernels", KERNELS)
def test_embedded_rows_may_come_from_elsewhere(kernels: str) -> None:
    decoder = decoder_of(plan_of(SIZES["31B"] | WIDE), kernels)
    states = []
    for is_apart in (False, True):
        cache, sequence, table = filled(decoder)
        step = build_step(decoder, [ScheduledChunk.of(sequence, table, 12)])
        states.append(decoder.run_layers(decoder.embed(step.ids_N), step, cache) if is_apart else decoder.forward(step, cache))
    assert torch.equal(*states)


# ---- later positions that a row may see ----


def states_with(decoder: Decoder, last: Tensor | None, wanted: tuple[int, ...] | None = None) -> Tensor:
    """Run the last 12 rows of a sequence, and give the states of all or of the wanted ones."""
    cache, sequence, table = filled(decoder)
    step = build_step(decoder, [ScheduledChunk.of(sequence, table, 12)])
    ahead = {} if last is None else dict.fromkeys(step.kv_ranges, last)
    return decoder.forward(decoder.prepare(bare(step, last_visible=ahead, logit_rows=wanted)), cache)


@pytest.mark.parametrize("size", ["E2B", "12B", "26B-A4B"])
def test_blocks_see_themselves_with_all_kernels(size: str) -> None:
    plan = plan_of(SIZES[size] | WIDE)
    positions = torch.arange(TOKENS - 12, TOKENS)
    last = positions.clone()
    last[2:7] = positions[6]  # one block in the middle, one at the end
    last[9:] = positions[11]
    plain = decoder_of(plan, "reference")
    wanted, causal = states_with(plain, last), states_with(plain, None)
    assert torch.equal(states_with(plain, positions), causal)
    differs = (wanted - causal).abs().amax(1) > 1e-5
    assert differs.tolist() == [False] * 2 + [True] * 10  # later rows read keys of the layers between that have changed
    some = (1, 4, 11)
    assert torch.equal(states_with(plain, last, some), wanted[list(some)])
    if native.missing() is None:
        fast = decoder_of(plan, "auto")
        assert relative_error(states_with(fast, last), wanted) < 1e-4
        assert relative_error(states_with(fast, last, some), wanted[list(some)]) < 1e-4
