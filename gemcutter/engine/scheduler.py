"""Which rows run in the next step.

Owns the queue: decode rows first, then prompt chunks within the row budget, then new requests while pages last. When pages run
out, cached prefixes go first, then the youngest sequence gives up its pages and starts again later with all its tokens. Refuses
to know tensors and text. Read `runner.py` for what is made of a chunk, `engine.py` for who commits its rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.cache.prefix_cache import PrefixCache
from gemcutter.engine.request import SequenceState
from gemcutter.errors import CapacityError

ON_DEVICE = -1  # in place of an id that the step before samples, and which the device alone knows yet


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Rows of one sequence in one step, with all that was true of them when they were scheduled.

    Row i computes the token `ids[i]` at position `start` + i, in pages that are reserved in `table`. `logit_rows` are the rows
    whose final states are wanted. After each of the last `num_sampled` rows a token is sampled: 1 to decode, 1 + K where the last
    K ids are drafts, 0 in the middle of a prompt. `targets` are the prompt tokens after the rows where their log-probabilities
    are wanted. `want_probs` asks for the probabilities from which each token was sampled.
    """

    sequence: SequenceState  # for its identity and its request; what changes in it is not read again
    table: BlockTable
    start: int
    ids: tuple[int, ...]
    logit_rows: range
    num_sampled: int
    in_prompt: bool = False  # no token had been sampled yet
    is_last: bool = False  # nothing known of the sequence is left to compute after it
    targets: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()
    want_probs: bool = False

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    @property
    def reports(self) -> bool:
        """Return whether every row's log-probability or state goes into the prompt's report."""
        return self.in_prompt and self.sequence.request.wants_all_rows

    @classmethod
    def of(cls, sequence: SequenceState, table: BlockTable, rows: int, drafts: tuple[int, ...] = ()) -> ScheduledChunk:
        """Describe the next `rows` pending rows of a sequence; drafts may follow the last of them."""
        start, request, in_prompt = table.length, sequence.request, sequence.in_prompt
        is_last = start + rows == sequence.num_tokens
        assert is_last or not drafts
        num_sampled = 1 + len(drafts) if is_last and request.max_tokens else 0
        reports = in_prompt and request.wants_all_rows
        num_rows = rows + len(drafts)
        first = 0 if reports else num_rows - max(num_sampled, int(is_last))
        targets = sequence.ids(start + 1, start + rows + 1) if reports and request.prompt_logprobs is not None else ()
        ids = (*sequence.ids(start, start + rows), *drafts)
        return cls(sequence, table, start, ids, range(first, num_rows), num_sampled, in_prompt, is_last, targets, drafts)

    def following(self) -> ScheduledChunk:
        """Return the single row after this one, for the token that this one samples."""
        return replace(self, start=self.start + self.rows, ids=(ON_DEVICE,), logit_rows=range(1), in_prompt=False, targets=())


class Proposer(Protocol):
    """Guesses the tokens that a sequence will sample next; they are verified in one step, so a wrong guess costs time alone."""

    def propose(self, sequence: SequenceState, limit: int) -> tuple[int, ...]:
        """Return up to `limit` draft ids to follow the sequence's last token; none where there is nothing to guess."""


