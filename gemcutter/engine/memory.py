"""How many pages a pool needs, and which layers it stores compactly.

Owns the arithmetic between tokens, sequences and pages; the byte counts come from the plan. Refuses to know devices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.errors import RequestError
from gemcutter.model.text import Decoder
from gemcutter.ops.types import vector
from gemcutter.plan import GroupId, ModelPlan

PAGE_TOKENS = 64
MIN_WINDOWS = 4  # that cached prefixes hold by default: of two prompts' ends and two replies'
NO_PAGES: Mapping[GroupId, int] = MappingProxyType({})


def page_counts(
    plan: ModelPlan,
    context: int,
    rows: int,
    sequences: int = 1,
    prefixes: Mapping[GroupId, int] = NO_PAGES,
    page_tokens: int = PAGE_TOKENS,
) -> dict[GroupId, PoolSize]:
    """Size every group for `sequences` sequences of up to `context` tokens each, stepped `rows` rows at a time.

    A windowed group keeps the window and the rows in flight, whose ends share pages with neighbours. Cached prefixes have the
    pages that `prefix_pages` gives them.
    """
    in_flight = most_pages(plan, context, rows, page_tokens)
    return {
        group.id: PoolSize(in_flight[group.id] * sequences + prefixes.get(group.id, 0), page_tokens) for group in plan.groups()
    }


def prefix_pages(
    plan: ModelPlan,
    context: int,
    sequences: int,
    nbytes: int | None,
    itemsize: int,
    compact: Collection[int] = (),
    page_tokens: int = PAGE_TOKENS,
    scale_bytes: int = 0,
) -> dict[GroupId, int]:
    """Return how many pages of each group cached prefixes may hold in `nbytes` of memory; None: as many as serve `sequences`.

    That is half the contexts that run at once, at least one, in global groups, and as many bytes of windows, but at least
    one for each sequence and MIN_WINDOWS, and no more than these contexts have. Other budgets are shared out alike, above the
    least that is of any use: a page, and one boundary's windows. Keys and values take `itemsize` bytes an element, and each
    vector of a head `scale_bytes` more. On a pipeline, whose stages share block tables, the budget is that of all stages.
    Raises RequestError for a budget between 0 and that.
    """
    plan = plan.all_stages
    groups = plan.groups()
    if nbytes == 0 or not groups:
        return {group.id: 0 for group in groups}
    page_bytes = {
        group.id: page_tokens * int(sum(plan.layers[at].kv_bytes(itemsize, at in compact, scale_bytes) for at in group.layers))
        for group in groups
    }
    whole = -(-context // page_tokens)
    contexts = max(1, sequences // 2)
    least = {id: min(whole, pages + 1) for id, pages in most_pages(plan, context, 0, page_tokens).items()}  # and one before it
    least |= {group.id: 1 for group in groups if group.window is None}
    globals_bytes = sum(contexts * whole * page_bytes[group.id] for group in groups if group.window is None)
    windows_bytes = sum(least[group.id] * page_bytes[group.id] for group in groups if group.window is not None)
    windows = max(MIN_WINDOWS, sequences, globals_bytes // windows_bytes) if windows_bytes else 0
    usual = {
        group.id: contexts * whole if group.window is None else min(contexts * (whole + 1), windows * least[group.id])
        for group in groups
    }
    usual = {id: max(pages, least[id]) for id, pages in usual.items()}
    if nbytes is None:
        return usual
    smallest, largest = (sum(page_bytes[id] * count for id, count in pages.items()) for pages in (least, usual))
    if nbytes < smallest:
        raise RequestError(
            f"prefix_cache_bytes: {nbytes} bytes hold no prefix of this model; give {smallest} or more, or 0 to keep none"
        )
    if largest == smallest:  # one page is all that a context has
        return {id: pages * nbytes // smallest for id, pages in usual.items()}
    return {id: least[id] + (usual[id] - least[id]) * (nbytes - smallest) // (largest - smallest) for id in usual}


def most_pages(plan: ModelPlan, context: int, rows: int, page_tokens: int = PAGE_TOKENS) -> dict[GroupId, int]:
    """Return the most pages that one sequence of up to `context` tokens holds in each group while `rows` rows are computed."""
    whole = -(-context // page_tokens)
    return {
        group.id: whole if group.window is None else min(whole, -(-(group.window - 1 + rows) // page_tokens) + 1)
        for group in plan.groups()
    }


def make_pool(decoder: Decoder, counts: Mapping[GroupId, PoolSize], dtype: torch.dtype) -> PagedKVCache:
    """Make a pool beside a decoder, whose layers it stores as the decoder's kernels read them. Raises CapacityError."""
    return PagedKVCache(decoder.plan, counts, dtype, decoder.device, compact_weights(decoder))


def compact_weights(decoder: Decoder) -> dict[int, Tensor]:
    """Return the layers to store compactly, each by the weight of its key norm: those that its backend stores so."""
    return {
        layer.index: vector(decoder.params, f"layers.{layer.index}.attn.k_norm")
        for layer in decoder.plan.writers
        if decoder.backend.is_compact(layer)
    }
