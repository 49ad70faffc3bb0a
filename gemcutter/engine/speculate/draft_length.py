"""How many tokens to guess: as many as make tokens come fastest, by what was accepted and what steps took so far.

Owns the estimate of acceptance at each place of a draft, and the table of what steps of so many rows take on this machine; from
both the number of drafts for each sequence of the next step follows. Where no draft pays, one is tried now and then, since texts
change. Refuses to know models and who guesses. Read `speculator.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gemcutter.engine.speculate.tally import MOST_DRAFTS

PRIOR = 0.8  # of a draft to be right, before any was verified: too high rather than too low, as what is tried is learnt
WEIGHT = 0.1  # of a new outcome in an estimate
FASTER_WEIGHT, SLOWER_WEIGHT = 0.3, 0.05  # of a new time in an estimate: other work on the machine only ever adds to it
PRIOR_ROW = 0.1  # of the time of a step, that one more row is thought to take until it was measured
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

    def survival(self, place: int) -> float:
        """Return how likely a draft is right up to and including this place."""
        found = 1.0
        for rate in self.rates[: place + 1]:
            found *= rate
        return found


class StepCosts:
    """What steps take that only decode, in seconds, by their rows; and what one more token of a draft takes."""

    def __init__(self) -> None:
        self._by_rows: dict[int, float] = {}
        self.draft_s = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Take note of a step."""
        known = self._by_rows.get(rows)
        if known is None:
            self._by_rows[rows] = seconds
        else:
            self._by_rows[rows] = _moved(known, seconds)

    def observe_drafts(self, tokens: int, seconds: float) -> None:
        """Take note of a burst of drafts, `tokens` long."""
        each = seconds / tokens
        self.draft_s = _moved(self.draft_s, each) if self.draft_s else each

    def __call__(self, rows: int) -> float | None:
        """Return what a step of so many rows should take; None while no step was measured."""
        if not self._by_rows:
            return None
        if rows in self._by_rows:
            return self._by_rows[rows]
        below = max((known for known in self._by_rows if known < rows), default=None)
        above = min((known for known in self._by_rows if known > rows), default=None)
        if below is not None and above is not None:
            low, high = self._by_rows[below], self._by_rows[above]
            return low + (high - low) * (rows - below) / (above - below)
        if below is not None:
            return self._by_rows[below] * (1 + PRIOR_ROW * (rows - below))
        assert above is not None
        return self._by_rows[above] / (1 + PRIOR_ROW * (above - rows))


def _moved(known: float, seconds: float) -> float:
    """Return an estimate of a time after one more measurement."""
    weight = FASTER_WEIGHT if seconds < known else SLOWER_WEIGHT
    return known + weight * (min(seconds, 2 * known) - known)  # a hiccup is no news


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that may get up to `limit` drafts, which `acceptance` is the estimate for; `is_free` drafts cost no time."""

    number: int
    limit: int
    acceptance: Acceptance
    is_free: bool = False


def count_drafts(candidates: Sequence[Candidate], others: int, room: int, costs: StepCosts) -> Mapping[int, int]:
    """Return how many drafts each sequence gets, by number, so that the step's tokens per second are the most to be expected.

    `others` rows are in the step beside the candidates' own; at most `room` drafts fit.
    """
    places = sorted(
        ((each.acceptance.survival(place), -place, each) for each in candidates for place in range(min(each.limit, MOST_DRAFTS))),
        key=lambda found: found[:2],
        reverse=True,
    )
    rows = others + len(candidates)
    plain_s = costs(rows)
    chosen = dict.fromkeys((each.number for each in candidates), 0)
    if plain_s is None:  # measure a step without drafts first
        return chosen
    best, best_rate = dict(chosen), len(candidates) / plain_s * CHEAPER
    expected, asked = float(len(candidates)), 0
    for count, (chance, place, each) in enumerate(places[:room], start=1):
        chosen[each.number] += 1
        expected += chance
        asked = asked if each.is_free else max(asked, 1 - place)
        seconds = costs(rows + count)
        assert seconds is not None
        rate = expected / (seconds + asked * costs.draft_s)
        if rate > best_rate:
            best, best_rate = dict(chosen), rate
    return best
