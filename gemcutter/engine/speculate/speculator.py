"""Speculation as the scheduler and the engine see it: drafts for a step's sequences, and what became of them.

Owns who is asked for a draft (the first proposer that has one), the number of drafts, the estimates that it follows from, and the
tallies. Verification is exact whatever is guessed, so nothing here changes a reply. Refuses to know rows and pages. Read
`draft_length.py` for the number, `ngram.py` and `assistant.py` for the guesses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from gemcutter.engine.request import SequenceState
from gemcutter.engine.speculate.draft_length import PROBE_TOKENS, Acceptance, Candidate, StepCosts, count_drafts
from gemcutter.engine.speculate.tally import MOST_DRAFTS, NO_DRAFTS
from gemcutter.errors import RequestError, spell_value

Drafts = dict[int, tuple[int, ...]]  # by the numbers of their sequences
NGRAM, ASSISTANT = "ngram", "assistant"
MOST_ROWS = 16  # of a step with drafts: so far CPU kernels give a row the same bits whatever is beside it, and rows are cheap


class Lookup(Protocol):
    """A proposer whose drafts cost no time to speak of."""

    def propose(self, sequence: SequenceState, limit: int) -> tuple[int, ...]:
        """Return up to `limit` ids to follow a sequence's last token; none where there is nothing to guess."""


class Drafting(Protocol):
    """A proposer whose drafts take time: a model."""

    @property
    def needs_states(self) -> bool:
        """Return whether it drafts from the target's final states, which sequences must keep for it."""

    def can_draft(self, sequence: SequenceState) -> bool:
        """Return whether there is all that a draft for a sequence needs."""

    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> Drafts:
        """Return up to as many drafts as stand beside each sequence; all can be drafted for, and none has rows reserved."""

    def forget(self, sequence: SequenceState) -> None:
        """Let go of what is kept for a sequence that has ended."""


class Speculator:
    """Asks proposers for drafts. `draft_tokens` is how many for each sequence, None: as many as pay.

    Raises RequestError for a number that can't be used.
    """

    def __init__(self, ngram: Lookup | None = None, assistant: Drafting | None = None, draft_tokens: int | None = None) -> None:
        if draft_tokens is not None and not 0 <= draft_tokens <= MOST_DRAFTS:
            raise RequestError(f"draft_tokens: expected 0 to {MOST_DRAFTS}, found {spell_value(draft_tokens)}")
        self.ngram, self.assistant, self.draft_tokens = ngram, assistant, draft_tokens
        self.costs, self.tally = StepCosts(), NO_DRAFTS
        self.clock = time.perf_counter
        self._usual = {NGRAM: Acceptance(), ASSISTANT: Acceptance()}  # of all sequences: what a new one begins with
        self._own: dict[tuple[int, str], Acceptance] = {}
        self._asked: dict[int, str] = {}  # who made the draft that a sequence has in the step under way

    @property
    def keeps_states(self) -> bool:
        """Return whether somebody drafts from the target's states."""
        return self.assistant is not None and self.assistant.needs_states

    # ---- before a step ----

    def propose(self, wanted: Sequence[tuple[SequenceState, int]], others: int, room: int) -> Drafts:
        """Return drafts for sequences that decode, each with the most that it may get; `room` bounds them all.

        `others` are the rows of the step beside these sequences'. None of the sequences has rows reserved.
        """
        self._asked.clear()
        room = min(room, MOST_ROWS - others - len(wanted))
        if room <= 0:
            return {}
        found = self._look_up(wanted)
        asking = [pair for pair in wanted if self._can_ask(pair[0]) and pair[0].number not in found]
        limits = {sequence.number: limit for sequence, limit in asking} | {number: len(ids) for number, ids in found.items()}
        sequences = {sequence.number: sequence for sequence, _ in wanted if sequence.number in limits}
        counts = self._counts(sequences, limits, found, others + len(wanted) - len(sequences), room)
        drafts = {number: ids[: counts[number]] for number, ids in found.items() if counts[number]}
        bursts = [(sequence, counts[sequence.number]) for sequence, _ in asking if counts[sequence.number]]
        if bursts and self.assistant is not None:
            started_s = self.clock()
            if made := self.assistant.propose(bursts):
                self.costs.observe_drafts(max(map(len, made.values())), self.clock() - started_s)
            drafts |= made
        self._asked |= {number: NGRAM if number in found else ASSISTANT for number in drafts}
        return drafts

    def _look_up(self, wanted: Sequence[tuple[SequenceState, int]]) -> Drafts:
        if self.ngram is None:
            return {}
        found = ((sequence, self.ngram.propose(sequence, min(limit, MOST_DRAFTS))) for sequence, limit in wanted if limit > 0)
        return {sequence.number: ids for sequence, ids in found if ids}

    def _can_ask(self, sequence: SequenceState) -> bool:
        return self.assistant is not None and self.assistant.can_draft(sequence)

    def _counts(
        self, sequences: dict[int, SequenceState], limits: dict[int, int], found: Drafts, others: int, room: int
    ) -> dict[int, int]:
        """Return how many drafts each sequence gets."""
        if self.draft_tokens is not None:
            counts = dict[int, int]()
            for number, limit in limits.items():
                counts[number] = min(limit, self.draft_tokens, room)
                room -= counts[number]
            return counts
        kinds = {number: NGRAM if number in found else ASSISTANT for number in sequences}
        candidates = [
            Candidate(number, limits[number], self._acceptance(number, kinds[number]), is_free=number in found)
            for number in sequences
        ]
        counts = dict(count_drafts(candidates, others, room, self.costs))
        for each in candidates:  # one that never gets a draft would never be known to deserve one
            each.acceptance.idle_tokens = 0 if counts[each.number] else each.acceptance.idle_tokens + 1
            is_due = each.acceptance.idle_tokens > PROBE_TOKENS and self.costs(1) is not None
            if is_due and min(each.limit, room - sum(counts.values())) > 0:
                counts[each.number] = 1
                each.acceptance.idle_tokens = 0
        return counts

    def _acceptance(self, number: int, kind: str) -> Acceptance:
        if (number, kind) not in self._own:
            self._own[number, kind] = Acceptance(list(self._usual[kind].rates))
        return self._own[number, kind]

    # ---- after a step ----

    def verified(self, sequence: SequenceState, drafted: int, right: int) -> None:
        """Take note of how many tokens of a sequence's draft were right."""
        kind = self._asked.get(sequence.number)
        if kind is not None and drafted:
            self.tally = self.tally.plus(drafted, right)
            sequence.tally = sequence.tally.plus(drafted, right)
            for each in (self._acceptance(sequence.number, kind), self._usual[kind]):
                each.observe(drafted, right)

    def timed(self, rows: int, seconds: float) -> None:
        """Take note of what a step took that only decoded, without the time of its drafts."""
        self.costs.observe(rows, seconds)

    def forget(self, sequence: SequenceState) -> None:
        """Let go of what is known of a sequence that has ended."""
        for kind in (NGRAM, ASSISTANT):
            self._own.pop((sequence.number, kind), None)
        if self.assistant is not None:
            self.assistant.forget(sequence)
