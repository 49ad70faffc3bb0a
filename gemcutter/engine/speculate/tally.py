"""What became of drafts, of one request or of all.

Owns the counts alone. Read `speculator.py` for who counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_DRAFTS = 8  # of one sequence in a step


@dataclass(slots=True)
class Tally:
    """What was guessed: verified bursts, tokens in them, and how many were right, in all and at each place."""

    bursts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)

    def add(self, drafted: int, right: int) -> None:
        """Count a burst."""
        self.bursts += 1
        self.drafted += drafted
        self.accepted += right
        for place in range(min(right, MOST_DRAFTS)):
            self.accepted_at[place] += 1
