"""Speculation as the scheduler and the engine see it: drafts for a step's sequences, and what became of them.

Owns who is asked for a draft (a lookup, if it has one and is right as often as the model), the number of drafts, the estimates
that it follows from, and the tallies. Verification is exact whatever is guessed, so nothing here changes a reply. Refuses to know
rows and pages. Read `draft_length.py` for the number, `confidence.py` for how sure a model is, `ngram.py` and `assistant.py` for
the guesses.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gemcutter.engine.request import SequenceState
from gemcutter.engine.speculate.confidence import Calibration, Guess
from gemcutter.engine.speculate.draft_length import PROBE_TOKENS, Acceptance, Candidate, StepCosts, count_drafts
from gemcutter.engine.speculate.tally import MOST_DRAFTS, NO_DRAFTS
from gemcutter.errors import RequestError, spell_value

Drafts = dict[int, tuple[int, ...]]  # by the numbers of their sequences
NGRAM, ASSISTANT = "ngram", "assistant"
REST_STEPS = 8  # without a thought of drafts after one in which none paid: on small models thinking is a twentieth of a step
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

    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> dict[int, Guess]:
        """Return up to as many drafts as stand beside each sequence; all can be drafted for, and none has rows reserved."""

    def forget(self, sequence: SequenceState) -> None:
        """Let go of what is kept for a sequence that has ended."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step before it has drafts: its rows, how many drafts fit, and how many keys those that may get some hold."""

    rows: int
    room: int
    keys: int


