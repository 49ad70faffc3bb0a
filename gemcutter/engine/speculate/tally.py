"""What became of drafts, of one request or of all.

Owns the counts alone. Read `speculator.py` for who counts.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_DRAFTS = 8  # of one sequence in a step


@dataclass(frozen=True, slots=True)
class Tally:
    """What was guessed: verified bursts, tokens in them, and how many were right, in all and at each place."""

    bursts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = (0,) * MOST_DRAFTS

    def plus(self, drafted: int, right: int) -> Tally:
        """Return the counts with one burst more."""
        at = tuple(count + (place < right) for place, count in enumerate(self.accepted_at))
        return Tally(self.bursts + 1, self.drafted + drafted, self.accepted + right, at)


NO_DRAFTS = Tally()
