"""Low-rank changes that a weight carries beside its parts, for the rows of a step that ask for them.

Owns `Delta` and how it is cut along with its weight; refuses to know files and steps. Read `ops/lora.py` for who applies
deltas, `carried.py` for parameters that carry them, `checkpoint/load/adapters.py` for who makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to rows `start` and on of a weight: up [rows, r] times down [r, columns].

    Both are float32, the adapter's scale is in `up`; a stack of experts has them as [experts, rows, r] and [experts, r, columns].
    """

    adapter: str
    start: int
    down: Tensor
    up: Tensor


def cut_deltas(deltas: Iterable[Delta], start: int, stop: int, to: int = 0) -> Iterator[Delta]:
    """Return what deltas add to rows start to stop - 1 of their weight, where those become rows `to` and on of another."""
    for delta in deltas:
        low, high = max(start, delta.start), min(stop, delta.start + delta.up.shape[-2])
        if low < high:
            yield replace(delta, start=to + low - start, up=delta.up[..., low - delta.start : high - delta.start, :])
