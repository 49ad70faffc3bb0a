"""How sure a drafter is of its drafts, and how often it was right when it was so sure.

Owns `Guess`, what a proposer returns, and the table from a draft's probability to the rate at which the target agrees, learnt
from what was verified: assistants are over-confident on some texts and quantizations, and far too modest on others. Refuses to
know who drafts. Read `draft_length.py` for the number of drafts that follows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul

EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # between classes of probability
WEIGHT = 0.05  # of a new outcome in a class's rate
FIRST_WEIGHT = 8  # outcomes that the first estimate of a class counts for


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that may come next, and how likely each was in the drafter's eyes; None where it has no probabilities."""

    tokens: tuple[int, ...]
    chances: tuple[float, ...] | None = None

    def first(self, count: int) -> Guess:
        """Return the first `count` tokens."""
        return Guess(self.tokens[:count], None if self.chances is None else self.chances[:count])


class Calibration:
    """How often drafts of each class of probability were right, given that all before them were."""

    def __init__(self) -> None:
        bounds = (0.0, *EDGES, 1.0)
        self._rates = [(low + high) / 2 for low, high in pairwise(bounds)]  # taken at its word at first
        self._seen = [FIRST_WEIGHT] * len(self._rates)

    def rate(self, chance: float) -> float:
        """Return how often a draft of this probability is right."""
        return self._rates[bisect_right(EDGES, chance)]

    def survivals(self, chances: Sequence[float]) -> tuple[float, ...]:
        """Return for each draft of a burst how likely it is right together with all before it."""
        return tuple(accumulate(map(self.rate, chances), mul))

    def observe(self, chances: Sequence[float], right: int) -> None:
        """Take note of a verified burst: its first `right` drafts were right, the one after them was not, if there was one."""
        for place, chance in enumerate(chances[: right + 1]):
            index = bisect_right(EDGES, chance)
            self._seen[index] += 1
            weight = max(WEIGHT, 1 / self._seen[index])
            self._rates[index] += weight * (float(place < right) - self._rates[index])
