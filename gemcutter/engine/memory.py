"""How many pages a pool needs, and which layers it stores compactly.

Owns the arithmetic between tokens, sequences and pages; the byte counts come from the plan. Refuses to know devices.
"""

from __future__ import annotations

from torch import Tensor

from gemcutter.cache.pool import PageCount
from gemcutter.errors import RequestError
from gemcutter.model.text import Decoder
from gemcutter.ops.reference import vector
from gemcutter.plan import ModelPlan

PAGE_TOKENS = 64


def page_counts(
    plan: ModelPlan, context: int, rows: int, sequences: int = 1, prefix_entries: int = 0, page_tokens: int = PAGE_TOKENS
) -> dict[int | None, PageCount]:
    """Size every group for `sequences` sequences of up to `context` tokens each, stepped `rows` rows at a time.

    A windowed group keeps the window and the rows in flight, whose ends share pages with neighbours; a cached prefix keeps a
    window of its own.
    """
    counts: dict[int | None, PageCount] = {}
    in_flight, resting = (most_pages(plan, context, some, page_tokens) for some in (rows, 0))
    for group in plan.groups():
        # A cached prefix's last page is copied on write; the others of the global group are shared.
        kept = 1 if group.window is None else resting[group.window]
        counts[group.window] = PageCount(in_flight[group.window] * sequences + kept * prefix_entries, page_tokens)
    return counts


def most_pages(plan: ModelPlan, context: int, rows: int, page_tokens: int = PAGE_TOKENS) -> dict[int | None, int]:
    """Return the most pages that one sequence of up to `context` tokens holds in each group while `rows` rows are computed."""
    whole = -(-context // page_tokens)
    return {
        group.window: whole if group.window is None else min(whole, -(-(group.window - 1 + rows) // page_tokens) + 1)
        for group in plan.groups()
    }


def compact_weights(decoder: Decoder) -> dict[int, Tensor]:
    """Return the layers to store compactly, each by the weight of its key norm: those that Triton's kernels read so."""
    return {
        layer.index: vector(decoder.params, f"layers.{layer.index}.attn.k_norm")
        for layer in decoder.plan.writers
        if layer.can_compact and "triton" in decoder.layers[layer.index].providers
    }


def check_limits(context: int, max_rows: int, max_sequences: int, checkpoints: int) -> None:
    """Raise RequestError, with every problem, unless the limits leave room for a request."""
    least = {"context": (context, 1), "max_rows": (max_rows, 1), "max_sequences": (max_sequences, 1)}
    limits = {**least, "checkpoints": (checkpoints, 0)}
    problems = [f"{name}: expected {low} or more, found {value!r}" for name, (value, low) in limits.items() if value < low]
    if problems:
        raise RequestError("the limits leave no room", problems)
