"""The library's own threads: kept asleep while the host does small things between kernels, and as many in the engine's thread as
its callers have.

A cosine of 128 numbers or a copy of one row of logits is enough to wake torch's thread pool, whose threads then spin for some
8 ms on the cores that the native kernels need: a quarter of a token's time on two cores. Refuses to know what is done meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_narrowed: list[int] = []  # the counts to return to, of threads that run alone just now


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's functions on the calling thread alone, however many threads it has otherwise; also a decorator."""
    before = torch.get_num_threads()
    _narrowed.append(before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _narrowed.pop()


def thread_count() -> int:
    """Return how many threads torch uses when the calling thread asks it to.

    Each thread has a count of its own, which begins as what any thread set last. One that begins while another one is narrowed
    by `one_thread` would stay narrow, so it gets the other one's count.
    """
    around = _narrowed[-1:]
    found = torch.get_num_threads()
    around = around or _narrowed[-1:]
    if found == 1 and around and around[0] != 1:
        found = around[0]
        torch.set_num_threads(found)
    return found
