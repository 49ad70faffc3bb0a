"""Guesses that what followed the last tokens before follows them again: quotes, code, JSON, repeated names.

Owns an index of the places of every run of `SHORTEST` ids in a sequence, which grows with it. Shorter runs match by chance, and
corrupt nothing here, but cost steps. Refuses to know models. Read `speculator.py` for who asks.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from gemcutter.engine.request import SequenceState

SHORTEST = 5  # ids that must be equal


class _Places:
    """Where each run of ids of one sequence was last seen."""

    def __init__(self) -> None:
        self.last: dict[tuple[int, ...], int] = {}  # the position after the run
        self.read = 0  # positions whose runs are in `last`: those that something follows


class NgramProposer:
    """Looks sequences up in themselves."""

    def __init__(self, shortest: int = SHORTEST) -> None:
        self._shortest = shortest
        self._places: WeakKeyDictionary[SequenceState, _Places] = WeakKeyDictionary()

    def propose(self, sequence: SequenceState, limit: int) -> tuple[int, ...]:
        """Return up to `limit` ids that followed the last place where the sequence had its last ids; none where it never had."""
        size, known = self._shortest, self._places.setdefault(sequence, _Places())
        length = sequence.num_tokens
        if length <= size:
            return ()
        first = max(min(known.read - size + 1, length - size), 0)  # ids that runs not yet read begin with
        ids = sequence.ids(first, length)
        for end in range(max(known.read, size), length):  # the run that ends with the sequence has nothing after it yet
            known.last[ids[end - size - first : end - first]] = end
        known.read = length
        place = known.last.get(ids[-size:])
        return () if place is None else sequence.ids(place, min(place + limit, length))
