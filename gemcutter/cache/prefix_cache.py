"""Reuse of what earlier requests left in the cache: the prefixes that finished prompts and replies are.

A cached prefix is a fork of a block table that is never stepped. A new prompt continues from the longest one that shares its
beginning and its adapter, and still holds the windows there. Refuses to know text; ids only. Prefixes are dropped, oldest
first, when their number or the pages run out.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcutter.cache.block_table import BlockTable


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Ids whose keys and values are in the cache, as computed with an adapter or without."""

    ids: tuple[int, ...]
    table: BlockTable
    adapter: str | None


class PrefixCache:
    """The newest `capacity` prefixes; a capacity of 0 keeps none."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._prefixes: list[CachedPrefix] = []

    def __len__(self) -> int:
        return len(self._prefixes)

    def keep(self, ids: tuple[int, ...], table: BlockTable, adapter: str | None = None) -> None:
        """Remember a table whose committed positions hold `ids`, as computed with an adapter or without."""
        if not self.capacity or not ids:
            return
        for old in [point for point in self._prefixes if (point.ids, point.adapter) == (ids, adapter)]:
            self._forget(old)
        self._prefixes.append(CachedPrefix(ids, table.fork(), adapter))
        while len(self._prefixes) > self.capacity:
            self._forget(self._prefixes[0])

    def find(self, ids: tuple[int, ...], adapter: str | None = None) -> BlockTable | None:
        """Fork the adapter's prefix that spares most of a prompt; its last token is always computed anew."""
        best: tuple[int, CachedPrefix] | None = None
        for point in (point for point in self._prefixes if point.adapter == adapter):
            shared = min(_common(point.ids, ids), len(ids) - 1)
            if shared > (best[0] if best else 0) and point.table.can_rewind(shared):
                best = (shared, point)
        return best[1].table.fork(best[0]) if best else None

    def evict(self) -> bool:
        """Drop the oldest prefix; return whether there was one."""
        if self._prefixes:
            self._forget(self._prefixes[0])
            return True
        return False

    def drop(self, adapter: str) -> None:
        """Drop all prefixes that were computed with an adapter; another may get its name."""
        for point in [point for point in self._prefixes if point.adapter == adapter]:
            self._forget(point)

    def _forget(self, point: CachedPrefix) -> None:
        point.table.release()
        self._prefixes.remove(point)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Count the equal leading ids; slices are compared, which is much faster than id by id."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
