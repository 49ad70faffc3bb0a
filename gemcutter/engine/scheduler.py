"""Which rows run in the next step.

Owns the queue: decode rows first, then prompt chunks within the row budget, then new requests while pages last. When pages run
out, checkpoints go first, then the youngest sequence gives up its pages and starts again later with all its tokens. Refuses to
know tensors and text.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.cache.prefix_cache import PrefixCache
from gemcutter.engine.request import Sequence
from gemcutter.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Work:
    """The next `rows` pending rows of a sequence, reserved in its table."""

    sequence: Sequence
    table: BlockTable
    rows: int

    @property
    def ids(self) -> list[int]:
        """List the rows' tokens."""
        return self.sequence.tokens[self.table.length : self.table.length + self.rows]

    @property
    def is_last_chunk(self) -> bool:
        """Tell whether the next token can be chosen after this step."""
        return self.rows == self.sequence.pending

    @property
    def kept_rows(self) -> range:
        """Give the rows, counted within this work, whose final states are wanted."""
        wants_all = self.sequence.in_prompt and self.sequence.request.wants_all_rows
        return range(0 if wants_all else self.rows - 1 if self.is_last_chunk else self.rows, self.rows)


class Scheduler:
    """Continuous admission over one pool."""

    def __init__(self, pool: PagedKVCache, max_rows: int, max_sequences: int, prefix: PrefixCache) -> None:
        self.pool, self.prefix = pool, prefix
        self.max_rows, self.max_sequences = max_rows, max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission

    def schedule(self) -> list[Work]:
        """Reserve the rows of the next step; an empty list means there is nothing to do."""
        budget, works = self.max_rows, list[Work]()
        for sequence in list(self.running):  # decode rows come first: only the youngest can still be in its prompt
            if budget and sequence in self.running:  # it may have been preempted just now
                works += self._reserve(sequence, min(sequence.pending, budget))
                budget = self.max_rows - sum(work.rows for work in works)
        if len(works) < len(self.running):
            return works  # somebody waits for pages or rows, which are not a newcomer's to take
        while self.waiting and budget and len(self.running) < self.max_sequences:
            admitted = self._admit(self.waiting[0], budget)
            if admitted is None:
                break
            works.append(admitted)
            budget -= admitted.rows
        return works

    def _admit(self, sequence: Sequence, budget: int) -> Work | None:
        fresh = sequence.in_prompt and not sequence.request.wants_all_rows
        table = (self.prefix.find(tuple(sequence.tokens), sequence.request.adapter) if fresh else None) or BlockTable(self.pool)
        sequence.table = table
        rows = min(sequence.pending, budget)
        while True:
            try:
                table.reserve(rows)
                break
            except CapacityError:
                if not self.prefix.evict():
                    table.release()
                    sequence.table = None
                    return None
        if sequence.in_prompt:  # else the report has been given
            sequence.report.cached_tokens = table.length
        self.running.append(self.waiting.popleft())
        return Work(sequence, table, rows)

    def _reserve(self, sequence: Sequence, rows: int) -> list[Work]:
        """Reserve rows of a running sequence, taking pages from checkpoints and younger sequences if need be."""
        assert sequence.table is not None
        while True:
            try:
                sequence.table.reserve(rows)
                return [Work(sequence, sequence.table, rows)]
            except CapacityError:
                if not self.prefix.evict() and not self._preempt_younger(sequence):
                    return []  # older sequences hold the pages; they will finish

    def _preempt_younger(self, sequence: Sequence) -> bool:
        """Send the youngest sequence back to wait, unless it is this one. Nobody younger has rows in the step yet."""
        victim = self.running[-1]
        if victim is sequence:
            return False
        self.leave(victim)
        self.waiting.appendleft(victim)
        return True

    def forget_rows(self) -> None:
        """Take back what `schedule` reserved for a step that did not happen."""
        for sequence in self.running:
            if sequence.table is not None:
                sequence.table.commit(0)
        for sequence in self.waiting:
            if sequence.table is not None:  # it was about to be admitted
                sequence.table.release()
                sequence.table = None

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.table is not None:
            sequence.table.release()
            sequence.table = None
