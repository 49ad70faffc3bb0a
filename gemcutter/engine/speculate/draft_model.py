"""Drafts by a smaller model of the same vocabulary, which has a cache of its own.

Owns that cache and how far it has got with every sequence: rows that the target has accepted since are computed first, then a row
a draft, in slots that are taken back afterwards. A long prompt is computed a step at a time, without drafts meanwhile. Refuses to
know how many drafts are worth it. Read `speculator.py` for who asks, `assistant.py` for drafters without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.engine.memory import make_pool, page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.speculate.assistant import Wanted, choose_drafts
from gemcutter.engine.speculate.confidence import Guess
from gemcutter.engine.speculate.tally import MOST_DRAFTS
from gemcutter.engine.step import build_step
from gemcutter.errors import CapacityError
from gemcutter.model.drafter import DraftLogits
from gemcutter.model.text import Decoder

CATCH_UP_ROWS = 256  # of a sequence in one step: its reply waits for them


@dataclass(frozen=True, slots=True)
class Shadow:
    """A sequence in the draft model's cache: a request without adapter, and a table of its own."""

    sequence: SequenceState
    table: BlockTable


class DraftModelProposer:
    """Asks a smaller decoder; its cache holds `max_num_seqs` sequences of `context` tokens."""

    def __init__(self, decoder: Decoder, context: int, max_num_seqs: int) -> None:
        self._decoder = decoder
        counts = page_counts(decoder.plan, context, CATCH_UP_ROWS + MOST_DRAFTS, max_num_seqs)
        self._cache = make_pool(decoder, counts, decoder.dtype)
        self._context = min(context, decoder.plan.context)
        self._shadows: dict[int, Shadow] = {}

    needs_states = False

    def can_draft(self, sequence: SequenceState) -> bool:
        """Return whether the sequence fits, drafts included."""
        return sequence.num_tokens + MOST_DRAFTS < self._context

    def forget(self, sequence: SequenceState) -> None:
        """Let go of a sequence's keys and values."""
        shadow = self._shadows.pop(sequence.number, None)
        if shadow is not None:
            shadow.table.release()

    @torch.inference_mode()
    def propose(self, wanted: Wanted) -> dict[int, Guess]:
        """Return drafts by the sequences' numbers; none for those whose prompts are not computed here yet."""
        ready = list[tuple[SequenceState, int]]()
        for sequence, limit in wanted:
            if self._catches_up(sequence, limit):
                ready.append((sequence, limit))
        try:
            return self._drafts(ready) if ready else {}
        finally:
            for sequence, _ in ready:
                table = self._shadows[sequence.number].table
                table.commit(min(sequence.num_tokens - table.length, table.reserved))

    def _catches_up(self, sequence: SequenceState, limit: int) -> bool:
        """Reserve rows for a sequence; return whether this step reaches its last token. Others get a chunk of their own."""
        if sequence.number not in self._shadows:
            plain = SequenceState(sequence.number, Request(sequence.request.prompt))
            self._shadows[sequence.number] = Shadow(plain, BlockTable(self._cache))
        table = self._shadows[sequence.number].table
        rows = min(sequence.num_tokens - table.length, CATCH_UP_ROWS)
        is_last = table.length + rows == sequence.num_tokens
        try:
            table.reserve(rows + (limit - 1 if is_last else 0))
        except CapacityError:
            return False
        if not is_last:
            self._run([sequence], [table.length], [rows], wants_logits=False)
            table.commit(rows)
        return is_last

    def _drafts(self, ready: Wanted) -> dict[int, Guess]:
        sequences = [sequence for sequence, _ in ready]
        tables = [self._shadows[sequence.number].table for sequence in sequences]
        starts = [table.length for table in tables]
        counts = [sequence.num_tokens - start for sequence, start in zip(sequences, starts, strict=True)]
        found: dict[int, list[int]] = {sequence.number: [] for sequence in sequences}
        sure: dict[int, list[float]] = {sequence.number: [] for sequence in sequences}
        active, logits = list(range(len(ready))), self._run(sequences, starts, counts)
        for place in range(max(limit for _, limit in ready)):
            asking = [sequences[index] for index in active]
            for index, token, chance in zip(active, *choose_drafts(DraftLogits(logits), asking, place), strict=True):
                found[sequences[index].number].append(token)
                sure[sequences[index].number].append(chance)
            active = [index for index in active if len(found[sequences[index].number]) < ready[index][1]]
            if not active:
                break
            rows = [(sequences[index].number, sequences[index].num_tokens + place) for index in active]
            logits = self._run_drafts([(number, at, found[number][-1]) for number, at in rows])
        return {number: Guess(tuple(drafts), tuple(sure[number])) for number, drafts in found.items()}

    def _run(
        self, sequences: Sequence[SequenceState], starts: Sequence[int], counts: Sequence[int], *, wants_logits: bool = True
    ) -> Tensor:
        """Compute known rows of some sequences; return the logits [S, V] after the last of each."""
        chunks = [
            self._chunk(sequence.number, start, sequence.ids(start, start + count), wants_logits)
            for sequence, start, count in zip(sequences, starts, counts, strict=True)
        ]
        return self._forward(chunks)

    def _run_drafts(self, rows: Sequence[tuple[int, int, int]]) -> Tensor:
        """Compute a drafted token of some sequences, each at a position; return the logits after them."""
        return self._forward([self._chunk(number, at, (token,), wants_logits=True) for number, at, token in rows])

    def _chunk(self, number: int, start: int, ids: tuple[int, ...], wants_logits: bool) -> ScheduledChunk:
        shadow, first = self._shadows[number], len(ids) - int(wants_logits)
        return ScheduledChunk(shadow.sequence, shadow.table, start, ids, range(first, len(ids)), int(wants_logits))

    def _forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        return self._decoder.logits(self._decoder.forward(build_step(self._decoder, chunks), self._cache))