def _kind(number: int, found: Collection[int]) -> str:
    return NGRAM if number in found else ASSISTANT


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
        self.calibration = Calibration()
        self._asked: dict[int, tuple[str, Guess]] = {}  # who guessed what in the step under way, by sequence
        self._resting: tuple[int, ...] = ()  # for whom no draft paid when it was last considered
        self._rested = 0  # steps since then
        self._probing: set[int] = set()  # who gets a draft in it only to learn whether drafts have come to pay

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
        self._probing.clear()
        room = min(room, MOST_ROWS - others - len(wanted))
        if room <= 0:
            return {}
        found = self._look_up(wanted)
        if self._rests(wanted, found):
            return {}
        if self.draft_tokens is None:
            found = {number: guess for number, guess in found.items() if not self._asks_rather(number, guess, wanted)}
        limits = {sequence.number: limit for sequence, limit in wanted if sequence.number in found or self._can_ask(sequence)}
        limits |= {number: len(guess.tokens) for number, guess in found.items()}
        step = _Step(others + len(wanted), room, sum(sequence.num_tokens for sequence, _ in wanted))
        counts = self._counts(limits, found, step)
        self._resting = () if any(counts.values()) else tuple(sequence.number for sequence, _ in wanted)
        self._rested = 0
        bursts = [(one, counts[one.number]) for one, _ in wanted if one.number not in found and counts.get(one.number)]
        guesses = {number: guess.first(counts[number]) for number, guess in found.items() if counts[number]}
        guesses |= self._ask(bursts)
        if bursts and self.draft_tokens is None:
            guesses = self._shorten(guesses, set(found), step)
        self._asked |= {number: (_kind(number, found), guess) for number, guess in guesses.items()}
        return {number: guess.tokens for number, guess in guesses.items()}

    def _rests(self, wanted: Sequence[tuple[SequenceState, int]], found: Mapping[int, Guess]) -> bool:
        """Return whether no draft paid for the same sequences a few steps ago, and nothing new was looked up."""
        if found or self.draft_tokens is not None or self._rested >= REST_STEPS or not self._resting:
            return False
        if self._resting != tuple(sequence.number for sequence, _ in wanted):
            return False
        self._rested += 1
        return True

    def _look_up(self, wanted: Sequence[tuple[SequenceState, int]]) -> dict[int, Guess]:
        if self.ngram is None:
            return {}
        found = ((sequence, self.ngram.propose(sequence, min(limit, MOST_DRAFTS))) for sequence, limit in wanted if limit > 0)
        return {sequence.number: Guess(ids) for sequence, ids in found if ids}

    def _asks_rather(self, number: int, guess: Guess, wanted: Sequence[tuple[SequenceState, int]]) -> bool:
        """Return whether the model can be asked and is expected to be right more often than what was looked up."""
        limit = next((limit for sequence, limit in wanted if sequence.number == number and self._can_ask(sequence)), 0)
        looked_up = self._acceptance(number, NGRAM).survivals(len(guess.tokens))
        return sum(self._acceptance(number, ASSISTANT).survivals(min(limit, MOST_DRAFTS))) > sum(looked_up)

    def _can_ask(self, sequence: SequenceState) -> bool:
        return self.assistant is not None and self.assistant.can_draft(sequence)

    def _ask(self, bursts: Sequence[tuple[SequenceState, int]]) -> dict[int, Guess]:
        """Return the model's guesses, and note what they took."""
        if not bursts or self.assistant is None:
            return {}
        started_s = self.clock()
        made = self.assistant.propose(bursts)
        if made:
            self.costs.observe_drafts(max(len(guess.tokens) for guess in made.values()), self.clock() - started_s)
        return made

    def _counts(self, limits: Mapping[int, int], found: Mapping[int, Guess], step: _Step) -> dict[int, int]:
        """Return how many drafts each sequence gets, before any model was asked."""
        room = step.room
        if self.draft_tokens is not None:
            counts = dict[int, int]()
            for number, limit in limits.items():
                counts[number] = min(limit, self.draft_tokens, room)
                room -= counts[number]
            return counts
        acceptances = {number: self._acceptance(number, _kind(number, found)) for number in limits}
        candidates = [Candidate(each, acceptances[each].survivals(limits[each]), is_free=each in found) for each in limits]
        counts = count_drafts(candidates, step.rows - len(candidates), room, self.costs, step.keys)
        for number, each in acceptances.items():  # one that never gets a draft would never be known to deserve one
            each.idle_tokens = 0 if counts[number] else each.idle_tokens + 1 + self._rested
            is_due = each.idle_tokens > PROBE_TOKENS and self.costs(1) is not None
            if is_due and min(limits[number], room - sum(counts.values())) > 0:
                counts[number] = 1
                each.idle_tokens = 0
                self._probing.add(number)
        return counts

    def _shorten(self, guesses: Mapping[int, Guess], found: Collection[int], step: _Step) -> dict[int, Guess]:
        """Return the drafts that pay now that it is known how sure the model is of each."""
        candidates = [
            Candidate(number, self._survivals(number, guess, _kind(number, found)), is_free=True)
            for number, guess in guesses.items()
        ]
        others = step.rows - len(candidates)
        counts = count_drafts(candidates, others, step.room, self.costs, step.keys, cheaper=1.0)
        counts |= dict.fromkeys(self._probing & guesses.keys(), 1)
        return {number: guess.first(counts[number]) for number, guess in guesses.items() if counts[number]}

    def _survivals(self, number: int, guess: Guess, kind: str) -> Sequence[float]:
        if guess.chances is None:
            return self._acceptance(number, kind).survivals(len(guess.tokens))
        return self.calibration.survivals(guess.chances)

    def _acceptance(self, number: int, kind: str) -> Acceptance:
        if (number, kind) not in self._own:
            self._own[number, kind] = Acceptance(list(self._usual[kind].rates))
        return self._own[number, kind]

    # ---- after a step ----

    def verified(self, sequence: SequenceState, drafted: int, compared: int, right: int) -> None:
        """Take note of a draft: its tokens, and how many of them were compared, up to the first wrong one or the reply's end."""
        kind, guess = self._asked.get(sequence.number, (None, None))
        if kind is not None and guess is not None and drafted:
            if guess.chances is not None:
                self.calibration.observe(guess.chances[:compared], right)
            self.tally = self.tally.plus(drafted, right)
            sequence.tally = sequence.tally.plus(drafted, right)
            for each in (self._acceptance(sequence.number, kind), self._usual[kind]):
                each.observe(compared, right)

    def timed(self, rows: int, keys: int, seconds: float) -> None:
        """Take note of what a step took that only decoded, without the time of its drafts; its sequences hold `keys` tokens."""
        self.costs.observe(rows, seconds, keys)

    def forget(self, sequence: SequenceState) -> None:
        """Let go of what is known of a sequence that has ended."""
        for kind in (NGRAM, ASSISTANT):
            self._own.pop((sequence.number, kind), None)
        if self.assistant is not None:
            self.assistant.forget(sequence)
