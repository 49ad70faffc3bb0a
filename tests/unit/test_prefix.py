"""The tree of cached pages: what is reused shows the right keys, pages come back, and no sequence of uses breaks its books.

Keys are written so that they name the ids before them and the adapter; a reused table must show the keys of the very prompt that
found it. Knows nothing of decoders. Read `test_scheduler.py` for requests, `tests/parity/test_prefix_parity.py` for logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.cache.prefix_cache import PageNode, PrefixCache, common_length
from gemcutter.engine.memory import prefix_pages
from gemcutter.errors import RequestError
from gemcutter.plan import Attn, GroupId, LayerPlan, ModelPlan, Proj, RopeSpec, group_of
from tests.topologies import SIZES, plan_of

Ids = tuple[int, ...]
PAGES = 60


def make_pool(tokens: int = 2, window: int | None = None, pages: int = PAGES) -> PagedKVCache:
    """Make a pool of a global group and, with `window`, a windowed one."""
    windows = (None,) if window is None else (None, window)
    layers = [
        LayerPlan(i, Attn.SLIDING if w else Attn.GLOBAL, Proj.QKV, i, "self", 1, 1, 2, w, RopeSpec(1e4, 2, 1), 4, None, 0)
        for i, w in enumerate(windows)
    ]
    sizes = {"hidden": 4, "vocab": 8, "context": 1000, "ple_vocab": 0, "ple_dim": 0, "pad_id": 0}
    plan = ModelPlan(tuple(layers), softcap=None, eps=1e-6, tied_head=True, bidirectional=False, **sizes)
    return PagedKVCache(plan, dict.fromkeys(map(group_of, windows), PoolSize(pages, tokens)), torch.float64)


def make_cache(pool: PagedKVCache, pages: int = PAGES) -> PrefixCache:
    return PrefixCache(pool, dict.fromkeys(pool.allocators, pages))


def number(ids: Ids, adapter: str | None = None) -> int:
    """Name a beginning of at most 20 ids below 4, and the adapter, by one number."""
    return (adapter is not None) * 5**21 + sum((token + 1) * 5**place for place, token in enumerate(ids))


def write(table: BlockTable, ids: Ids, adapter: str | None = None) -> None:
    """Reserve and write the rows of the ids that a table lacks: one key a position, named by all ids up to it."""
    table.reserve(len(ids) - table.length)
    for layer, group in enumerate(table.cache.windows):
        named = [number(ids[: position + 1], adapter) for position in range(table.length, len(ids))]
        if not named:
            continue
        keys = torch.tensor(named, dtype=torch.float64)
        k_NKE = keys[:, None, None].expand(-1, 1, 2)
        table.cache.write(layer, torch.tensor(table.slot_mapping(group)), k_NKE, k_NKE)


def extend(table: BlockTable, ids: Ids) -> BlockTable:
    """Compute the ids that a table lacks."""
    write(table, ids)
    table.commit(table.reserved)
    return table


def assert_holds(table: BlockTable, ids: Ids, adapter: str | None = None) -> None:
    """See that a table shows the keys of `ids` wherever its next query looks."""
    for layer, (group, window) in enumerate(table.cache.windows.items()):
        span = table.kv_range(group)
        oldest = 0 if window is None else max(0, table.length + 1 - window)
        if oldest >= table.length:
            continue
        keys, _ = table.cache.read(layer, span)
        expected = [number(ids[: position + 1], adapter) for position in range(oldest, table.length)]
        assert keys[oldest - span.start : table.length - span.start, 0, 0].tolist() == expected


def compute(cache: PrefixCache, ids: Ids, chunk: int, stop: int | None = None) -> BlockTable:
    """Compute ids as the engine does, a chunk a step; `stop` leaves the prompt there."""
    table = cache.find(ids) or BlockTable(cache.pool)
    while table.length < len(ids) and table.length != stop:
        since = table.length
        end = min(since + chunk, len(ids) if stop is None else stop)
        write(table, ids[:end])
        cache.keep(ids, table, since=since, computed=end, is_end=end == len(ids))
        table.commit(table.reserved)
    return table


def keep(cache: PrefixCache, pool: PagedKVCache, ids: Ids) -> None:
    """Compute ids in a table of their own, keep it, and let the table go."""
    table = extend(BlockTable(pool), ids)
    cache.keep(ids, table)
    table.release()


def reused(cache: PrefixCache, ids: Ids) -> int:
    """Count the positions that a prompt is spared."""
    expected = cache.usable(ids)
    table = cache.find(ids)
    length = 0 if table is None else table.length
    if table is not None:
        assert_holds(table, ids)
        table.release()
    assert length == expected
    return length


def free_pages(pool: PagedKVCache) -> list[int]:
    return [book.free for book in pool.allocators.values()]


def assert_all_goes(cache: PrefixCache) -> None:
    """See that evicting everything gives every page back."""
    while cache.evict():
        pass
    assert free_pages(cache.pool) == [len(book.ref_counts) for book in cache.pool.allocators.values()]
    assert not any(cache.held.values())
    assert not cache.nbytes


# ---- what is reused ----

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    kept=st.lists(PROMPTS, max_size=6),
    prompts=st.lists(PROMPTS, min_size=1, max_size=4),
    tokens=st.integers(1, 4),
    window=st.none() | st.integers(2, 8),
)
def test_a_prompt_is_spared_what_any_earlier_one_can_spare_it(
    kept: list[Ids], prompts: list[Ids], tokens: int, window: int | None
) -> None:
    pool = make_pool(tokens, window, pages=200)
    cache = make_cache(pool, pages=200)
    for ids in kept:
        keep(cache, pool, ids)

    def usable(point: Ids, length: int) -> bool:
        """Return whether the page of the first position that the query at `length` sees was still held at the end."""
        return window is None or max(0, len(point) - window + 1) // tokens <= max(0, length - window + 1) // tokens

    for ids in prompts:
        lengths = [(point, min(common_length(point, ids), len(ids) - 1)) for point in kept]
        most = max((length for _, length in lengths), default=0)
        assert max((length for point, length in lengths if usable(point, length)), default=0) <= reused(cache, ids) <= most
    assert_all_goes(cache)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_a_hit_at_any_depth_computes_at_most_one_window_again(chunk: int) -> None:
    ids = (1, 2, 3, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 2, 1, 2, 3, 1, 3, 2)
    for window in (1, 3, 4, 6):
        for tokens in (1, 2, 4):
            cache = make_cache(make_pool(tokens, window, pages=200), pages=200)
            compute(cache, ids, chunk).release()
            spacing = -(-window // tokens) * tokens
            for depth in range(1, len(ids) + 1):
                other = (*ids[:depth], 3 - ids[depth] if depth < len(ids) else 0, 1, 1)[:20]
                shared = min(common_length(ids, other), len(other) - 1)
                assert shared - reused(cache, other) <= spacing, (window, tokens, depth)
            assert_all_goes(cache)


def test_the_last_token_is_always_computed_anew() -> None:
    pool = make_pool()
    cache = make_cache(pool)
    keep(cache, pool, (1, 2, 3, 0))
    assert reused(cache, (1, 2, 3, 0)) == 3
    assert reused(cache, (1, 2, 3, 0, 0)) == 4
    assert reused(cache, (1, 2)) == 1
    assert reused(cache, (1,)) == 0
    assert reused(cache, (2, 2, 3)) == 0


def test_windows_are_kept_where_two_prompts_part_once_the_second_gets_there() -> None:
    pool = make_pool(tokens=2, window=4)
    cache = make_cache(pool)
    keep(cache, pool, (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1))  # whose windows at 7 are gone
    prompt = (1, 1, 1, 1, 1, 1, 1, 2, 2, 2)
    assert reused(cache, prompt) == 0
    compute(cache, prompt, chunk=3).release()
    assert reused(cache, (*prompt[:7], 3, 3)) >= 6  # the page's beginning
    assert_all_goes(cache)


def test_windows_are_kept_where_somebody_asks_for_them() -> None:
    cache = make_cache(make_pool(tokens=2, window=12))
    ids = (1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0)
    table = extend(BlockTable(cache.pool), ids[:3])
    cache.ask(table, 2)  # which has gone by
    cache.ask(table, 6)
    since = table.length
    write(table, ids[:8])
    cache.keep(ids, table, since=since, computed=8, is_end=False)
    table.commit(5)
    assert reused(cache, (*ids[:6], 3, 3)) == 6
    table.release()
    assert_all_goes(cache)


def test_a_found_table_and_the_tree_go_separate_ways() -> None:
    pool = make_pool(tokens=4, window=6)
    cache = make_cache(pool)
    keep(cache, pool, (1, 2, 3, 1, 2, 3))
    found = cache.find((1, 2, 3, 1, 2, 0))
    assert found is not None
    extend(found, (1, 2, 3, 1, 2, 0, 0, 0, 0))  # writes into the page that it shares
    assert_holds(found, (1, 2, 3, 1, 2, 0, 0, 0, 0))
    assert reused(cache, (1, 2, 3, 1, 2, 3, 3)) == 6
    while cache.evict():
        pass
    assert_holds(found, (1, 2, 3, 1, 2, 0, 0, 0, 0))
    found.release()
    assert_all_goes(cache)


def test_a_kept_table_may_go_on() -> None:
    pool = make_pool(tokens=4, window=6)
    cache = make_cache(pool)
    table = extend(BlockTable(pool), (1, 2, 3))
    cache.keep((1, 2, 3), table)
    extend(table, (1, 2, 3, 0, 0))
    assert reused(cache, (1, 2, 3, 1)) == 3
    assert_holds(table, (1, 2, 3, 0, 0))


def test_adapters_and_salts_share_nothing() -> None:
    pool = make_pool()
    cache = make_cache(pool)
    for adapter, salt in ((None, None), ("a", None), (None, "s"), ("a", "s")):
        assert not cache.usable((1, 2, 3, 0), adapter, salt)
        table = extend(BlockTable(pool), (1, 2, 3))
        cache.keep((1, 2, 3), table, adapter, salt)
        table.release()
        assert cache.usable((1, 2, 3, 0), adapter, salt) == 3
    cache.drop("a")
    assert [cache.usable((1, 2, 3, 0), *space) for space in ((None, None), ("a", None), (None, "s"), ("a", "s"))] == [3, 0, 3, 0]
    assert_all_goes(cache)


# ---- what is let go ----


def test_the_longest_unused_goes_first_and_leaves_before_what_they_stand_on() -> None:
    pool = make_pool(tokens=2)
    cache = make_cache(pool, pages=6)
    keep(cache, pool, (1, 1, 1, 1, 1, 1))  # 3 pages
    keep(cache, pool, (2, 2, 2, 2))  # 2 pages
    assert reused(cache, (1, 1, 1, 1, 1, 1, 0)) == 6
    keep(cache, pool, (3, 3, 3, 3))  # takes the free one, and the last of the second
    assert [reused(cache, (token,) * 7) for token in (1, 2, 3)] == [6, 2, 4]
    keep(cache, pool, (0, 0, 0))  # takes two of the first, which was used before the others just now
    assert [reused(cache, (token,) * 7) for token in (1, 2, 3, 0)] == [2, 2, 4, 3]


def test_what_a_page_holds_beyond_the_snapshots_that_are_left_is_reused() -> None:
    """Of two prompts that end in one page the longer one's windows are let go: its rows of that page are still there."""
    pool = make_pool(tokens=8, window=6)
    cache, (_, sliding) = make_cache(pool), pool.allocators
    ids = tuple(each % 4 for each in range(15))
    keep(cache, pool, ids[:12])
    keep(cache, pool, ids)
    assert reused(cache, (*ids[:12], 0)) == 12  # which is now the more recently used end
    assert cache.evict(sliding)
    assert [snapshot.end for snapshot in cache._snapshots] == [12]
    assert reused(cache, (*ids, 0)) == 15
    assert reused(cache, ids[:14]) == 13
    assert_all_goes(cache)


