"""Reuse of what earlier requests computed: a radix tree of pages over token ids, with windows kept at boundaries.

A node is one page of tokens below the pages before it. It holds that page of every global group, so that a prompt that begins as
an earlier one did shares pages to the token where the two part. Rows after such a hit also see the keys of the last window in
every sliding layer, which only rows of the whole prefix can make again: a snapshot holds these pages for one boundary, and
without one a prefix is of no use. Snapshots are taken at the ends of prompts and replies, where two prompts part, and inside long
prompts once a window (checkpoints), so that a hit at any depth computes at most one window again while the budget lasts. When it
is short, checkpoints go first: those of older prompts, then every other one, so that the others lie twice as far apart.

Nodes go leaf first, the longest unused before others; no page is taken away while a sequence holds it. Refuses to know text and
requests; ids only. Read `block_table.py` for how pages are shared, `engine/memory.py` for how many there may be.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from gemcutter.cache.block_table import BlockTable, PageRun
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.plan import GroupId


@dataclass(eq=False, slots=True)
class Snapshot:
    """The windows at one boundary: the pages of sliding groups that the row at position `end` sees, and one page before them."""

    end: int
    last: PageNode
    is_checkpoint: bool  # inside a prompt, and not asked for yet
    used: int
    pages: list[tuple[GroupId, PageNode]]


@dataclass(eq=False, slots=True)
class WindowPage:
    """A page of a sliding group whose first `filled` positions hold a node's tokens, and the snapshots that need it."""

    page: int
    filled: int
    holders: dict[Snapshot, None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class PageNode:
    """The tokens of one page, and where their keys and values lie; fewer than a page holds only at a leaf. A root has none."""

    ids: tuple[int, ...]
    parent: PageNode | None
    space: Hashable
    used: int = 0
    pages: dict[GroupId, int] = field(default_factory=dict)  # of global groups
    windows: dict[GroupId, WindowPage] = field(default_factory=dict)  # of sliding groups
    children: dict[int, list[PageNode]] = field(default_factory=dict)  # by their first id
    snapshots: dict[int, Snapshot] = field(default_factory=dict)  # those that end here, by their end
    is_gone: bool = False  # was evicted


@dataclass(eq=False, slots=True)
class Mark:
    """What is known of a table: how many of its whole pages stand in the tree, the last of these, and what is asked of it."""

    pages: int = 0
    node: PageNode | None = None
    born: int = 0  # the clock when it was first seen
    boundaries: set[int] = field(default_factory=set)  # positions whose windows are to be kept once they are computed


class PrefixCache:
    """Prefixes in a pool, in no more pages of each group than `capacity` allows; without any, none is kept.

    A space tells apart what was computed otherwise though ids are equal: the adapter, and a salt that tenants do not share.
    """

    def __init__(self, pool: PagedKVCache, capacity: Mapping[GroupId, int]) -> None:
        self.pool, self.capacity = pool, dict(capacity)
        self.page_tokens = next((book.tokens for book in pool.allocators.values()), 1)
        self.held = dict.fromkeys(pool.allocators, 0)  # pages, by group
        self._windows = {group: window for group, window in pool.windows.items() if window is not None}
        self._globals = [group for group in pool.windows if group not in self._windows]
        longest = max(self._windows.values(), default=0)
        self._spacing = -(-longest // self.page_tokens) * self.page_tokens  # between checkpoints
        self._roots: dict[Hashable, PageNode] = {}
        self._leaves = OrderedDict[PageNode, None]()  # the longest unused first
        self._snapshots: dict[Snapshot, None] = {}  # in the order of their making
        self._marks = WeakKeyDictionary[BlockTable, Mark]()  # so that a chunk does not walk down the prompt before it
        self._clock = 0  # counts uses; what the present one has touched is not evicted by it

    @property
    def is_on(self) -> bool:
        """Return whether anything can be kept."""
        return any(self.capacity.values())

    @property
    def nbytes(self) -> int:
        """Count the bytes of the pages that are held, shared with sequences or not."""
        return sum(count * self.pool.page_bytes(group) for group, count in self.held.items())

    @property
    def most_bytes(self) -> int:
        """Count the bytes of the pages that may be held."""
        return sum(count * self.pool.page_bytes(group) for group, count in self.capacity.items())

    # ---- looking up ----

    def find(self, ids: tuple[int, ...], adapter: str | None = None, salt: str | None = None) -> BlockTable | None:
        """Return a table that shares the longest usable beginning of a prompt, None for none; its last token is computed anew.

        Where the prompt goes on beside an earlier one for longer than windows are held, windows are asked for where they part.
        """
        path, shared = self._match(ids, (adapter, salt))
        shared, size = min(shared, len(ids) - 1), self.page_tokens
        length = self._usable(path, shared)
        self._touch(path, length)
        if not length and shared < size:
            return None
        runs = {group: self._run(path, group, length) for group in self.pool.allocators}
        table = BlockTable.sharing(self.pool, length, runs)
        whole = length // size
        self._marks[table] = Mark(whole, path[whole - 1] if whole else None, self._clock)
        self.ask(table, shared // size * size)
        return table

    def ask(self, table: BlockTable, boundary: int) -> None:
        """Let the windows at a position be kept once a table gets there, for prompts that go another way from it on."""
        if boundary > table.length:
            self._marks.setdefault(table, Mark(born=self._clock)).boundaries.add(boundary)

    def usable(self, ids: tuple[int, ...], adapter: str | None = None, salt: str | None = None) -> int:
        """Return how many leading tokens of a prompt `find` would share now."""
        path, shared = self._match(ids, (adapter, salt))
        return self._usable(path, min(shared, len(ids) - 1))

    def _match(self, ids: tuple[int, ...], space: Hashable) -> tuple[list[PageNode], int]:
        """Return the nodes along the longest beginning of `ids` that global groups hold, and its length in tokens."""
        path, matched, node = list[PageNode](), 0, self._roots.get(space)
        while node is not None and matched < len(ids):
            piece = ids[matched : matched + self.page_tokens]
            lengths = [(common_length(child.ids, piece), child) for child in node.children.get(piece[0], ())]
            if not lengths:
                break
            same, node = max(lengths, key=lambda each: (each[0], len(each[1].windows)))
            path.append(node)
            matched += same
            if same < self.page_tokens:
                break
        return path, matched

    def _usable(self, path: Sequence[PageNode], most: int) -> int:
        """Return the largest length, up to `most`, at which every sliding group holds what the next row sees."""
        length, before = most, -1
        while length != before:
            before = length
            for group, window in self._windows.items():
                length = self._usable_in(group, window, path, length)
        return length

    def _usable_in(self, group: GroupId, window: int, path: Sequence[PageNode], most: int) -> int:
        size, best, start = self.page_tokens, 0, 0  # pages `start` and later are whole, up to the one that is looked at
        for index, node in enumerate(path[: -(-most // size)]):
            found = node.windows.get(group)
            length = min(most, index * size + (0 if found is None else found.filled))
            if length > index * size and start * size <= max(0, length - window + 1):
                best = length
            if found is None or found.filled < size:
                start = index + 1
        return best

    def _run(self, path: Sequence[PageNode], group: GroupId, length: int) -> PageRun:
        """Return the pages of one group that a table of `length` positions holds."""
        stop = -(-length // self.page_tokens)
        if group not in self._windows:
            return PageRun(0, [node.pages[group] for node in path[:stop]])
        first = self._oldest_page(group, length)
        return PageRun(first, [node.windows[group].page for node in path[first:stop]])

    def _oldest_page(self, group: GroupId, length: int) -> int:
        """Return the number of the oldest page that the row at `length` sees in a sliding group."""
        return max(0, length - self._windows[group] + 1) // self.page_tokens

    def _touch(self, path: Sequence[PageNode], length: int) -> None:
        """Note that a prefix was used: its nodes, and in each sliding group the snapshot that it goes on from."""
        self._clock += 1
        self._use(path)
        for found in path[-(-length // self.page_tokens) - 1].windows.values() if length else ():
            beyond = [each for each in found.holders if each.end >= length]  # none where one that went further was evicted
            snapshot = min(beyond, key=_end) if beyond else max(found.holders, key=_end)
            snapshot.used, snapshot.is_checkpoint = self._clock, False

    def _use(self, nodes: Iterable[PageNode]) -> None:
        for node in nodes:
            node.used = self._clock
            if node in self._leaves:
                self._leaves.move_to_end(node)

    # ---- keeping ----

    def keep(
        self,
        ids: tuple[int, ...],
        table: BlockTable,
        adapter: str | None = None,
        salt: str | None = None,
        *,
        since: int | None = None,
        computed: int | None = None,
        is_end: bool = True,
    ) -> None:
        """Remember what a table has computed of `ids` (all, or the first `computed`): whole pages, at the end part of one, too.

        The rows from `since` on are new, and their windows still held, whether or not they are committed: checkpoints, and
        boundaries that were asked for, are kept among them too. The cost is that of the new rows, and of a window.
        """
        computed = len(ids) if computed is None else computed
        end = computed if is_end else computed // self.page_tokens * self.page_tokens
        if not self.is_on or not end:
            return
        self._clock += 1
        mark = self._marks.setdefault(table, Mark(born=self._clock))
        last, count = self._insert(ids, end, table, (adapter, salt), mark)
        if is_end:
            self._use(_upwards(last))
        first, step = computed if since is None else since + 1, self._spacing
        asked = {at for at in mark.boundaries if first <= at <= end} | ({end} if is_end else set())
        mark.boundaries = {at for at in mark.boundaries if at > computed}
        checkpoints = range(-(-first // step) * step, end + 1, step) if step else ()
        ends = sorted(asked.union(checkpoints))
        path = self._tail(last, count, ends[0]) if ends else {}
        for at in ends:
            self._take_snapshot(path, table, at, computed, is_checkpoint=at not in asked, born=mark.born)

    def _insert(self, ids: tuple[int, ...], end: int, table: BlockTable, space: Hashable, mark: Mark) -> tuple[PageNode, int]:
        """Add the nodes that are missing along the first `end` ids, as far as the capacity goes.

        Returns the last node that is there, and how many pages end with it.
        """
        if mark.node is None or mark.node.is_gone or mark.node.space != space:
            mark.pages, mark.node = 0, None
        node, count, size = mark.node or self._roots.setdefault(space, PageNode((), None, space)), mark.pages, self.page_tokens
        self._use([node])
        for start in range(count * size, end, size):
            piece = ids[start : min(start + size, end)]
            child = next((each for each in node.children.get(piece[0], ()) if _is_beginning(each.ids, piece)), None)
            if child is None and (child := self._add(node, piece, table, count)) is None:
                break
            if len(child.ids) < len(piece):
                self._lengthen(child, piece, table, count)
            self._use([child])
            node, count = child, count + 1
            if len(piece) == size:
                mark.node, mark.pages = node, count
        if node.parent is None and not node.children:
            del self._roots[space]
        return node, count

    def _tail(self, last: PageNode, count: int, end: int) -> dict[int, PageNode]:
        """Return the nodes, by the number of their page, from the oldest that a snapshot at `end` may hold up to the last."""
        oldest = min((self._oldest_page(group, end) for group in self._windows), default=count)
        found, node = dict[int, PageNode](), last
        for index in range(count - 1, max(oldest - 1, 0) - 1, -1):
            found[index] = node
            assert node.parent is not None
            node = node.parent
        return found

    def _add(self, parent: PageNode, ids: tuple[int, ...], table: BlockTable, index: int) -> PageNode | None:
        for group in self._globals:
            while self.held[group] >= self.capacity[group]:
                if not self._evict_leaf():
                    return None
        if parent.parent is None:
            self._roots[parent.space] = parent  # the eviction may have emptied it
        node = PageNode(ids, parent, parent.space)
        for group in self._globals:
            node.pages[group] = self._share(group, table.pages(group)[1][index])
        parent.children.setdefault(ids[0], []).append(node)
        self._leaves.pop(parent, None)
        self._leaves[node] = None
        return node

    def _lengthen(self, node: PageNode, ids: tuple[int, ...], table: BlockTable, index: int) -> None:
        """Let a leaf hold more tokens of its page, in the pages of a table that went on from it."""
        for group in self._globals:
            page = self._share(group, table.pages(group)[1][index])
            self._let_go(group, node.pages[group])
            node.pages[group] = page
        node.ids = ids

    def _take_snapshot(
        self, path: Mapping[int, PageNode], table: BlockTable, end: int, computed: int, is_checkpoint: bool, born: int
    ) -> None:
        """Keep the windows at `end` if they are there and fit; `computed` positions of the table hold keys and values.

        What is older than `born` has nothing to do with the prompt under way.
        """
        last = path.get(-(-end // self.page_tokens) - 1)
        if last is None:
            return  # no windows, or no room for the nodes
        if (known := last.snapshots.get(end)) is not None:
            known.used, known.is_checkpoint = self._clock, known.is_checkpoint and is_checkpoint
            return
        while (wanted := self._snapshot_pages(path, table, end)) is not None:
            if all(self._fits(group, [path[index] for each, index in wanted if each == group]) for group in self._windows):
                break
            if not self._evict_snapshot(born, level=self._level(end) if is_checkpoint else None):
                return
        if wanted is None:
            return
        snapshot = Snapshot(end, last, is_checkpoint, self._clock, [(group, path[index]) for group, index in wanted])
        for group, index in wanted:
            self._hold_window(path[index], group, index, table, computed, end).holders[snapshot] = None
        last.snapshots[end] = snapshot
        self._snapshots[snapshot] = None

    def _fits(self, group: GroupId, nodes: Sequence[PageNode]) -> bool:
        """Return whether a group's windows in these nodes can be held, too."""
        return self.held[group] + sum(group not in node.windows for node in nodes) <= self.capacity[group]

    def _snapshot_pages(self, path: Mapping[int, PageNode], table: BlockTable, end: int) -> list[tuple[GroupId, int]] | None:
        """List the pages that a snapshot takes, None if one is gone: those that the row at `end` sees, and one before."""
        wanted = list[tuple[GroupId, int]]()
        for group in self._windows:
            oldest, size = self._oldest_page(group, end), self.page_tokens
            first, pages = table.pages(group)

            def is_there(index: int, group: GroupId = group, first: int = first, count: int = len(pages)) -> bool:
                found = path[index].windows.get(group)
                return first <= index < first + count or (
                    found is not None and found.filled >= min(self.page_tokens, end - index * self.page_tokens)
                )

            indices = range(oldest, -(-end // size))
            if not all(map(is_there, indices)):
                return None
            if oldest and is_there(oldest - 1):
                indices = range(oldest - 1, indices.stop)
            wanted += [(group, index) for index in indices]
        return wanted

    def _hold_window(self, node: PageNode, group: GroupId, index: int, table: BlockTable, computed: int, end: int) -> WindowPage:
        """Return a node's page of a sliding group: the one that it has if that goes far enough, else the table's."""
        found, start = node.windows.get(group), index * self.page_tokens
        if found is not None and found.filled >= min(self.page_tokens, end - start):
            return found
        first, pages = table.pages(group)
        page = self._share(group, pages[index - first])
        if found is not None:
            self._let_go(group, found.page)
        kept = WindowPage(page, min(len(node.ids), computed - start), {} if found is None else found.holders)
        node.windows[group] = kept
        return kept

    def _share(self, group: GroupId, page: int) -> int:
        self.pool.allocators[group].share(page)
        self.held[group] += 1
        return page

    def _let_go(self, group: GroupId, page: int) -> None:
        self.pool.allocators[group].drop(page)
        self.held[group] -= 1

    # ---- letting go ----

    def evict(self, group: GroupId | None = None) -> bool:
        """Let go of what is needed least, to free pages of a group or of any; return whether there was something."""
        self._clock += 1
        if group in self._windows:
            return self._evict_snapshot(self._clock, frees=group)
        return self._evict_leaf() or (self._has_unused() and self._evict_leaf(even_used=True))

    def _evict_leaf(self, even_used: bool = False) -> bool:
        """Remove the leaf that is unused longest; unless `even_used`, only one whose pages no sequence holds."""
        old = (leaf for leaf in self._leaves if leaf.used < self._clock and (even_used or self._is_unused(leaf)))
        if (leaf := next(old, None)) is None:
            return False
        self._remove(leaf)
        return True

    def _has_unused(self) -> bool:
        """Return whether a page is held for nobody, above leaves that sequences hold: they computed the pages between anew."""
        return any(self._is_unused(node) for root in self._roots.values() for node in _descendants(root))

    def _is_unused(self, node: PageNode) -> bool:
        return all(self.pool.allocators[group].ref_counts[page] == 1 for group, page in node.pages.items())

    def _evict_snapshot(self, born: int, frees: GroupId | None = None, level: int | None = None) -> bool:
        """Drop the snapshot that is needed least; with `frees`, only one that holds a page of that group for nobody else.

        With `level` it makes room for a checkpoint of that level: only for it are those dropped that matter no more than it does.
        """

        def need(snapshot: Snapshot) -> tuple[bool, bool, int, int]:
            if not snapshot.is_checkpoint:
                return True, False, 0, snapshot.used
            return False, snapshot.last.used >= born, self._level(snapshot.end), snapshot.used

        found = (each for each in self._snapshots if frees is None or self._frees(each, frees))
        snapshot = min(found, key=need, default=None)
        if snapshot is None or (level is not None and need(snapshot) > (False, True, level, self._clock)):
            return False
        self._drop_snapshot(snapshot)
        node: PageNode | None = snapshot.last
        while node is not None and node.parent is not None and self._is_useless(node):
            self._remove(node)
            node = node.parent
        return True

    def _level(self, end: int) -> int:
        """Return how far apart the checkpoints lie among which one at `end` is still found, as a multiple of a window."""
        number = end // self._spacing
        return number & -number

    def _frees(self, snapshot: Snapshot, group: GroupId) -> bool:
        book = self.pool.allocators[group]
        return any(book.ref_counts[node.windows[group].page] == 1 for each, node in snapshot.pages if each == group)

    def _is_useless(self, node: PageNode) -> bool:
        """Return whether a node is a leaf beyond all windows that are held, of which no sequence is in need."""
        return not node.children and not node.windows and node.used < self._clock and self._is_unused(node)

    def _drop_snapshot(self, snapshot: Snapshot) -> None:
        for group, node in snapshot.pages:
            found = node.windows[group]
            del found.holders[snapshot]
            if not found.holders:
                self._let_go(group, found.page)
                del node.windows[group]
        del snapshot.last.snapshots[snapshot.end]
        del self._snapshots[snapshot]

    def _remove(self, leaf: PageNode) -> None:
        """Take a leaf out of the tree, with the snapshots that end there; nobody else's windows lie in it."""
        for snapshot in list(leaf.snapshots.values()):
            self._drop_snapshot(snapshot)
        for group, page in leaf.pages.items():
            self._let_go(group, page)
        del self._leaves[leaf]
        leaf.is_gone, parent = True, leaf.parent
        assert parent is not None
        siblings = parent.children[leaf.ids[0]]
        siblings.remove(leaf)
        if not siblings:
            del parent.children[leaf.ids[0]]
        if parent.children:
            return
        if parent.parent is None:
            self._roots.pop(parent.space, None)
        else:
            self._leaves[parent] = None
            if parent.used <= leaf.used:  # nobody has stopped there since
                self._leaves.move_to_end(parent, last=False)

    def drop(self, adapter: str) -> None:
        """Drop all prefixes that were computed with an adapter; another may get its name."""
        for root in [root for (name, _), root in self._spaces() if name == adapter]:
            for node in reversed(list(_descendants(root))):
                self._remove(node)

    def _spaces(self) -> Iterator[tuple[tuple[str | None, str | None], PageNode]]:
        for space, root in self._roots.items():
            assert isinstance(space, tuple)
            yield space, root


def _end(snapshot: Snapshot) -> int:
    return snapshot.end


def _upwards(node: PageNode | None) -> Iterator[PageNode]:
    """Yield a node and all above it."""
    while node is not None:
        yield node
        node = node.parent


def _descendants(root: PageNode) -> Iterator[PageNode]:
    """Yield the nodes below a root, each before those below it."""
    stack = [root]
    while stack:
        for children in stack.pop().children.values():
            yield from children
            stack += children


def _is_beginning(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether one of two sequences of ids begins with the other."""
    length = min(len(a), len(b))
    return a[:length] == b[:length]


def common_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Count the equal leading ids; slices are compared, which is much faster than id by id."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
