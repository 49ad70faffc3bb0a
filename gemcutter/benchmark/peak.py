"""What the processor's multiplying instructions can do at best: loops of nothing else, on registers alone, on all threads.

Owns the length of the loops; they are the library's (`csrc/cpu/peak.cpp`). Each thread's rate counts in the time that it had a
core, so that other programs on the machine do not make the ceiling look lower. Refuses to know what kernels reach of it.
"""

from __future__ import annotations

import ctypes

import torch

from gemcutter import native
from gemcutter.cores import quota_cores

KINDS = ("float32", "int8", "bfloat16")
LEAST_S = 0.02  # of a loop: many times what a clock or an interrupt takes
FIRST_ROUNDS = 1 << 12
TRIES = 5  # the best of which counts


def peak_rates() -> dict[str, float]:
    """Measure the operations per second, two for a product and its sum, of each kind of product that the kernels' level has.

    Empty without native kernels.
    """
    rates = {kind: _rate(kind) for kind in KINDS}
    return {kind: rate for kind, rate in rates.items() if rate is not None}


def _rate(kind: str) -> float | None:
    rounds = FIRST_ROUNDS
    while (found := _run(kind, rounds)) is not None:
        if min(seconds for _, seconds in found) >= LEAST_S:
            return max(_sum(found), *(_sum(_run(kind, rounds) or []) for _ in range(TRIES - 1)))
        rounds *= 2
    return None


def _sum(found: list[tuple[float, float]]) -> float:
    return sum(operations / seconds for operations, seconds in found)


def _run(kind: str, rounds: int) -> list[tuple[float, float]] | None:
    """Run one loop on every thread: the operations and the seconds of each. None where there is no such loop."""
    library = native.load_library()
    if library is None:
        return None
    threads = torch.get_num_threads()
    threads = min(threads, quota_cores() or threads)  # as many as kernels get
    library.gc_set_threads(threads)
    operations, seconds = (ctypes.c_double * threads)(), (ctypes.c_double * threads)()
    if library.gc_peak(kind.encode(), ctypes.c_int64(rounds), operations, seconds):
        return None
    return [(count, spent) for count, spent in zip(operations, seconds, strict=True) if spent > 0]
