"""The library's own threads, kept asleep while the host does small things between kernels.

A cosine of 128 numbers or a copy of one row of logits is enough to wake torch's thread pool, whose threads then spin for some
8 ms on the cores that the native kernels need: a quarter of a token's time on two cores. Refuses to know what is done meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's functions on the calling thread alone, however many threads it has otherwise; also a decorator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
