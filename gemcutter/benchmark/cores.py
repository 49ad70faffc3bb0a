"""Whether a run got its cores: how long its threads were ready to run and waited for one.

Owns the rule that a disturbed run is repeated. On Linux the system counts the waiting of each thread; elsewhere what the calling
thread, which is never idle during a run, lacks of the time that passed stands for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gemcutter.cores import core_count

DISTURBED = 0.05  # of the threads' time: other programs took more than noise
TASKS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class Run:
    """What was counted, the seconds it took, and the share of the threads' time in which they had no core."""

    tokens: int
    seconds: float
    lost: float


def timed(work: Callable[[], tuple[int, float]]) -> Run:
    """Run something that returns its tokens and seconds, and say how much of its cores it lost meanwhile."""
    waited, cpu, started = _waited_s(), time.thread_time(), time.perf_counter()
    tokens, seconds = work()
    passed, now = time.perf_counter() - started, _waited_s()
    threads = min(torch.get_num_threads(), core_count())
    lost = passed - (time.thread_time() - cpu) if waited is None or now is None else (now - waited) / threads
    return Run(tokens, seconds, min(1.0, max(0.0, lost / passed)))


def undisturbed(work: Callable[[], tuple[int, float]], repeats: int) -> tuple[list[Run], int]:
    """Run `repeats` times, and as often again at most for runs that were disturbed; the least disturbed ones count.

    Returns these in their order, and how many all in all were disturbed.
    """
    runs = [timed(work) for _ in range(repeats)]
    disturbed = sum(run.lost > DISTURBED for run in runs)
    runs += [timed(work) for _ in range(disturbed)]
    chosen = sorted(sorted(range(len(runs)), key=lambda place: runs[place].lost)[:repeats])
    return [runs[place] for place in chosen], sum(run.lost > DISTURBED for run in runs)


def _waited_s() -> float | None:
    """Sum what all threads of this process have waited for a core so far; None where the system does not count it."""
    total = 0
    try:
        for task in TASKS.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended just now
                total += int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9
