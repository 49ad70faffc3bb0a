"""How many pages a pool needs, and which layers it stores compactly.

Owns the arithmetic between tokens, sequences and pages; the byte counts come from the plan. Refuses to know devices.
"""

from __future__ import annotations

from torch import Tensor

from gemcutter.cache.kv_cache import PoolSize
from gemcutter.model.text import Decoder
from gemcutter.ops.types import vector
from gemcutter.plan import GroupId, ModelPlan

PAGE_TOKENS = 64


def page_counts(
    plan: ModelPlan, context: int, rows: int, sequences: int = 1, checkpoints: int = 0, page_tokens: int = PAGE_TOKENS
) -> dict[GroupId, PoolSize]:
    """Size every group for `sequences` sequences of up to `context` tokens each, stepped `rows` rows at a time.

    A windowed group keeps the window and the rows in flight, whose ends share pages with neighbours; a checkpoint keeps a
    window of its own.
    """
    counts: dict[GroupId, PoolSize] = {}
    in_flight, resting = (most_pages(plan, context, some, page_tokens) for some in (rows, 0))
    for group in plan.groups():
        # A checkpoint's last page is copied on write; the others of the global group are shared.
        kept = 1 if group.window is None else resting[group.id]
        counts[group.id] = PoolSize(in_flight[group.id] * sequences + kept * checkpoints, page_tokens)
    return counts


def most_pages(plan: ModelPlan, context: int, rows: int, page_tokens: int = PAGE_TOKENS) -> dict[GroupId, int]:
    """Give the most pages that one sequence of up to `context` tokens holds in each group while `rows` rows are computed."""
    whole = -(-context // page_tokens)
    return {
        group.id: whole if group.window is None else min(whole, -(-(group.window - 1 + rows) // page_tokens) + 1)
        for group in plan.groups()
    }


def compact_weights(decoder: Decoder) -> dict[int, Tensor]:
    """Give the layers to store compactly, each by the weight of its key norm: those that its backend stores so."""
    return {
        layer.index: vector(decoder.params, f"layers.{layer.index}.attn.k_norm")
        for layer in decoder.plan.writers
        if decoder.backend.is_compact(layer)
    }
