"""The collector's pause: a start makes a million objects and no garbage, which the cycle collector would walk again and again.

A third of a second of importing torch, and as much of reading a vocabulary, went into that. Imports nothing of gemcutter.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let the cycle collector wait, unless it is off anyway; also a decorator."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
