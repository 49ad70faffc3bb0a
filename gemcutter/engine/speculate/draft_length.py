"""How many tokens to guess: as many as make tokens come fastest, by what was accepted and what steps took so far.

Owns the estimate of acceptance at each place of a draft, and the table of what steps of so many rows take on this machine; from
both the number of drafts for each sequence of the next step follows. Where no draft pays, one is tried now and then, since texts
change. Refuses to know models and who guesses. Read `speculator.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from gemcutter.engine.speculate.tally import MOST_DRAFTS

PRIOR = 0.8  # of a draft to be right, before any was verified: too high rather than too low, as what is tried is learnt
WEIGHT = 0.1  # of a new outcome in an estimate
FASTER_WEIGHT, SLOWER_WEIGHT = 0.3, 0.05  # of a new time in an estimate: other work on the machine only ever adds to it
PRIOR_ROW = 0.1  # of the time of a step, that one more row is thought to take until it was measured
SHORT_CONTEXT = 4096  # keys up to which all steps of so many rows take about the same time
PROBE_TOKENS = 64  # that a sequence gets without drafts until one is tried again
CHEAPER = 1.02  # how much faster drafts must promise to be, since estimates are noisy


@dataclass(slots=True)
class Acceptance:
    """How often the draft at each place was right, given that all before it were."""

    rates: list[float] = field(default_factory=lambda: [PRIOR] * MOST_DRAFTS)
    idle_tokens: int = 0  # that came without a draft

    def observe(self, drafts: int, right: int) -> None:
        """Take note of a verified draft: its first `right` tokens were right, the one after them was not, if there was one."""
        for place in range(min(drafts, right + 1, MOST_DRAFTS)):
            self.rates[place] += WEIGHT * (float(place < right) - self.rates[place])

    def survivals(self, limit: int) -> tuple[float, ...]:
        """Return for each of the first `limit` places how likely a draft is right there together with all before it."""
        return tuple(accumulate(self.rates[: max(limit, 0)], mul))


class StepCosts:
    """What steps take that only decode, in seconds, by their rows and the keys that these see; and one more token of a draft.

    Longer contexts make every step longer, so each class of them has a table of its own; what was not measured there follows
    from a neighbouring class, as far as one number of rows was measured in both.
    """

    def __init__(self) -> None:
        self._tables: dict[int, dict[int, float]] = {}
        self.draft_s = 0.0

    def observe(self, rows: int, seconds: float, keys: int = 0) -> None:
        """Take note of a step whose sequences held so many keys."""
        table = self._tables.setdefault(_class_of(keys), {})
        table[rows] = _moved(table[rows], seconds) if rows in table else seconds

    def observe_drafts(self, tokens: int, seconds: float) -> None:
        """Take note of a burst of drafts, `tokens` long."""
        each = seconds / tokens
        self.draft_s = _moved(self.draft_s, each) if self.draft_s else each

    def __call__(self, rows: int, keys: int = 0) -> float | None:
        """Return what a step of so many rows should take; None while no step was measured."""
        if not self._tables:
            return None
        wanted = _class_of(keys)
        near = sorted(self._tables, key=lambda each: abs(each - wanted))
        own = self._tables[near[0]]
        for other in map(self._tables.__getitem__, near[1:]):
            if rows not in own and rows in other and (common := own.keys() & other.keys()):
                most = max(common, key=lambda each: (-abs(each - rows), each))
                return other[rows] * own[most] / other[most]
        return _between(own, rows)


def _class_of(keys: int) -> int:
    """Return the class of a number of keys: all below `SHORT_CONTEXT`, then one for each doubling."""
    return (keys // SHORT_CONTEXT).bit_length()


def _between(table: Mapping[int, float], rows: int) -> float:
    """Return a step's time between those of fewer and of more rows, or beyond them."""
    if rows in table:
        return table[rows]
    below = max((known for known in table if known < rows), default=None)
    above = min((known for known in table if known > rows), default=None)
    if below is not None and above is not None:
        return table[below] + (table[above] - table[below]) * (rows - below) / (above - below)
    if below is not None:
        return table[below] * (1 + PRIOR_ROW * (rows - below))
    assert above is not None
    return table[above] / (1 + PRIOR_ROW * (above - rows))


def _moved(known: float, seconds: float) -> float:
    """Return an estimate of a time after one more measurement."""
    weight = FASTER_WEIGHT if seconds < known else SLOWER_WEIGHT
    return known + weight * (min(seconds, 2 * known) - known)  # a hiccup is no news


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that may get drafts, and how likely each place's is right together with all before it.

    `is_free` drafts cost no time: they are there already.
    """

    number: int
    survivals: Sequence[float]
    is_free: bool = False


def count_drafts(
    candidates: Sequence[Candidate], others: int, room: int, costs: StepCosts, keys: int = 0, cheaper: float = CHEAPER
) -> dict[int, int]:
    """Return how many drafts each sequence gets, by number, so that the step's tokens per second are the most to be expected.

    `others` rows are in the step beside the candidates' own; at most `room` drafts fit; all sequences together hold `keys`. By
    `cheaper` times drafts must beat none.
    """
    places = sorted(
        ((chance, -place, each) for each in candidates for place, chance in enumerate(each.survivals[:MOST_DRAFTS])),
        key=lambda found: found[:2],
        reverse=True,
    )
    rows = others + len(candidates)
    plain_s = costs(rows, keys)
    chosen = dict.fromkeys((each.number for each in candidates), 0)
    if plain_s is None:  # measure a step without drafts first
        return chosen
    best, best_rate = dict(chosen), len(candidates) / plain_s * cheaper
    expected, asked = float(len(candidates)), 0
    for count, (chance, place, each) in enumerate(places[:room], start=1):
        chosen[each.number] += 1
        expected += chance
        asked = asked if each.is_free else max(asked, 1 - place)
        seconds = costs(rows + count, keys)
        assert seconds is not None
        rate = expected / (seconds + asked * costs.draft_s)
        if rate > best_rate:
            best, best_rate = dict(chosen), rate
    return best
