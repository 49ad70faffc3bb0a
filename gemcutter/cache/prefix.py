"""Reuse of what earlier requests left in the cache: checkpoints of finished prompts and replies.

A checkpoint is a fork of a block table that is never stepped. A new prompt continues from the longest one that shares its
beginning and its adapter, and still holds the windows there. Refuses to know text; ids only. Checkpoints are dropped, oldest
first, when their number or the pages run out.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcutter.cache.table import Table


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    ids: tuple[int, ...]
    table: Table
    adapter: str | None


class PrefixCache:
    """The newest `capacity` checkpoints; a capacity of 0 keeps none."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._checkpoints: list[_Checkpoint] = []

    def __len__(self) -> int:
        return len(self._checkpoints)

    def keep(self, ids: tuple[int, ...], table: Table, adapter: str | None = None) -> None:
        """Remember a table whose committed positions hold `ids`, as computed with an adapter or without."""
        if not self.capacity or not ids:
            return
        for old in [point for point in self._checkpoints if (point.ids, point.adapter) == (ids, adapter)]:
            self._forget(old)
        self._checkpoints.append(_Checkpoint(ids, table.fork(), adapter))
        while len(self._checkpoints) > self.capacity:
            self._forget(self._checkpoints[0])

    def find(self, ids: tuple[int, ...], adapter: str | None = None) -> Table | None:
        """Fork the adapter's checkpoint that spares most of a prompt; its last token is always computed anew."""
        best: tuple[int, _Checkpoint] | None = None
        for point in (point for point in self._checkpoints if point.adapter == adapter):
            shared = min(_common(point.ids, ids), len(ids) - 1)
            if shared > (best[0] if best else 0) and point.table.can_rewind(shared):
                best = (shared, point)
        return best[1].table.fork(best[0]) if best else None

    def evict(self) -> bool:
        """Drop the oldest checkpoint; tell whether there was one."""
        if self._checkpoints:
            self._forget(self._checkpoints[0])
            return True
        return False

    def _forget(self, point: _Checkpoint) -> None:
        point.table.release()
        self._checkpoints.remove(point)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Count the equal leading ids."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
