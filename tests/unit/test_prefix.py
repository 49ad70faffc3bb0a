"""Checkpoints of finished prompts: the longest usable beginning is reused, and every page comes back.

Keys are written so that they name the ids before them; a reused table must show the keys of the very prompt that found it.
Knows nothing of decoders. Read `test_scheduler.py` for reuse across the turns of a chat.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.cache.prefix_cache import PrefixCache
from gemcutter.plan import Attn, LayerPlan, ModelPlan, Proj, RopeSpec, group_of

Ids = tuple[int, ...]


def make_pool(tokens: int = 2, window: int | None = None, pages: int = 60) -> PagedKVCache:
    """Make a pool of a global group and, with `window`, a windowed one."""
    windows = (None,) if window is None else (None, window)
    layers = [
        LayerPlan(i, Attn.SLIDING if w else Attn.GLOBAL, Proj.QKV, i, "self", 1, 1, 2, w, RopeSpec(1e4, 2, 1), 4, None, 0)
        for i, w in enumerate(windows)
    ]
    sizes = {"hidden": 4, "vocab": 8, "context": 1000, "ple_vocab": 0, "ple_dim": 0, "pad_id": 0}
    plan = ModelPlan(tuple(layers), softcap=None, eps=1e-6, tied_head=True, bidirectional=False, **sizes)
    return PagedKVCache(plan, dict.fromkeys(map(group_of, windows), PoolSize(pages, tokens)), torch.float64)


def number(ids: Ids) -> int:
    """Name a beginning of at most 20 ids below 4 by one number."""
    return sum((token + 1) * 5**place for place, token in enumerate(ids))


def extend(table: BlockTable, ids: Ids) -> BlockTable:
    """Compute the ids that a table lacks: one key a position, named by all ids up to it."""
    table.reserve(len(ids) - table.length)
    for layer, group in enumerate(table.cache.windows):
        keys = torch.tensor([number(ids[: position + 1]) for position in range(table.length, len(ids))], dtype=torch.float64)
        k_NKE = keys[:, None, None].expand(-1, 1, 2)
        table.cache.write(layer, torch.tensor(table.slot_mapping(group)), k_NKE, k_NKE)
    table.commit(table.reserved)
    return table


def assert_holds(table: BlockTable, ids: Ids) -> None:
    """See that a table shows the keys of `ids` wherever its next query looks."""
    table.reserve(1)
    for layer, (group, window) in enumerate(table.cache.windows.items()):
        span = table.kv_range(group)
        oldest = 0 if window is None else max(0, table.length + 1 - window)
        keys, _ = table.cache.read(layer, span)
        expected = [number(ids[: position + 1]) for position in range(oldest, table.length)]
        assert keys[oldest - span.start : table.length - span.start, 0, 0].tolist() == expected
    table.commit(0)


def keep(cache: PrefixCache, pool: PagedKVCache, ids: Ids) -> None:
    """Compute ids in a table of their own, keep it, and let the table go."""
    table = extend(BlockTable(pool), ids)
    cache.keep(ids, table)
    table.release()


def reused(cache: PrefixCache, ids: Ids) -> int:
    """Count the positions that a prompt is spared."""
    table = cache.find(ids)
    if table is None:
        return 0
    assert_holds(table, ids)
    length = table.length
    table.release()
    return length


def free_pages(pool: PagedKVCache) -> list[int]:
    return [book.free for book in pool.allocators.values()]


def common(a: Ids, b: Ids) -> int:
    return max(length for length in range(min(len(a), len(b)) + 1) if a[:length] == b[:length])


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    kept=st.lists(PROMPTS, max_size=6),
    prompts=st.lists(PROMPTS, min_size=1, max_size=4),
    capacity=st.integers(0, 4),
    tokens=st.integers(1, 4),
    window=st.none() | st.integers(1, 8),
)
def test_the_longest_usable_beginning_is_reused(
    kept: list[Ids], prompts: list[Ids], capacity: int, tokens: int, window: int | None
) -> None:
    pool, cache = make_pool(tokens, window), PrefixCache(capacity)
    for ids in kept:
        keep(cache, pool, ids)
    newest = list(dict.fromkeys(reversed(kept)))[:capacity]
    assert len(cache) == len(newest)

    def usable(point: Ids, length: int) -> bool:
        """Return whether the page of the first position that the query at `length` sees is still held."""
        return window is None or max(0, len(point) - window + 1) // tokens <= max(0, length - window + 1) // tokens

    for ids in prompts:
        lengths = [(point, min(common(point, ids), len(ids) - 1)) for point in newest]
        assert reused(cache, ids) == max((length for point, length in lengths if usable(point, length)), default=0)
    while cache.evict():
        pass
    assert free_pages(pool) == [60] * len(pool.allocators)


def test_the_last_token_is_always_computed_anew() -> None:
    pool, cache = make_pool(), PrefixCache(4)
    keep(cache, pool, (1, 2, 3, 0))
    assert reused(cache, (1, 2, 3, 0)) == 3
    assert reused(cache, (1, 2, 3, 0, 0)) == 4
    assert reused(cache, (1, 2)) == 1
    assert reused(cache, (1,)) == 0
    assert reused(cache, (2, 2, 3)) == 0


def test_a_checkpoint_whose_window_is_gone_gives_way_to_a_shorter_one() -> None:
    pool, cache = make_pool(tokens=1, window=3), PrefixCache(4)
    keep(cache, pool, (1, 1, 1, 1, 1, 1, 1, 1))  # holds positions 6 and 7 in the windowed group
    prompt = (1, 1, 1, 1, 1, 2, 2)
    assert reused(cache, prompt) == 0
    keep(cache, pool, (1, 1, 1))
    assert reused(cache, prompt) == 3


def test_a_found_table_and_its_checkpoint_go_separate_ways() -> None:
    pool, cache = make_pool(tokens=4, window=6), PrefixCache(1)
    keep(cache, pool, (1, 2, 3, 1, 2, 3))
    found = cache.find((1, 2, 3, 1, 2, 0))
    assert found is not None
    extend(found, (1, 2, 3, 1, 2, 0, 0, 0, 0))  # writes into the page it shares
    assert_holds(found, (1, 2, 3, 1, 2, 0, 0, 0, 0))
    assert reused(cache, (1, 2, 3, 1, 2, 3, 3)) == 6
    cache.evict()
    assert_holds(found, (1, 2, 3, 1, 2, 0, 0, 0, 0))
    found.release()
    assert free_pages(pool) == [60, 60]


def test_a_kept_table_may_go_on() -> None:
    pool, cache = make_pool(tokens=4), PrefixCache(2)
    table = extend(BlockTable(pool), (1, 2, 3))
    cache.keep((1, 2, 3), table)
    extend(table, (1, 2, 3, 0, 0))
    assert reused(cache, (1, 2, 3, 1)) == 3
    assert_holds(table, (1, 2, 3, 0, 0))


def test_eviction_drops_the_oldest_and_frees_its_pages() -> None:
    pool, cache = make_pool(tokens=2, pages=10), PrefixCache(2)
    for ids in ((1, 1, 1), (2, 2, 2, 2, 2), (3, 3)):  # 2, 3 and 1 pages; the first is dropped for the third
        keep(cache, pool, ids)
    assert (len(cache), free_pages(pool), reused(cache, (1, 1, 1))) == (2, [6], 0)
    assert cache.evict()
    assert (len(cache), free_pages(pool), reused(cache, (2, 2, 2))) == (1, [9], 0)
    assert reused(cache, (3, 3, 3)) == 2
    assert cache.evict()
    assert not cache.evict()
    assert free_pages(pool) == [10]


def test_keeping_the_same_ids_again_replaces_the_checkpoint() -> None:
    pool, cache = make_pool(pages=10), PrefixCache(2)
    keep(cache, pool, (1, 1, 1))
    keep(cache, pool, (2, 2))
    keep(cache, pool, (1, 1, 1))  # is the newest now
    assert (len(cache), free_pages(pool)) == (2, [7])
    keep(cache, pool, (3, 3))
    assert [reused(cache, ids) for ids in ((1, 1, 1), (2, 2, 2), (3, 3, 3))] == [2, 0, 2]


def test_nothing_is_kept_without_capacity_or_ids() -> None:
    pool, none, two = make_pool(pages=10), PrefixCache(0), PrefixCache(2)
    keep(none, pool, (1, 2))
    two.keep((), BlockTable(pool))
    assert len(none) == len(two) == 0
    assert free_pages(pool) == [10]
