"""What a format yields: one stored tensor under its canonical name.

Owns the contract between `formats/`, which know foreign names, and `match.py`, which knows the plan; each may change without
the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcutter.checkpoint.source import LazyTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tensor: which part of which parameter it is, or that it is none of the decoder's.

    `name` None means unknown to the format; a `name` in parentheses, such as "(vision tower)", is known and not the decoder's.
    """

    name: str | None
    part: str | None
    data: LazyTensor

    @property
    def label(self) -> str:
        """Name the parameter and part for a message."""
        return f"{self.name}[{self.part}]" if self.part else str(self.name)
