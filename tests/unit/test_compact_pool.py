"""The cache of layers whose values are their normalised keys: stored once, the same keys come back.

A trained decoder runs through the reference over a plain and a compact pool: in float32 nothing changes, bit for bit; in bfloat16
a weighted key is rounded once more. Read `tests/triton/` for the kernels that read the compact form as it lies.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemcutter.api import load
from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.engine.memory import compact_weights, page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.errors import KernelError
from gemcutter.model.text import Decoder
from gemcutter.ops.step import KVRange
from gemcutter.ops.types import vector
from gemcutter.plan import GLOBAL_GROUP

TINY_A = Path(__file__).parents[1] / "goldens" / "tiny-a"
PROMPT = tuple(range(100, 190))  # longer than the window of 64
GLOBAL = 5  # the layer that can be compact
CONTEXT = len(PROMPT) + 16


@cache
def decoder_in(dtype: str) -> Decoder:
    return load(str(TINY_A), dtype=dtype, kernels="reference").decoder


def make_pool(decoder: Decoder, is_compact: bool) -> PagedKVCache:
    """Make a pool of small pages, poisoned."""
    weight = vector(decoder.params, f"layers.{GLOBAL}.attn.k_norm")
    counts = page_counts(decoder.plan, CONTEXT, 32, page_tokens=8)
    pool = PagedKVCache(decoder.plan, counts, decoder.dtype, compact={GLOBAL: weight} if is_compact else None)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.fill_(torch.nan)
    return pool


@torch.inference_mode()
def decode(decoder: Decoder, pool: PagedKVCache) -> tuple[list[int], Tensor]:
    """Run a prompt in chunks and a greedy reply; give the reply and the logits that chose it."""
    sequence = SequenceState(0, Request(PROMPT))
    sequence.table = table = BlockTable(pool)
    logits = []
    while len(sequence.reply) < 8:
        work = ScheduledChunk.of(sequence, table, min(32, sequence.pending))
        table.reserve(work.rows)
        states = decoder.forward(build_step(decoder, [work]), pool)
        is_last = work.is_last
        table.commit(work.rows)
        if is_last:
            logits.append(decoder.logits(states[-1:]))
            sequence.append(int(logits[-1].argmax()))
    return sequence.reply, torch.cat(logits)


def test_float32_tokens_and_logits_are_the_same_bit_for_bit() -> None:
    decoder = decoder_in("float32")
    (plain, plain_logits), (compact, compact_logits) = (decode(decoder, make_pool(decoder, kind)) for kind in (False, True))
    assert compact == plain
    assert torch.equal(compact_logits, plain_logits)


def test_bfloat16_logits_stay_within_its_rounding() -> None:
    decoder = decoder_in("bfloat16")
    (plain, plain_logits), (compact, compact_logits) = (decode(decoder, make_pool(decoder, kind)) for kind in (False, True))
    assert compact == plain
    assert not torch.equal(compact_logits, plain_logits)  # a key is rounded twice
    assert (compact_logits - plain_logits).abs().max() <= 2**-6 * plain_logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_only_the_columns_that_turn_are_stored_beside_the_values(dtype: torch.dtype) -> None:
    decoder = decoder_in("float32")
    plan = decoder.plan
    weight = vector(decoder.params, f"layers.{GLOBAL}.attn.k_norm")
    counts = {layer.group: PoolSize(4, 16) for layer in plan.layers}
    plain, compact = PagedKVCache(plan, counts, dtype), PagedKVCache(plan, counts, dtype, compact={GLOBAL: weight})
    layer, slots = plan.layers[GLOBAL], torch.tensor([3, 40, 17])
    normed, noise = (torch.randn(3, layer.kv_heads, layer.head_dim, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    pairs, half = layer.rope.pairs, layer.head_dim // 2
    turns = torch.arange(layer.head_dim) % half < pairs
    keys = torch.where(turns, noise, normed.to(dtype).float() * weight)  # of what is stored, so that it can come back exactly
    for pool in (plain, compact):
        pool.write(GLOBAL, slots, keys, normed)
        found_keys, found_values = pool.read(GLOBAL, KVRange(0, slots))
        assert torch.equal(found_keys.float(), keys.to(dtype).float())
        assert torch.equal(found_values.float(), normed.to(dtype).float())
    stored = compact.compact(GLOBAL)
    assert stored is not None
    assert stored.rotary_TKR.shape == (64, layer.kv_heads, 2 * pairs)
    assert compact.nbytes < plain.nbytes
    compact.copy_page(GLOBAL_GROUP, 0, 3)
    assert torch.equal(compact.read(GLOBAL, KVRange(0, torch.tensor([51])))[0].float(), keys[:1].to(dtype).float())


def test_a_compact_layer_is_never_taken_for_a_plain_one() -> None:
    decoder = decoder_in("float32")
    pool = make_pool(decoder, True)
    with pytest.raises(KernelError, match="compact"):
        pool.storage(GLOBAL)
    assert pool.compact(0) is None
    assert pool.storage(0)[0].shape == pool.storage(0)[1].shape
    assert make_pool(decoder, False).compact(GLOBAL) is None


def test_pools_stay_plain_where_no_kernel_reads_the_compact_form() -> None:
    assert compact_weights(decoder_in("float32")) == {}


def test_the_plan_counts_what_the_pool_holds() -> None:
    decoder = decoder_in("float32")
    plan = decoder.plan
    counts = {layer.group: PoolSize(CONTEXT if layer.window is None else layer.window, 1) for layer in plan.layers}
    pool = PagedKVCache(plan, counts, torch.float32, compact={GLOBAL: vector(decoder.params, f"layers.{GLOBAL}.attn.k_norm")})
    assert pool.nbytes == plan.kv_bytes(CONTEXT, 4, compact=True)
