"""Turns on the machine's cores: threads compute one after the other, in the order in which they asked.

Owns the queue. An image takes seconds on a CPU where a decoding step takes milliseconds: towers therefore take a turn for every
piece of a layer, and the engine one for every step, so that neither waits longer than for one piece of the other's work. Refuses
to know who computes what. Read `model/tower.py` and `engine/loop.py` for who asks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that is handed on in the order in which it was asked for; not to be taken twice by one thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = self._served = 0

    @property
    def waiting(self) -> int:
        """Count those who have asked and not begun."""
        return max(self._given - self._served - 1, 0)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for all who asked before, and keep others waiting until the block ends."""
        with self._changed:
            own = self._given
            self._given += 1
            self._changed.wait_for(lambda: self._served == own)
        try:
            yield
        finally:
            with self._changed:
                self._served += 1
                self._changed.notify_all()
