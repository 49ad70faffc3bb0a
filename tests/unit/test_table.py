"""Block tables under random programs: admission, chunks, rejection, forks, rewinds, copy on write, release.

A `World` runs the real tables beside the plainest model of them, a list of numbers a sequence: every position written gets a
number of its own, and before every step all slots that no sequence holds are filled with NaN. What a query sees must be its
history and nothing else. Knows nothing of decoders. Read `test_scheduler.py` for the same promises with a model on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PageAllocator, PagedKVCache, PoolSize
from gemcutter.engine.memory import most_pages, page_counts
from gemcutter.errors import CapacityError
from gemcutter.ops.step import KVRange
from gemcutter.plan import Attn, LayerPlan, ModelPlan, Proj, RopeSpec, group_of

stable = settings(derandomize=True, deadline=None, max_examples=150)


def make_plan(windows: Sequence[int | None]) -> ModelPlan:
    """Make a plan with two writers a window and a reader of the last one."""

    def layer(index: int, window: int | None, kv_layer: int) -> LayerPlan:
        attn, proj = Attn.GLOBAL if window is None else Attn.SLIDING, Proj.QKV if index == kv_layer else Proj.Q_ONLY
        return LayerPlan(index, attn, proj, kv_layer, "self", 1, 1, 2, window, RopeSpec(1e4, 2, 1), 4, None, 0)

    order = [window for window in windows for _ in range(2)]
    layers = [layer(index, window, index) for index, window in enumerate(order)]
    layers.append(layer(len(order), order[-1], len(order) - 1))
    sizes = {"hidden": 4, "vocab": 8, "context": 1000, "ple_vocab": 0, "ple_dim": 0, "pad_id": 0}
    return ModelPlan(tuple(layers), softcap=None, eps=1e-6, tied_head=True, bidirectional=False, **sizes)


def make_pool(counts: dict[int | None, PoolSize]) -> PagedKVCache:
    """Make a pool whose every slot is poisoned."""
    pool = PagedKVCache(make_plan(list(counts)), {group_of(window): size for window, size in counts.items()}, torch.float64)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.fill_(torch.nan)
    return pool


def slots_of(span: KVRange) -> list[int]:
    """List the slots of a span, position by position."""
    return list(range(span.where.start, span.where.stop)) if isinstance(span.where, slice) else span.where.tolist()


def held(table: BlockTable, window: int | None) -> list[int]:
    """List the pages that a table holds in one group."""
    if table.length + table.reserved == 0:
        return []
    tokens = table.cache.allocators[group_of(window)].tokens
    return list(dict.fromkeys(slot // tokens for slot in slots_of(table.kv_range(group_of(window)))))


def oldest_visible(window: int | None, position: int) -> int:
    """Return the first position that the query at `position` sees."""
    return 0 if window is None else max(0, position + 1 - window)


@dataclass
class Tenant:
    """A table, and the numbers that its positions hold."""

    table: BlockTable
    history: list[int] = field(default_factory=list)


class World:
    """Tenants of one pool, stepped and checked together."""

    def __init__(self, counts: dict[int | None, PoolSize]) -> None:
        self.pool, self.windows = make_pool(counts), list(counts)
        self.plan = make_plan(self.windows)
        self.tenants: list[Tenant] = []
        self.numbers = count(1)

    def admit(self) -> None:
        self.tenants.append(Tenant(BlockTable(self.pool)))

    def fork(self, which: int, cut: int) -> None:
        """Fork a tenant where `cut` says if its windows are still there, else where it stands."""
        if not self.tenants:
            self.admit()
        tenant = self.tenants[which % len(self.tenants)]
        length = len(tenant.history) - cut % (len(tenant.history) + 1)
        complete = all(tenant.table.kv_range(group_of(window)).start <= oldest_visible(window, length) for window in self.windows)
        assert tenant.table.can_rewind(length) is complete
        if not tenant.table.can_rewind(length):
            length = len(tenant.history)
        before = [list(self.pool.allocators[group_of(window)].ref_counts) for window in self.windows]
        self.tenants.append(Tenant(tenant.table.fork(length), tenant.history[:length]))
        free = [[page for page, holders in enumerate(group) if not holders] for group in before]
        assert free == [[p for p, h in enumerate(self.pool.allocators[group_of(w)].ref_counts) if not h] for w in self.windows]

    def release(self, which: int) -> None:
        if self.tenants:
            self.tenants.pop(which % len(self.tenants)).table.release()

    def step(self, picks: list[tuple[int, int, int]]) -> None:
        """Step several tenants at once; each pick is (tenant, rows, accepted rows)."""
        works: dict[int, tuple[list[int], int]] = {}
        if not self.tenants:
            self.admit()
        for which, rows, accepted in picks:
            index = which % len(self.tenants)
            if index not in works and self._reserve(self.tenants[index].table, rows):
                works[index] = ([next(self.numbers) for _ in range(rows)], min(rows, accepted))
        self._poison()
        for index, (numbers, _) in works.items():
            self._write(self.tenants[index].table, numbers)
        for index, (numbers, _) in works.items():
            self._check_rows(self.tenants[index], numbers)
        for index, (numbers, accepted) in works.items():
            self.tenants[index].table.commit(accepted)
            self.tenants[index].history += numbers[:accepted]

    def _reserve(self, table: BlockTable, rows: int) -> bool:
        """Reserve rows; if that fails, see that nothing was taken."""
        before = {
            window: (list(self.pool.allocators[group_of(window)].ref_counts), held(table, window)) for window in self.windows
        }
        try:
            table.reserve(rows)
        except CapacityError:
            assert before == {
                window: (self.pool.allocators[group_of(window)].ref_counts, held(table, window)) for window in self.windows
            }
            assert table.reserved == 0
            return False
        for window in self.windows:
            tokens = self.pool.allocators[group_of(window)].tokens
            if window is not None:
                assert len(held(table, window)) <= -(-(window - 1 + rows) // tokens) + 1
            # what is about to be written belongs to this table alone
            assert {
                self.pool.allocators[group_of(window)].ref_counts[slot // tokens] for slot in table.slot_mapping(group_of(window))
            } == {1}
        return True

    def _poison(self) -> None:
        """Fill every slot with NaN but those of the positions that some tenant holds."""
        for layer in self.plan.writers:
            wanted = torch.zeros(len(self.pool.keys[layer.index]), dtype=torch.bool)
            for tenant in self.tenants:
                if held(tenant.table, layer.window):
                    span = tenant.table.kv_range(layer.group)
                    wanted[slots_of(span)[: len(tenant.history) - span.start]] = True
            self.pool.keys[layer.index][~wanted] = torch.nan
            self.pool.values[layer.index][~wanted] = torch.nan

    def _write(self, table: BlockTable, numbers: list[int]) -> None:
        for layer in self.plan.writers:
            k_NKE = (torch.tensor(numbers, dtype=torch.float64) + layer.index / 16)[:, None, None].expand(-1, 1, 2)
            self.pool.write(layer.index, torch.tensor(table.slot_mapping(layer.group)), k_NKE, -k_NKE)

    def _check_rows(self, tenant: Tenant, numbers: list[int]) -> None:
        """See that every row sees its history in every layer, the readers included."""
        history, first = tenant.history + numbers, len(tenant.history)
        for layer in self.plan.layers:
            span = tenant.table.kv_range(layer.group)
            keys, values = self.pool.read(layer.kv_layer, span)
            assert len(keys) == len(history) - span.start
            for position in range(first, len(history)):
                oldest = oldest_visible(layer.window, position)
                assert oldest >= span.start
                seen = slice(oldest - span.start, position + 1 - span.start)
                expected = [number + layer.kv_layer / 16 for number in history[oldest : position + 1]]
                assert keys[seen, 0, 1].tolist() == expected
                assert (-values[seen, 0, 0]).tolist() == expected

    def check_books(self) -> None:
        """See that every page is counted once for each tenant that holds it, and is free if none does."""
        for window in self.windows:
            book = self.pool.allocators[group_of(window)]
            owners = Counter(page for tenant in self.tenants for page in held(tenant.table, window))
            assert book.ref_counts == [owners[page] for page in range(len(book.ref_counts))]
            assert book.free == book.ref_counts.count(0)


INDEX = st.integers(0, 40)
PICKS = st.lists(st.tuples(INDEX, st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4)
STEP = st.builds(partial, st.just(World.step), picks=PICKS)
FORK = st.builds(partial, st.just(World.fork), which=INDEX, cut=INDEX)
RELEASE = st.builds(partial, st.just(World.release), which=INDEX)
PROGRAMS: st.SearchStrategy[list[Callable[[World], None]]] = st.lists(
    st.one_of(st.just(World.admit), STEP, STEP, STEP, STEP, FORK, FORK, RELEASE), min_size=10, max_size=40
)
WINDOWS = st.lists(st.none() | st.integers(1, 13), min_size=1, max_size=3, unique=True)
PAGE_COUNTS = st.builds(PoolSize, pages=st.integers(2, 24), tokens=st.integers(1, 5))


@stable
@given(WINDOWS.flatmap(lambda windows: st.fixed_dictionaries(dict.fromkeys(windows, PAGE_COUNTS))), PROGRAMS)
def test_every_query_sees_its_history(counts: dict[int | None, PoolSize], program: list[Callable[[World], None]]) -> None:
    world = World(counts)
    world.admit()
    for operation in program:
        operation(world)
        world.check_books()
    while world.tenants:
        world.release(0)
    world.check_books()
    assert {group: book.free for group, book in world.pool.allocators.items()} == {
        group_of(w): count.pages for w, count in counts.items()
    }


@pytest.mark.parametrize("accepted", range(5))
@pytest.mark.parametrize("cut", range(6))
def test_twins_of_a_shared_page_part_when_either_writes(cut: int, accepted: int) -> None:
    world = World({None: PoolSize(12, 4), 5: PoolSize(12, 3)})
    world.admit()
    world.step([(0, 7, 7)])
    world.fork(0, cut)
    for _ in range(3):
        world.step([(0, 4, accepted), (1, 4, 4 - accepted)])
        world.check_books()


def test_a_failed_reserve_takes_nothing_from_any_group() -> None:
    for scarce in (None, 4):
        counts = {window: PoolSize(2 if window == scarce else 50, 2) for window in (None, 4)}
        pool = make_pool(counts)
        table = BlockTable(pool)
        table.reserve(3)
        table.commit(3)
        with pytest.raises(CapacityError, match="0 free pages, 1 are needed"):
            table.reserve(2)
        assert [book.free for book in pool.allocators.values()] == [
            counts[pool.windows[group]].pages - 2 for group in pool.allocators
        ]
        table.reserve(1)  # the last page still has room
        assert table.slot_mapping(group_of(scarce)) == [3]


def test_a_copy_on_write_that_does_not_fit_takes_nothing() -> None:
    pool = make_pool({None: PoolSize(2, 4)})
    table = BlockTable(pool)
    table.reserve(3)
    table.commit(3)
    twin, third = table.fork(), table.fork()
    table.reserve(1)  # copies the page of three holders into the last free one
    with pytest.raises(CapacityError):
        twin.reserve(1)
    assert pool.allocators[group_of(None)].ref_counts == [2, 1]
    third.release()
    twin.reserve(1)  # the page is the twin's own now
    assert pool.allocators[group_of(None)].ref_counts == [1, 1]


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_a_window_holds_few_pages_whatever_the_length(window: int, tokens: int) -> None:
    pool = make_pool({window: PoolSize(200, tokens)})
    table = BlockTable(pool)
    for step in range(60):
        rows = (step * 7) % 11 + 1
        table.reserve(rows)
        assert len(held(table, window)) <= -(-(window - 1 + rows) // tokens) + 1
        table.commit(rows)
        assert (
            len(pool.allocators[group_of(window)].ref_counts) - pool.allocators[group_of(window)].free
            <= -(-(window - 1) // tokens) + 1
        )
    assert table.length > 300


def test_rejected_rows_leave_the_window_of_the_next_query() -> None:
    world = World({6: PoolSize(8, 2)})
    world.admit()
    world.step([(0, 9, 9)])
    for accepted in (0, 0, 1, 0):
        world.step([(0, 9, accepted)])
    assert world.tenants[0].table.length == 10


@stable
@given(
    window=st.integers(1, 13),
    context=st.integers(1, 60),
    rows=st.integers(1, 12),
    sequences=st.integers(1, 4),
    page_tokens=st.integers(1, 5),
    chunks=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.booleans()), max_size=60),
)
def test_page_counts_suffice_at_any_alignment(
    window: int, context: int, rows: int, sequences: int, page_tokens: int, chunks: list[tuple[int, int, bool]]
) -> None:
    plan = make_plan([None, window])
    pool = PagedKVCache(plan, page_counts(plan, context, rows, sequences, page_tokens=page_tokens), torch.float32)
    tables = [BlockTable(pool) for _ in range(sequences)]
    for which, chunk, accept in chunks:  # ragged beginnings, some rows rejected
        table = tables[which % sequences]
        chunk = min(chunk, rows, context - table.length)
        table.reserve(chunk)
        table.commit(chunk if accept else chunk // 2)
    while any(table.length < context for table in tables):  # then every sequence goes to its end, all rows in flight at once
        for table in tables:
            table.reserve(min(rows, context - table.length))
        for table in tables:
            table.commit(table.reserved)


def test_a_lone_sequence_reads_views() -> None:
    pool = make_pool({None: PoolSize(20, 3)})
    table = BlockTable(pool)
    for rows in (7, 1, 1, 12):
        table.reserve(rows)
        keys, values = pool.read(0, table.kv_range(group_of(None)))
        assert keys.untyped_storage().data_ptr() == pool.keys[0].untyped_storage().data_ptr()
        assert values.untyped_storage().data_ptr() == pool.values[0].untyped_storage().data_ptr()
        table.commit(rows)


def test_a_growing_sequence_stays_a_view_when_lower_pages_come_free() -> None:
    pool = make_pool({None: PoolSize(9, 2)})
    early, late = BlockTable(pool), BlockTable(pool)
    for table in (early, late):
        table.reserve(4)
        table.commit(4)
    early.release()
    late.reserve(3)
    assert late.kv_range(group_of(None)).where == slice(4, 11)


def test_a_released_table_is_as_good_as_new() -> None:
    pool = make_pool({None: PoolSize(3, 2), 3: PoolSize(4, 2)})
    table = BlockTable(pool)
    for _ in range(5):
        table.reserve(6)
        table.commit(6)
        table.release()
        table.release()  # an empty table has nothing to give
        assert table.length == 0
    assert [book.free for book in pool.allocators.values()] == [3, 4]


def test_pool_stores_what_the_plan_says() -> None:
    plan = make_plan([None, 8])
    pool = PagedKVCache(plan, {group_of(None): PoolSize(16, 4), group_of(8): PoolSize(2, 4)}, torch.bfloat16)
    assert pool.keys.keys() == pool.values.keys() == {0, 1, 2, 3}  # the reader, layer 4, stores nothing
    assert pool.nbytes == plan.kv_bytes(64)


def test_the_book_does_not_grow_with_use() -> None:
    book = PageAllocator(PoolSize(8, 4))
    for _ in range(1000):
        first = book.take(None)
        second = book.take(first)
        assert second == first + 1
        book.drop(first)
        book.drop(second)
    assert book.free == 8
    assert len(book._lowest) <= 17


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9, 13])
@pytest.mark.parametrize("size", [2, 4, 5])
def test_rows_ahead_keep_their_slots_until_they_are_committed_or_forgotten(window: int, size: int) -> None:
    """A step is launched before the one before it is done: never more pages than a decode row may hold, and all come back."""
    plan = make_plan([window, None])
    most = most_pages(plan, 60, 1, size)
    pool = make_pool({each: PoolSize(80, size) for each in (window, None)})
    table, other = BlockTable(pool), BlockTable(pool)
    table.reserve(7)
    table.commit(7)
    table.reserve(1)
    while table.length < 57:
        table.reserve(2)
        expected = {each: table.slot_mapping(each) for each in most}
        assert all(len(table.pages(each)[1]) <= pages for each, pages in most.items())
        table.commit(1, ahead=1)
        other.reserve(1)  # somebody else takes pages between the two
        other.commit(1)
        assert {each: table.slot_mapping(each) for each in most} == {each: slots[1:] for each, slots in expected.items()}
    length = table.length
    table.reserve(2)
    table.commit(0)
    assert (table.length, table.reserved) == (length, 0)
    assert len(held(table, None)) == -(-length // size)
    table.release()
    other.release()
    assert all(book.free == len(book.ref_counts) for book in pool.allocators.values())
