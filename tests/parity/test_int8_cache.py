"""The trained models over an int8 cache: native kernels against the reference, chunks, prefixes, preemption, likelihood, memory.

Owns what the cache costs the models in the repository: their greedy replies and their likelihood of a passage, beside those with
keys and values in the compute dtype. Read `test_speculation_together.py` for drafts over such a cache,
`tests/kernels/test_native_int8_cache.py` for what is written.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import gemcutter
from gemcutter import api, native
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.engine.engine import Engine
from gemcutter.engine.memory import page_counts, prefix_pages
from gemcutter.errors import KernelError
from gemcutter.ops.step import KVRange
from gemcutter.parity.passage import PASSAGE
from gemcutter.plan import GLOBAL_GROUP, INT8_SCALE_BYTES
from tests.parity.batches import Job, drive
from tests.topologies import SIZES, Trace, mismatches, plan_of, relative_error, run_alone
from tests.trained import golden

INT8 = torch.int8
TINY_A = Path(__file__).parents[1] / "goldens" / "tiny-a"
FOLDERS = {"tiny-e": DEMO_FOLDER, "tiny-a": TINY_A}
TOKENS, REPLY = 200, 24  # three windows of these models
WITHIN = 2e-3  # of the reference's largest logit: vectors that differ in their last bits may get codes that differ by one
COST = 1e-3  # of mean negative log-likelihood, three times what was measured (docs/numerics.md)

needs_native = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))


@cache
def loaded(name: str, kernels: str, kv: str | None, dtype: str = "float32") -> api.Model:
    return gemcutter.load(str(FOLDERS[name]), dtype=dtype, kernels=kernels, kv=kv, context=512)


@cache
def passage(name: str) -> tuple[int, ...]:
    return tuple(loaded(name, "reference", "int8").tokenizer.encode(PASSAGE, bos=True)[:TOKENS])


@cache
def wanted_of(name: str) -> Trace:
    return run_alone(loaded(name, "reference", "int8").decoder, passage(name), 64, kv_dtype=INT8)


# ---- what the engine computes ----


@needs_native
@pytest.mark.parametrize("chunk", [1, 7, 64, TOKENS])
@pytest.mark.parametrize("name", FOLDERS)
def test_chunks_of_any_length_equal_the_reference(name: str, chunk: int) -> None:
    found = run_alone(loaded(name, "auto", "int8").decoder, passage(name), chunk, page_tokens=16, kv_dtype=INT8)
    assert mismatches(found, wanted_of(name), WITHIN) == {}
    assert torch.equal(found.logits.argmax(-1), wanted_of(name).logits.argmax(-1))


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_change_no_bit_of_the_reference(chunk: int) -> None:
    found = run_alone(loaded("tiny-e", "reference", "int8").decoder, passage("tiny-e"), chunk, kv_dtype=INT8)
    assert torch.equal(found.logits, wanted_of("tiny-e").logits)


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_move_little(name: str) -> None:
    plain = run_alone(loaded(name, "reference", None).decoder, passage(name), 64)
    assert 1e-4 < relative_error(wanted_of(name).logits, plain.logits) < 0.1
    same = wanted_of(name).logits.argmax(-1) == plain.logits.argmax(-1)
    assert same.float().mean() >= 0.97


def replies(model: api.Model) -> list[tuple[int, ...]]:
    prompts = [list(each["token_ids"]) for each in golden("prompts")["prompts"]]
    return [tuple(each.tokens) for each in model.generate(prompts, max_tokens=REPLY)]


@needs_native
@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_replies(name: str) -> None:
    """Native kernels reply as the reference does; of twelve replies, eleven or more are those over a cache in float32."""
    found = replies(loaded(name, "auto", "int8"))
    assert found == replies(loaded(name, "reference", "int8"))
    plain = replies(loaded(name, "auto", None))
    assert sum(mine == theirs for mine, theirs in zip(found, plain, strict=True)) >= len(plain) - 1


def test_a_prefix_that_is_found_changes_no_reply() -> None:
    with gemcutter.load("demo", dtype="float32", kv="int8", context=256) as model:
        ids = list(passage("tiny-e")[:150])
        first, again = (model.stream(ids, max_tokens=REPLY).finish() for _ in range(2))
        assert first.prompt.cached_tokens == 0
        assert again.prompt.cached_tokens >= 128
        assert again.tokens == first.tokens


def test_preempted_sequences_reply_as_if_they_were_alone() -> None:
    decoder = loaded("tiny-e", "auto", "int8").decoder
    jobs = [Job(passage("tiny-e")[start : start + 90], max_tokens=REPLY) for start in (0, 30, 60)]
    alone = [drive(Engine(decoder, 192, 24, kv_dtype=INT8), [job])[0].tokens for job in jobs]
    engine = Engine(decoder, 192, 24, len(jobs), kv_dtype=INT8)
    counts = page_counts(decoder.plan, 192, 24, page_tokens=8)
    small = {group: PoolSize(size.pages + 4, size.tokens) for group, size in counts.items()}
    engine.pool = engine.scheduler.pool = engine.runner.pool = PagedKVCache(decoder.plan, small, INT8)
    engine.prefix.pool = engine.pool
    assert [each.tokens for each in drive(engine, jobs)] == alone
    assert engine.stats().preemptions > 0


# ---- what it costs ----


def nll(model: api.Model, ids: tuple[int, ...]) -> float:
    """Return the mean negative log-probability of the tokens after the first."""
    found = model.stream(list(ids), max_tokens=0, prompt_logprobs=0).finish().prompt.logprobs
    return -sum(each.logprob for each in found) / len(found)


@pytest.mark.parametrize("kernels", [pytest.param("auto", marks=needs_native), "reference"])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_cache_costs_less_than_a_thousandth_of_the_nll(name: str, kernels: str) -> None:
    plain = nll(loaded(name, "reference", None), passage(name))
    assert nll(loaded(name, kernels, "int8"), passage(name)) == pytest.approx(plain, rel=COST)


@needs_native
@pytest.mark.parametrize("name", FOLDERS)
def test_beside_bfloat16_rows_too(name: str) -> None:
    plain = nll(loaded(name, "reference", None), passage(name))
    model = loaded(name, "auto", "int8", "bfloat16")
    assert {tensor.dtype for tensor in model.engine.pool.keys.values()} == {INT8}
    assert nll(model, passage(name)) == pytest.approx(plain, rel=3e-3)  # of which bfloat16 has its own part


# ---- storage ----


@pytest.mark.parametrize("size", SIZES)
def test_the_plan_counts_the_bytes_that_are_allocated(size: str) -> None:
    plan = plan_of(SIZES[size])
    tokens = 128
    counts = {layer.group: PoolSize(tokens if layer.window is None else layer.window, 1) for layer in plan.writers}
    pool = PagedKVCache(plan, counts, INT8)
    assert pool.nbytes == plan.kv_bytes(tokens, 1, scale_bytes=INT8_SCALE_BYTES)
    whole = sum(pool.page_bytes(group) * count.pages for group, count in counts.items())
    assert whole == pool.nbytes
    assert plan.read_bytes(tokens, 0, 1, kv_scale_bytes=INT8_SCALE_BYTES) > plan.read_bytes(tokens, 0, 1)


@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_prefixes_get_what_the_pool_takes_for_them(size: str) -> None:
    plan = plan_of(SIZES[size])
    pages = prefix_pages(plan, 2048, 4, 1 << 22, 1, scale_bytes=INT8_SCALE_BYTES)
    pool = PagedKVCache(plan, {group: PoolSize(count, 64) for group, count in pages.items()}, INT8)
    assert 0.9 * (1 << 22) < pool.nbytes <= 1 << 22


def test_a_page_is_copied_with_its_scales() -> None:
    plan = plan_of(SIZES["31B"])
    pool = PagedKVCache(plan, {group.id: PoolSize(3, 4) for group in plan.groups()}, INT8)
    layer = next(layer for layer in plan.writers if layer.group == GLOBAL_GROUP)
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(4, layer.kv_heads, layer.head_dim, generator=draw) for _ in range(2))
    pool.write(layer.index, torch.arange(4), keys, values)
    pool.copy_page(GLOBAL_GROUP, 0, 2)
    for old, new in zip(*(pool.read(layer.index, KVRange(0, slice(at, at + 4))) for at in (0, 8)), strict=True):
        assert torch.equal(old, new)


def test_codes_are_never_taken_for_numbers() -> None:
    plan = plan_of(SIZES["31B"])
    counts = {group.id: PoolSize(1, 4) for group in plan.groups()}
    pool = PagedKVCache(plan, counts, INT8)
    assert pool.int8(0) is not None
    with pytest.raises(KernelError, match="in 8 bits with scales"):
        pool.storage(0)
    assert PagedKVCache(plan, counts, torch.bfloat16).int8(0) is None
    with pytest.raises(KernelError, match="stores no layer compactly"):
        PagedKVCache(plan, counts, INT8, compact={0: torch.ones(16)})
