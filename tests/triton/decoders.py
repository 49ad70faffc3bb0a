"""Small decoders for the Triton tests, and a prompt's way through them.

Owns plans with every kind of layer in sizes that Triton's interpreter can bear, random parameters, and `run`, which gives every
layer's output. Refuses to judge. Read `test_triton_sentences.py` next.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemcutter import config as configs
from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.model.text import Decoder
from gemcutter.ops.types import Param, vector
from gemcutter.plan import ModelPlan, derive
from gemcutter.quant import Weight

SLIDING, GLOBAL = "sliding_attention", "full_attention"
PAGE_TOKENS = 16
_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 60,
    "vocab_size_per_layer_input": 60,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 4,
    "max_position_embeddings": 4096,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,
}
_TRAITS: dict[str, dict[str, Any]] = {
    "readers": {  # as E2B and E4B: per-layer embeddings, layers that read what others wrote
        "layer_types": [SLIDING, GLOBAL, SLIDING, GLOBAL],
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
    },
    "experts": {  # as 26B-A4B: experts, values that are the key projection
        "layer_types": [SLIDING, GLOBAL],
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 3,
        "moe_intermediate_size": 16,
        "tie_word_embeddings": False,
    },
}


@cache
def plan_of(name: str) -> ModelPlan:
    """Derive a small plan; that of Gemma 3 leaves values as they are."""
    traits = _TRAITS.get(name) or {"layer_types": [SLIDING, GLOBAL], "num_key_value_heads": 2}
    plan = derive(configs.read(_COMMON | traits | {"num_hidden_layers": len(traits["layer_types"])}))
    if name != "Gemma 3":
        return plan
    return replace(plan, layers=tuple(replace(layer, has_v_norm=False) for layer in plan.layers))


def draw_params(plan: ModelPlan, dtype: torch.dtype, device: torch.device) -> dict[str, Param]:
    """Draw parameters: vectors around 1, matrices that keep the size of what they multiply, parts apart but for experts'."""
    generator, found = torch.Generator().manual_seed(7), dict[str, Param]()
    for spec in plan.params():
        if len(spec.shape) == 1:
            found[spec.name] = (torch.rand(spec.shape, generator=generator) + 0.5).to(device)
            continue
        size = 4.0 if spec.name.endswith("router") else 0.2 if spec.name.endswith("ple.gate") else 1.0
        whole = (torch.randn(spec.shape, generator=generator) * size * spec.shape[-1] ** -0.5).to(device, dtype)
        parts = whole.split([rows for _, rows in spec.parts] or [spec.shape[-2]], dim=-2)
        apart = parts if whole.ndim == 3 else tuple(part.clone() for part in parts)
        found[spec.name] = Weight(apart, tuple(name for name, _ in spec.parts))
    return found


def decode_with(
    kernels: str, name: str, device: torch.device, dtype: torch.dtype = torch.float32, by_line: bool = False
) -> Decoder:
    """Build a small decoder; `by_line` runs its layers op by op even where a kernel takes them whole."""
    plan = plan_of(name)
    decoder = Decoder(plan, draw_params(plan, dtype, device), dtype, device, kernels)
    for layer in decoder.layers:
        layer.fused = None if by_line else layer.fused
    return decoder


@dataclass(frozen=True, slots=True)
class Trace:
    """Every layer's output, row after row of all steps, the final-normed states and their logits."""

    layers: tuple[Tensor, ...]
    states: Tensor
    logits: Tensor


@torch.inference_mode()
def run(
    decoder: Decoder,
    prompts: Rows[Rows[int]],
    chunks: Rows[int],
    keep_all: bool = True,
    is_compact: bool = False,
    adapters: Rows[str | None] | None = None,
) -> Trace:
    """Run prompts side by side, chunks[i] rows of each in step i and one row from then on, in a pool that begins as NaN.

    With `keep_all` every row goes through all layers, else the last of a prompt alone; `is_compact` stores compactly what can be;
    `adapters` names that of each prompt.
    """
    plan, longest = decoder.plan, max(map(len, prompts))
    counts = page_counts(plan, longest, max(chunks), len(prompts), page_tokens=PAGE_TOKENS)
    k_norms = {layer.index: f"layers.{layer.index}.attn.k_norm" for layer in plan.layers if is_compact and layer.can_compact}
    compact = {index: vector(decoder.params, name) for index, name in k_norms.items()}
    pool = PagedKVCache(plan, counts, decoder.dtype, decoder.device, compact)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.fill_(torch.nan)
    sequences = [
        SequenceState(index, Request(tuple(prompt), hidden_states=keep_all, adapter=adapter))
        for index, (prompt, adapter) in enumerate(zip(prompts, adapters or [None] * len(prompts), strict=True))
    ]
    for sequence in sequences:
        sequence.table = BlockTable(pool)
    layers: list[list[Tensor]] = [[] for _ in plan.layers]
    states, step = [], 0
    while pending := [each for each in sequences if each.table is not None and each.table.length < len(each.request.prompt)]:
        rows = chunks[step] if step < len(chunks) else 1
        works = [_reserve(each, rows) for each in pending]
        states.append(decoder.forward(build_step(decoder, works), pool, lambda index, x: layers[index].append(x.clone())))
        for work in works:
            work.table.commit(work.rows)
        step += 1
    outputs = tuple(torch.cat(found) if found else torch.empty(0) for found in layers)
    return Trace(outputs, torch.cat(states), decoder.logits(torch.cat(states)))


def _reserve(sequence: SequenceState, rows: int) -> ScheduledChunk:
    table = sequence.table
    assert table is not None
    work = ScheduledChunk.of(sequence, table, min(rows, len(sequence.request.prompt) - table.length))
    table.reserve(work.rows)
    return work


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Draw token ids."""
    return tuple(torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist())
