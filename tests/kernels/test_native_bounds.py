"""Ids, slots, positions and row numbers that are not there: the native kernels refuse them before they touch memory.

Every case names something just outside of its table; a cache full of a known value shows that nothing was written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gemcutter import native
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.errors import KernelError
from gemcutter.model.text import Decoder
from gemcutter.ops.step import KVRange, Step
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight
from tests.formats import mutations
from tests.topologies import plan_of

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

ROWS, PAGES, PAGE_TOKENS = 3, 2, 8
RAW = mutations.RAW | {"vocab_size": 64, "vocab_size_per_layer_input": 64}


@pytest.fixture(scope="module")
def plan() -> ModelPlan:
    return plan_of(RAW)


@pytest.fixture(scope="module")
def decoder(plan: ModelPlan) -> Decoder:
    torch.manual_seed(0)
    params = {}
    for spec in plan.params():
        found = torch.randn(spec.shape) * 0.1
        params[spec.name] = Weight((found,)) if len(spec.shape) > 1 else found
        if spec.parts:
            cut = torch.split(found, [rows for _, rows in spec.parts], dim=-2)
            params[spec.name] = Weight(tuple(part.contiguous() for part in cut), tuple(name for name, _ in spec.parts))
    decoder = Decoder(plan, params)
    assert "native" in decoder.layers[0].kernels.values()
    return decoder


def a_step(decoder: Decoder, cache: PagedKVCache) -> Step:
    """Return a sound step, unprepared: three rows of one sequence in the first slots."""
    ids, positions = torch.tensor([5, 6, 7]), torch.arange(ROWS)
    return Step(
        ids_N=ids,
        ple_ids_N=ids,
        positions_N=positions,
        query_start=(0, ROWS),
        kv_ranges={group: (KVRange(0, slice(0, ROWS)),) for group in cache.allocators},
        slot_mapping=dict.fromkeys(cache.allocators, torch.arange(ROWS)),
        logit_rows=(2,),
        rope=decoder.rope_tables(positions),
    )


def size_of(cache: PagedKVCache) -> int:
    return cache.storage(0)[0].shape[0]


def with_ranges(step: Step, where: slice | torch.Tensor) -> Step:
    return replace(step, kv_ranges=dict.fromkeys(step.kv_ranges, (KVRange(0, where),)))


CASES: dict[str, Callable[[Step, int], Step]] = {
    "id": lambda step, size: replace(step, ids_N=torch.tensor([5, 64, 7])),
    "negative id": lambda step, size: replace(step, ids_N=torch.tensor([5, -1, 7])),
    "per-layer id": lambda step, size: replace(step, ple_ids_N=torch.tensor([5, 6, 64])),
    "slot": lambda step, size: replace(step, slot_mapping=dict.fromkeys(step.slot_mapping, torch.tensor([0, 1, size]))),
    "negative slot": lambda step, size: replace(step, slot_mapping=dict.fromkeys(step.slot_mapping, torch.tensor([0, 1, -1]))),
    "range": lambda step, size: with_ranges(step, slice(size - 2, size + 1)),
    "listed slot": lambda step, size: with_ranges(step, torch.tensor([0, 1, size])),
    "position beyond the range": lambda step, size: with_ranges(step, slice(0, 2)),
    "negative position": lambda step, size: replace(step, positions_N=torch.tensor([-1, 1, 2])),
    "last visible": lambda step, size: replace(step, last_visible=dict.fromkeys(step.slot_mapping, torch.tensor([0, 1, 3]))),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_there_is_refused(decoder: Decoder, plan: ModelPlan, name: str) -> None:
    cache = PagedKVCache(plan, {group.id: PoolSize(PAGES, PAGE_TOKENS) for group in plan.groups()}, torch.float32)
    for layer in plan.writers:
        for tensor in cache.storage(layer.index):
            tensor.fill_(7.0)
    with torch.inference_mode():
        sound = a_step(decoder, cache)
        assert torch.isfinite(decoder.forward(decoder.prepare(sound), cache)).all()
        first = [tensor.clone() for layer in plan.writers for tensor in cache.storage(layer.index)]
        with pytest.raises(KernelError, match="is not there"):
            decoder.forward(decoder.prepare(CASES[name](sound, size_of(cache))), cache)
    after = [tensor for layer in plan.writers for tensor in cache.storage(layer.index)]
    assert all(torch.equal(a, b) for a, b in zip(first, after, strict=True))


def test_kept_rows_are_checked(decoder: Decoder, plan: ModelPlan) -> None:
    cache = PagedKVCache(plan, {group.id: PoolSize(PAGES, PAGE_TOKENS) for group in plan.groups()}, torch.float32)
    step = decoder.prepare(a_step(decoder, cache))
    with torch.inference_mode(), pytest.raises(KernelError, match="is not there"):
        decoder.layers[1].forward(torch.zeros(ROWS, 64), replace(step, logit_rows_M=torch.tensor([3])), cache, torch.zeros(1, 32))
