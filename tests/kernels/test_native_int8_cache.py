"""What native layers write into an int8 cache, at every processor level, and what whole decoders make of it.

Owns the definition, `quantize_vectors`, as the measure of the codes; `test_native_attention.py` holds attention over such a cache
against the reference. Read `gemcutter/ops/step.py:Int8KVCache` for the format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.model.text import Decoder
from gemcutter.ops import reference
from gemcutter.ops.cpu import layer_ops
from gemcutter.ops.registry import CPU
from gemcutter.ops.step import Int8KVCache, KVRange, Step, prepare, quantize_vectors
from gemcutter.ops.types import OpContext, Param
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight
from tests.kernels.test_native_layers import WIDE, params
from tests.topologies import SIZES, Trace, mismatches, plan_of, poison, prompt, relative_error, run_alone

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

F32, INT8 = torch.float32, torch.int8
ROWS = 6
# Where vectors that differ in their last bits are rounded to either side, a code differs by one, and moves all that follows: in
# the vectors of one step, or in all of a prompt's. These models are drawn at random, which makes them sensitive: the rounding
# itself moves their logits by 5 % and more, and a router's choice by more than that.
SAME_CODES, OWN_CODES = 2e-3, 2e-2


def slots_of(values: Tensor) -> Int8KVCache:
    """Return empty slots of one key head."""
    shape = (*values.shape[:1], 1, values.shape[-1])
    codes = [torch.zeros(shape, dtype=INT8) for _ in range(2)]
    return Int8KVCache(codes[0], codes[1], torch.zeros(shape[:2]), torch.zeros(shape[:2]))


# ---- the definition ----


def test_a_vector_comes_back_within_half_a_step() -> None:
    rows_NKE = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None, None]
    codes, scales = quantize_vectors(rows_NKE)
    assert (codes.dtype, scales.dtype, scales.shape) == (INT8, F32, (5, 2))
    assert codes.abs().amax(-1).eq(127).all()
    assert ((codes * scales[..., None] - rows_NKE).abs() <= 0.5001 * scales[..., None]).all()


def test_vectors_at_the_ends_of_numbers() -> None:
    rows_NKE = torch.ones(6, 1, 8)
    rows_NKE[0] = 0.0
    rows_NKE[1] = 1e-38
    rows_NKE[2, 0, 3] = torch.nan
    rows_NKE[3, 0, 3] = -torch.inf
    rows_NKE[4] = 3e38
    codes, scales = quantize_vectors(rows_NKE)
    assert scales[:2].eq(0).all()
    assert codes[:4].eq(0).all()
    assert scales[2:4].isnan().all()  # what is not a number stays visible
    assert (codes[4:] * scales[4:, :, None] / rows_NKE[4:] - 1).abs().max() < 1e-6


def test_what_is_written_is_read() -> None:
    rows_NKE = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(1))
    slots = slots_of(torch.zeros(7, 8))
    slots.write(torch.tensor([5, 0, 2]), rows_NKE, 2 * rows_NKE)
    for where in (slice(0, 7), torch.tensor([0, 1, 2, 3, 4, 5, 6])):
        keys, values = slots.read(where)
        assert keys.dtype == F32
        assert torch.equal(values, 2 * keys)
        assert (keys[[5, 0, 2]] - rows_NKE).abs().max() < rows_NKE.abs().max() / 127
        assert keys[[1, 3, 4, 6]].eq(0).all()


# ---- what kernels write ----


@cache
def ragged(dim: int) -> tuple[ModelPlan, dict[str, Param]]:
    """Derive a model of which head dims are multiples of no vector, whose values are not normed, and draw its first layer."""
    found = plan_of({**SIZES["31B"], "head_dim": dim, "global_head_dim": 2 * dim, "attention_k_eq_v": False})
    layer, draw = replace(found.layers[0], has_v_norm=False), torch.Generator().manual_seed(3)
    drawn = dict[str, Param]()
    for spec in found.params():
        name = spec.name.removeprefix("layers.0.")
        if name == spec.name or not name.startswith("attn."):
            continue
        whole = torch.randn(spec.shape, generator=draw)
        rows = [count for _, count in spec.parts]
        parts = whole.split(rows) if rows else (whole,)
        drawn[name] = whole.abs() if len(spec.shape) == 1 else Weight(tuple(parts), tuple(part for part, _ in spec.parts))
    return replace(found, layers=(layer,)), drawn


def written(dim: int, dtype: torch.dtype, x_ND: Tensor) -> PagedKVCache:
    """Let the first layer write keys and values of rows."""
    model, weights = ragged(dim)
    pool = PagedKVCache(model, {group.id: PoolSize(1, 16) for group in model.groups()}, dtype)
    layer, positions = model.layers[0], torch.arange(len(x_ND))
    angles = torch.outer(positions, torch.linspace(0, 1, dim // 2))[:, None]
    ranges = {layer.group: (KVRange(0, slice(0, len(x_ND))),)}
    step = Step(
        *(positions, positions, positions, (0, len(x_ND)), ranges, {layer.group: positions}, None),
        {layer.rope: (angles.cos(), angles.sin())},
    )
    build: Callable[..., Callable[..., Tensor]] = layer_ops.build_qkv
    step = prepare(step, lambda rows: CPU.attn_metadata(rows, [(layer.group, layer.rope)]))
    build(model, layer, weights, OpContext(reference.linear))(x_ND, step, pool)
    return pool


@pytest.mark.parametrize("dim", [2, 24, 34, 64, 80, 270])
@pytest.mark.usefixtures("level")
def test_codes_and_scales_are_those_of_the_definition(dim: int) -> None:
    """Of the very rows that a float32 cache gets: bit for bit, also where rows are zeros, tiny, or not finite."""
    model, _ = ragged(dim)
    x_ND = torch.randn(ROWS, model.hidden, generator=torch.Generator().manual_seed(4))
    x_ND[1] = 0.0
    x_ND[2, 5] = torch.nan
    x_ND[3] *= 1e-30
    exact, stored = written(dim, F32, x_ND), written(dim, INT8, x_ND).int8(0)
    assert stored is not None
    pairs = (
        (exact.keys[0], stored.keys_TKE, stored.key_scales_TK),
        (exact.values[0], stored.values_TKE, stored.value_scales_TK),
    )
    for rows_TKE, codes, scales in pairs:
        wanted_codes, wanted_scales = quantize_vectors(rows_TKE[:ROWS])
        assert torch.equal(codes[:ROWS], wanted_codes)
        assert torch.equal(scales[:ROWS].nan_to_num(-1.0), wanted_scales.nan_to_num(-1.0))
    assert stored.value_scales_TK[2].isnan().all()
    assert stored.value_scales_TK[1].eq(0).all()


# ---- whole decoders ----


@cache
def decoder(name: str, kernels: str) -> Decoder:
    return Decoder(plan_of({**SIZES[name], **WIDE}), params(name, F32), F32, "cpu", kernels)


@cache
def wanted_of(name: str) -> Trace:
    return run_alone(decoder(name, "reference"), prompt(90), 90, kv_dtype=INT8)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", ["E2B", "26B-A4B", "31B"])
@torch.inference_mode()
def test_a_step_over_the_very_same_cache_equals_the_reference(name: str, rows: int) -> None:
    """Whose codes the reference has written, but for those of the step itself; nothing else may differ but sums' last bits."""
    plain, fast, ids = decoder(name, "reference"), decoder(name, "auto"), prompt(90 + rows)
    pool = PagedKVCache(plain.plan, page_counts(plain.plan, len(ids), 90, page_tokens=16), INT8)
    poison(pool)
    sequence = SequenceState(0, Request(ids, hidden_states=True))
    sequence.table = table = BlockTable(pool)
    for count in (90, rows):
        work = ScheduledChunk.of(sequence, table, count)
        table.reserve(count)
        wanted = plain.logits(plain.forward(build_step(plain, [work]), pool))
        if count == rows:
            assert relative_error(fast.logits(fast.forward(build_step(fast, [work]), pool)), wanted) < SAME_CODES
        table.commit(count)


@pytest.mark.parametrize("name", ["E2B", "31B"])
def test_decoders_equal_the_reference(name: str) -> None:
    """Chunks of one row, a few, and more than a window; unused slots hold poison. Only float32 products, whatever the level."""
    for rows in (90, 64, 7, 1):
        found = run_alone(decoder(name, "auto"), prompt(90), rows, page_tokens=16, kv_dtype=INT8)
        assert mismatches(found, wanted_of(name), OWN_CODES) == {}