class Scheduler:
    """Continuous admission over one pool."""

    def __init__(
        self,
        pool: PagedKVCache,
        context: int,
        max_batched_tokens: int,
        max_num_seqs: int,
        prefix: PrefixCache,
        proposer: Proposer | None = None,
    ) -> None:
        self.pool, self.context, self.prefix, self.proposer = pool, context, prefix, proposer
        self.max_batched_tokens, self.max_num_seqs = max_batched_tokens, max_num_seqs
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []  # in order of admission

    def schedule(self) -> list[ScheduledChunk]:
        """Reserve the rows of the next step; an empty list means there is nothing to do."""
        budget, chunks = self.max_batched_tokens, list[ScheduledChunk]()
        for index, sequence in enumerate(list(self.running)):  # decode rows first: only the youngest can still be in its prompt
            if budget and sequence in self.running:  # it may have been preempted just now
                others = len(self.running) - index - 1  # each of which gets a row before anyone's drafts
                chunks += self._reserve(sequence, min(sequence.pending, budget), budget - others)
                budget = self.max_batched_tokens - sum(chunk.rows for chunk in chunks)
        if len(chunks) < len(self.running):
            return chunks  # somebody waits for pages or rows, which are not a newcomer's to take
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            admitted = self._admit(self.waiting[0], budget)
            if admitted is None:
                break
            chunks.append(admitted)
            budget -= admitted.rows
        return chunks

    def schedule_after(self, chunks: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
        """Reserve the rows that follow chunks whose tokens are not known yet; none unless the next step surely has the same ones.

        A sequence may still stop: its row is computed for nothing then, and nobody reads what it wrote. Nothing is committed.
        """
        if self.proposer is not None or (self.waiting and len(self.running) < self.max_num_seqs):
            return []
        if any(chunk.sequence.table is not chunk.table or self._may_be_last(chunk) for chunk in chunks):
            return []
        try:
            for chunk in chunks:
                chunk.table.reserve(chunk.rows + 1)
        except CapacityError:  # the next call of `schedule` will find pages
            for chunk in chunks:
                chunk.table.reserve(chunk.rows)
            return []
        return [chunk.following() for chunk in chunks]

    def _may_be_last(self, chunk: ScheduledChunk) -> bool:
        """Return whether the token to come ends the prompt, whose pages are kept then, or the reply, whatever it is."""
        after = chunk.start + chunk.rows + 1  # tokens, with the one to come
        limit = min(len(chunk.sequence.request.prompt) + chunk.sequence.request.max_tokens, self.context)
        return chunk.in_prompt or after >= limit

    def _admit(self, sequence: SequenceState, budget: int) -> ScheduledChunk | None:
        fresh = sequence.in_prompt and not sequence.request.wants_all_rows
        tokens = sequence.ids(0, sequence.num_tokens)
        table = (self.prefix.find(tokens, sequence.request.adapter) if fresh else None) or BlockTable(self.pool)
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
        return ScheduledChunk.of(sequence, table, rows)

    def _reserve(self, sequence: SequenceState, rows: int, budget: int) -> list[ScheduledChunk]:
        """Reserve rows of a running sequence, taking pages from cached prefixes and younger sequences if need be."""
        table = sequence.table
        assert table is not None
        drafts = self._drafts(sequence, rows, budget)
        while True:
            try:
                table.reserve(rows + len(drafts))
                return [ScheduledChunk.of(sequence, table, rows, drafts)]
            except CapacityError:
                if drafts:
                    drafts = ()  # a guess is worth nobody's pages
                elif not self.prefix.evict() and not self._preempt_younger(sequence):
                    return []  # older sequences hold the pages; they will finish

    def _drafts(self, sequence: SequenceState, rows: int, budget: int) -> tuple[int, ...]:
        """Return drafts for a sequence that decodes, no more than its reply, the context and the row budget have room for."""
        if self.proposer is None or sequence.in_prompt or rows != sequence.pending or rows != 1:
            return ()
        left = min(sequence.request.max_tokens - len(sequence.reply), self.context - sequence.num_tokens) - 1
        limit = min(left, budget - rows)
        return self.proposer.propose(sequence, limit)[:limit] if limit > 0 else ()

    def _preempt_younger(self, sequence: SequenceState) -> bool:
        """Send the youngest sequence back to wait, unless it is this one. Nobody younger has rows in the step yet."""
        victim = self.running[-1]
        if victim is sequence:
            return False
        self.leave(victim)
        self.waiting.appendleft(victim)
        return True

    def forget_rows(self) -> None:
        """Take back what was reserved for steps that did not happen."""
        for sequence in self.running:
            if sequence.table is not None:
                sequence.table.commit(0)
        for sequence in self.waiting:
            if sequence.table is not None:  # it was about to be admitted
                sequence.table.release()
                sequence.table = None

    def leave(self, sequence: SequenceState) -> None:
        """Take a sequence out and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.table is not None:
            sequence.table.release()
            sequence.table = None