def test_nothing_that_a_sequence_holds_is_taken_away() -> None:
    pool = make_pool(tokens=2)
    cache = make_cache(pool, pages=3)
    keep(cache, pool, (1, 1, 1, 1, 1, 1))
    holder = cache.find((1, 1, 1, 1, 1, 1, 0))
    keep(cache, pool, (2, 2, 2, 2))
    assert [reused(cache, (token,) * 7) for token in (1, 2)] == [6, 0]
    assert holder is not None
    holder.release()
    keep(cache, pool, (2, 2, 2, 2))
    assert [reused(cache, (token,) * 7) for token in (1, 2)] == [2, 4]


def test_windows_inside_prompts_go_before_those_at_their_ends() -> None:
    cache = make_cache(make_pool(tokens=2, window=4))
    short, long = (2, 2, 2, 2, 2, 2), (1, 2, 3, 0) * 5
    cache.capacity[group_of(4)] = 10
    compute(cache, short, chunk=2).release()
    compute(cache, long, chunk=4).release()
    assert reused(cache, (*long, 1)[:20]) == 19
    assert reused(cache, (*short, 1)) == 6
    assert cache.held[group_of(4)] <= 10


@pytest.mark.parametrize("windows", [2, 5, 9, 20])
def test_a_short_budget_thins_windows_out_evenly(windows: int) -> None:
    """Those of an older prompt go first; of a prompt's own every other one."""
    pool = make_pool(tokens=2, window=4, pages=400)
    cache = make_cache(pool, pages=400)
    cache.capacity[group_of(4)] = 3 * (windows + 1)  # which is what each takes that has no neighbour, and the last one
    older, ids = ((first, *(index * index % 7 % 4 for index in range(255))) for first in (1, 2))
    for each in (older, ids):
        table = BlockTable(pool)
        for end in range(8, 257, 8):
            table.reserve(8)
            cache.keep(each, table, since=end - 8, computed=end, is_end=end == 256)
            table.commit(8)
        table.release()
    lengths = [cache.usable((*ids[:depth], 9)) for depth in range(256)]
    gaps = [depth - length for depth, length in enumerate(lengths)]
    fair = 256 / windows
    assert max(gaps) <= 2 * fair + 4
    assert len(set(lengths)) > windows / 2
    assert cache.held[group_of(4)] <= 3 * (windows + 1)
    assert_all_goes(cache)


