"""Block tables: where one sequence's positions lie, group by group.

`reserve` takes pages for a step's rows, `commit` keeps the accepted ones; nothing is freed in between, so layers that read late
in a step see what the writer saw, and rejecting draft rows is `commit(accepted)`. Windowed groups let go of pages that no later
query can see. A fork shares pages and copies one only when it is about to be written. Refuses to know tokens and requests; read
`kv_cache.py` for storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.errors import CapacityError
from gemcutter.ops.step import KVRange
from gemcutter.plan import GroupId


@dataclass(slots=True)
class PageRun:
    """The pages that a sequence holds in one group: its pages number `first`, first + 1, ..."""

    first: int = 0
    pages: list[int] = field(default_factory=list)


class BlockTable:
    """The block tables of one sequence, one a group."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.length = 0  # committed positions
        self.reserved = 0  # rows of the steps under way
        self._runs: dict[GroupId, PageRun] = {group: PageRun() for group in cache.allocators}

    @classmethod
    def sharing(cls, cache: PagedKVCache, length: int, runs: Mapping[GroupId, PageRun]) -> BlockTable:
        """Make a table of `length` committed positions over pages that others hold, too; the runs are its own from then on."""
        table = cls(cache)
        table.length = length
        for group, run in runs.items():
            for page in run.pages:
                cache.allocators[group].share(page)
            table._runs[group] = run
        return table

    def reserve(self, rows: int) -> None:
        """Take pages for the next `rows` positions, of which some may be reserved already.

        Raises CapacityError, with nothing taken, if they are not to be had.
        """
        if (group := self.shortage(rows)) is not None:
            free, needed = self.cache.allocators[group].free, sum(self._missing(group, rows))
            raise CapacityError(f"the cache has {free} free pages, {needed} are needed")
        for group in self._runs:
            self._grow(group, *self._missing(group, rows))
        self.reserved = rows

    def shortage(self, rows: int) -> GroupId | None:
        """Return the first group that lacks free pages for the next `rows` positions; None where `reserve` will do."""
        short = (group for group in self._runs if sum(self._missing(group, rows)) > self.cache.allocators[group].free)
        return next(short, None)

    def _missing(self, group: GroupId, rows: int) -> tuple[int, int]:
        """Count the pages to add, and the shared page (0 or 1) to copy because this step writes into it."""
        book, run, first = self.cache.allocators[group], self._runs[group], self.length + self.reserved
        pages = -(-(self.length + rows) // book.tokens) - run.first - len(run.pages)
        writes_into = rows > self.reserved and first % book.tokens and book.ref_counts[run.pages[-1]] > 1
        return pages, int(bool(writes_into))

    def _grow(self, group: GroupId, pages: int, copies: int) -> None:
        book, run = self.cache.allocators[group], self._runs[group]
        if copies:
            shared = run.pages.pop()
            run.pages.append(book.take(run.pages[-1] if run.pages else None))
            self.cache.copy_page(group, shared, run.pages[-1])
            book.drop(shared)
        for _ in range(pages):
            run.pages.append(book.take(run.pages[-1] if run.pages else None))

    def commit(self, accepted: int, ahead: int = 0) -> None:
        """Keep the first `accepted` reserved rows, and let go of pages that no later query sees.

        The next `ahead` rows stay reserved, for steps that are launched already; all others are forgotten.
        """
        assert 0 <= accepted <= accepted + ahead <= self.reserved
        self.length += accepted
        self.reserved = ahead
        for group, run in self._runs.items():
            book = self.cache.allocators[group]
            while run.first + len(run.pages) > -(-(self.length + ahead) // book.tokens):
                book.drop(run.pages.pop())
            window = self.cache.windows[group]
            oldest = 0 if window is None else max(0, self.length - window + 1)  # the next query sees position oldest and later
            gone = oldest // book.tokens - run.first
            for page in run.pages[: max(gone, 0)]:
                book.drop(page)
            del run.pages[: max(gone, 0)]
            run.first += max(gone, 0)

    def slot_mapping(self, group: GroupId) -> list[int]:
        """Return the slot of each reserved row."""
        book, run = self.cache.allocators[group], self._runs[group]
        size, first = book.tokens, run.first
        return [run.pages[at // size - first] * size + at % size for at in range(self.length, self.length + self.reserved)]

    def pages(self, group: GroupId) -> tuple[int, list[int]]:
        """Return the number of the first page that is held in a group, counted from the sequence's start, and the pages."""
        run = self._runs[group]
        return run.first, run.pages

    def kv_range(self, group: GroupId) -> KVRange:
        """Return what this step may read: all held positions, the reserved rows included."""
        book, run = self.cache.allocators[group], self._runs[group]
        start, stop = run.first * book.tokens, self.length + self.reserved
        if run.pages and run.pages[-1] - run.pages[0] == len(run.pages) - 1 and sorted(run.pages) == run.pages:
            low = run.pages[0] * book.tokens
            return KVRange(start, slice(low, low + stop - start), tuple(run.pages), book.tokens)
        slots = torch.tensor(run.pages)[:, None] * book.tokens + torch.arange(book.tokens)
        return KVRange(start, slots.flatten()[: stop - start], tuple(run.pages), book.tokens)

    def can_rewind(self, length: int) -> bool:
        """Return whether a fork could continue from `length`: every windowed group still holds what the next query sees."""
        return length <= self.length and all(
            run.first * self.cache.allocators[group].tokens <= max(0, length - (self.cache.windows[group] or length) + 1)
            for group, run in self._runs.items()
        )

    def fork(self, length: int | None = None) -> BlockTable:
        """Make a table that shares this one's first `length` positions (all by default)."""
        length = self.length if length is None else length
        assert not self.reserved
        assert self.can_rewind(length)
        twin = BlockTable(self.cache)
        twin.length = length
        for group, run in self._runs.items():
            book = self.cache.allocators[group]
            pages = run.pages[: max(0, -(-length // book.tokens) - run.first)]
            twin._runs[group] = PageRun(run.first, pages)
            for page in pages:
                book.share(page)
        return twin

    def release(self) -> None:
        """Let go of all pages; the table is empty afterwards."""
        for group, run in self._runs.items():
            for page in run.pages:
                self.cache.allocators[group].drop(page)
            self._runs[group] = PageRun()
        self.length = self.reserved = 0
