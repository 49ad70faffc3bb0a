"""When a reply goes round in circles, and will not end by itself.

Owns the recognition of three faults, token by token at constant cost: a cycle of ids that repeats for long, channels that open
and close with nothing in them, and runs of white space. What is legal looks much like a fault when it is short, so the limits are
wide: an array of a thousand equal numbers, a table of equal rows and indented code pass. Refuses to know text: what an id stands
for comes in `TokenClasses`. Read `engine.py` for who asks, `text/token_classes.py` for where the classes come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LONGEST_CYCLE = 256  # ids
REPEATS = 8  # of a cycle before it is a fault
# Ids that a repeated stretch must have: short cycles are elements of arrays and cells of tables, long ones are sentences.
LONG_CYCLE = 24  # ids
LEAST_OF_LONG, LEAST_OF_SHORT, LEAST_OF_DATA = 768, 1536, 6144
BLANKS = 256  # ids of white space in a row
EMPTY_CHANNELS = 8  # in a row
EMPTY_IDS = 6  # that may lie between the ends of two channels: a name, a line break, the next beginning


@dataclass(frozen=True, slots=True, eq=False)
class TokenClasses:
    """What the ids of a vocabulary stand for, as far as a watchdog must know."""

    blanks: frozenset[int] = frozenset()  # white space alone
    data: frozenset[int] = frozenset()  # no letters: numbers, punctuation, white space
    channel_end: int | None = None


class Watchdog:
    """Watches one reply."""

    def __init__(self, classes: TokenClasses) -> None:
        self._classes = classes
        self._recent = np.full(2 * LONGEST_CYCLE, -1, np.int64)  # the last ids from place `_at` on, the newest first
        self._at = LONGEST_CYCLE
        self._equal = np.zeros(LONGEST_CYCLE, np.int64)  # ids in a row, up to the last, that equal those 1, 2, ... before them
        self._blanks = self._data = 0  # ids of a class in a row
        self._channels, self._since_channel = 0, 0

    def is_lost(self, token: int) -> bool:
        """Take the next id of the reply; return whether the reply should end with it."""
        return any([self._has_blanks(token), self._has_empty_channels(token), self._has_cycle(token)])  # each counts the id

    def _has_blanks(self, token: int) -> bool:
        self._blanks = self._blanks + 1 if token in self._classes.blanks else 0
        return self._blanks >= BLANKS

    def _has_empty_channels(self, token: int) -> bool:
        self._since_channel += 1
        if token == self._classes.channel_end:
            self._channels = self._channels + 1 if self._since_channel <= EMPTY_IDS else 1
            self._since_channel = 0
        return self._channels >= EMPTY_CHANNELS

    def _has_cycle(self, token: int) -> bool:
        self._data = self._data + 1 if token in self._classes.data else 0
        self._equal += 1
        self._equal *= self._recent[self._at : self._at + LONGEST_CYCLE] == token
        self._push(token)
        found = int(np.argmax(self._equal >= NEEDED))
        if self._equal[found] < NEEDED[found]:
            return False
        # A cycle's multiples are cycles, too: the shortest one that has gone on as long is what counts.
        cycle = int(np.argmax(self._equal >= self._equal[found])) + 1
        covered = int(self._equal[cycle - 1]) + cycle
        least = LEAST_OF_DATA if self._data >= covered else LEAST_OF_LONG if cycle >= LONG_CYCLE else LEAST_OF_SHORT
        return covered >= max(REPEATS * cycle, least)

    def _push(self, token: int) -> None:
        if not self._at:  # once in LONGEST_CYCLE ids
            self._recent[LONGEST_CYCLE:] = self._recent[:LONGEST_CYCLE]
            self._at = LONGEST_CYCLE
        self._at -= 1
        self._recent[self._at] = token


# How many ids in a row must equal those 1, 2, ... before them until a cycle is worth a closer look.
NEEDED = np.array([max((REPEATS - 1) * cycle, LEAST_OF_LONG - cycle) for cycle in range(1, LONGEST_CYCLE + 1)])