def test_nothing_is_kept_without_capacity_or_ids() -> None:
    pool = make_pool(pages=10)
    none, some = make_cache(pool, 0), make_cache(pool)
    keep(none, pool, (1, 2))
    some.keep((), BlockTable(pool))
    assert not none.is_on
    assert not none.nbytes
    assert not some.nbytes
    assert free_pages(pool) == [10]


def test_a_chunk_costs_no_more_the_longer_its_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts how often a page of ids is compared: once a page, however many chunks there are, and looks at one window."""
    compared, walked = list[int](), list[int]()
    monkeypatch.setattr("gemcutter.cache.prefix_cache._is_beginning", lambda a, b: (compared.append(1), a[: len(b)] == b)[1])
    cache = make_cache(make_pool(tokens=2, window=4, pages=2000), pages=2000)
    real = cache._tail
    monkeypatch.setattr(cache, "_tail", lambda *each: (found := real(*each), walked.append(len(found)))[0])
    ids = tuple(index * 7 % 4 for index in range(600))
    table = BlockTable(cache.pool)
    for end in range(4, 601, 4):
        table.reserve(4)
        cache.keep(ids, table, since=end - 4, computed=end, is_end=end == 600)
        table.commit(4)
    assert len(compared) <= 300
    assert max(walked) <= 5
    table.release()
    assert_all_goes(cache)


# ---- its books, whatever happens ----


class Uses(RuleBasedStateMachine):
    """Sequences that start from the tree, grow chunk by chunk, go on with replies, stop anywhere, and lack pages."""

    @initialize(
        tokens=st.integers(1, 4), window=st.none() | st.integers(1, 7), pages=st.integers(6, 40), capacity=st.integers(1, 20)
    )
    def start(self, tokens: int, window: int | None, pages: int, capacity: int) -> None:
        self.pool = make_pool(tokens, window, pages)
        self.cache = make_cache(self.pool, min(capacity, pages))
        self.running: list[tuple[BlockTable, Ids, str | None]] = []

    @precondition(lambda self: len(self.running) < 3)
    @rule(ids=PROMPTS, adapter=st.sampled_from((None, None, "a")))
    def enter(self, ids: Ids, adapter: str | None) -> None:
        expected = self.cache.usable(ids, adapter)
        table = self.cache.find(ids, adapter)
        assert (0 if table is None else table.length) == expected
        if table is not None:
            assert_holds(table, ids, adapter)
        self.running.append((table or BlockTable(self.pool), ids, adapter))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 2), rows=st.integers(1, 8), accepted=st.integers(0, 8))
    def step(self, which: int, rows: int, accepted: int) -> None:
        table, ids, adapter = self.running[which % len(self.running)]
        since, end = table.length, min(table.length + rows, len(ids))
        while (short := table.shortage(end - since)) is not None:
            if not self.cache.evict(short):
                return  # the others hold the pages
        write(table, ids[:end], adapter)
        self.cache.keep(ids, table, adapter, since=since, computed=end, is_end=end == len(ids))
        table.commit(table.reserved)
        assert_holds(table, ids, adapter)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 2), at=st.integers(1, 20))
    def ask(self, which: int, at: int) -> None:
        self.cache.ask(self.running[which % len(self.running)][0], at)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 2), reply=st.lists(st.integers(0, 1), max_size=6).map(tuple))
    def answer(self, which: int, reply: Ids) -> None:
        """Let a prompt that is computed grow by a reply, whose rows nobody keeps before its end."""
        index = which % len(self.running)
        table, ids, adapter = self.running[index]
        longer = (*ids, *reply)[:20]
        if table.length == len(ids) and table.shortage(len(longer) - len(ids)) is None:
            write(table, longer, adapter)
            table.commit(table.reserved)
            self.running[index] = (table, longer, adapter)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 2), keeps=st.booleans())
    def leave(self, which: int, keeps: bool) -> None:
        table, ids, adapter = self.running.pop(which % len(self.running))
        if keeps:
            self.cache.keep(ids[: table.length], table, adapter)
        table.release()

    @rule(windowed=st.booleans())
    def evict(self, windowed: bool) -> None:
        groups = [group for group, window in self.pool.windows.items() if (window is not None) == windowed]
        self.cache.evict(groups[0] if groups else None)

    @precondition(lambda self: not any(adapter for _, _, adapter in self.running))
    @rule()
    def drop(self) -> None:
        self.cache.drop("a")
        assert not self.cache.usable((1,) * 8, "a")

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "cache"):
            assert_books(self.cache, [table for table, _, _ in self.running])

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for table, _, _ in self.running:
                table.release()
            assert_all_goes(self.cache)


Uses.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=120, stateful_step_count=40)
TestUses = Uses.TestCase


def assert_books(cache: PrefixCache, tables: list[BlockTable]) -> None:
    """See that pages are counted by who holds them, and that the tree is one."""
    nodes = list(all_nodes(cache))
    for group, book in cache.pool.allocators.items():
        of_tree = Counter(node.pages[group] for node in nodes if group in node.pages)
        of_tree += Counter(node.windows[group].page for node in nodes if group in node.windows)
        held = of_tree + Counter(page for table in tables for page in table.pages(group)[1])
        assert book.ref_counts == [held[page] for page in range(len(book.ref_counts))], group
        assert book.free == sum(count == 0 for count in book.ref_counts)
        assert cache.held[group] == of_tree.total() <= cache.capacity[group]
    assert set(cache._leaves) == {node for node in nodes if not node.children}
    assert all(root.children for root in cache._roots.values()), "an empty root stays"
    found = set[Any]()
    for node in nodes:
        assert not node.is_gone
        assert 0 < len(node.ids) <= cache.page_tokens
        assert len(node.ids) == cache.page_tokens or not node.children, "a page ends in the middle of a prefix"
        for each in node.windows.values():
            assert each.holders, "a window that nobody needs"
            assert 0 < each.filled <= len(node.ids)
        for end, snapshot in node.snapshots.items():
            assert (snapshot.end, snapshot.last) == (end, node)
            assert all(snapshot in each.windows[group].holders for group, each in snapshot.pages)
            found.add(snapshot)
    assert found == set(cache._snapshots)


def all_nodes(cache: PrefixCache) -> Iterator[PageNode]:
    stack = list(cache._roots.values())
    while stack:
        children = [child for same in stack.pop().children.values() for child in same]
        yield from children
        stack += children


# ---- how much it may hold ----


def bytes_of(plan: ModelPlan, pages: dict[GroupId, int]) -> int:
    groups = {group.id: group for group in plan.groups()}
    elements = {id: sum(plan.layers[layer].kv_elements(False) for layer in group.layers) for id, group in groups.items()}
    return sum(elements[id] * 64 * 2 * count for id, count in pages.items())


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_a_budget_is_kept_and_used(size: str) -> None:
    plan = plan_of(SIZES[size])
    context, usual = 4096, prefix_pages(plan_of(SIZES[size]), 4096, 4, None, 2)
    assert prefix_pages(plan, context, 4, 0, 2) == dict.fromkeys(usual, 0)
    assert all(usual[group.id] >= 4096 // 64 for group in plan.groups() if group.window is None)
    for nbytes in (bytes_of(plan, usual) // 2, bytes_of(plan, usual), 3 * bytes_of(plan, usual)):
        found = prefix_pages(plan, context, 4, nbytes, 2)
        assert 0.9 * nbytes <= bytes_of(plan, found) <= nbytes
    with pytest.raises(RequestError, match=r"prefix_cache_bytes: 1 bytes hold no prefix .* give \d+ or more, or 0"):
        prefix_pages(plan, context, 4, 1, 2)
