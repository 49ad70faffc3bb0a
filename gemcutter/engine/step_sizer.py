"""How many prompt rows a step may compute, so that it lasts no longer than a given time.

Owns what was learnt of this machine: how long steps without prompt rows last, and what a prompt row adds beside them, each by
size. Costs are medians of the last few steps, so a single slow step changes nothing, and a change that stays (another program, a
deeper context) is known after three. Sizes are powers of two, because a row of a large step is cheaper than one of a small one.
Refuses to know clocks and sequences. Read `scheduler.py` for who asks, `engine.py` for who measures.
"""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 5  # steps that a cost is the median of
FIRST_ROWS = 32  # prompt rows of a step before anything is known
LEAST_ROWS = 8  # prompt rows of any step: prompts go on even where decoding alone takes all the time
FORGOTTEN = 256  # steps with prompt rows after which a size that none of them had is as good as new


class Costs:
    """Medians of seconds by size; that of a size is taken from the nearest one that was measured."""

    def __init__(self) -> None:
        self._seconds = dict[int, deque[float]]()
        self._seen = dict[int, int]()
        self._count = 0

    def add(self, size: int, seconds: float) -> None:
        """Take a measurement, and forget sizes whose own are old."""
        self._count += 1
        self._seen[size] = self._count
        self._seconds.setdefault(size, deque(maxlen=WINDOW)).append(seconds)
        for old in [known for known, seen in self._seen.items() if self._count - seen > FORGOTTEN]:
            del self._seconds[old], self._seen[old]

    @property
    def largest(self) -> int | None:
        """Return the largest size that was measured."""
        return max(self._seconds, default=None)

    def at(self, size: int) -> float:
        """Return the seconds of a size; 0 without any measurement. Of two sizes as near, the smaller one counts."""
        nearest = min(self._seconds, key=lambda known: (abs(known - size), known), default=None)
        return 0.0 if nearest is None else median(self._seconds[nearest])


class StepSizer:
    """Learns from steps, and sizes the next one to last `max_stall_s` at most."""

    def __init__(self, max_stall_s: float) -> None:
        self.max_stall_s = max_stall_s
        self._step, self._row = Costs(), Costs()  # of steps without prompt rows, and of a prompt row

    def observe(self, decode_rows: int, prompt_rows: int, seconds: float) -> None:
        """Learn from a step that was computed."""
        if prompt_rows:
            self._row.add(_size(prompt_rows), max(seconds - self._decode_s(decode_rows), 0.0) / prompt_rows)
        elif decode_rows:
            self._step.add(_size(decode_rows), seconds)

    def prompt_rows(self, decode_rows: int, most: int) -> int:
        """Return how many prompt rows, `most` at most, a step beside `decode_rows` rows may have.

        Steps grow by one size at a time, so what is not known yet is tried where little can go wrong.
        """
        largest = self._row.largest
        if largest is None:
            return min(FIRST_ROWS, most)
        left_s = self.max_stall_s - self._decode_s(decode_rows)
        for size in range(min(largest + 1, _size(most)), -1, -1):
            fits = int(left_s / max(self._row.at(size), 1e-9))
            if fits >= 1 << size:
                return min(max(min(fits, (2 << size) - 1), LEAST_ROWS), most)
        return min(LEAST_ROWS, most)

    def _decode_s(self, rows: int) -> float:
        """Return how long a step of `rows` decode rows and no others lasts, as far as it is known."""
        return self._step.at(_size(rows)) if rows else 0.0


def _size(rows: int) -> int:
    """Return the class of a number of rows: 2**size is the largest power of two in it."""
    return rows.bit_length() - 1
