"""When requests arrive: all at once, at fixed intervals, as a Poisson process, or in bursts.

Owns the drawing of arrival times. Refuses to wait for them. Read `load.py` for who keeps to them.
"""

from __future__ import annotations

import math

import numpy as np


def arrival_times(count: int, rate: float, burstiness: float = 1.0, seed: int = 0, *, exact_rate: bool = False) -> list[float]:
    """Return when each of `count` requests arrives, in seconds after the start, in order.

    Intervals follow a gamma distribution of mean 1 / `rate`, whose shape is `burstiness`: 1 is a Poisson process, below 1 come
    bursts, above 1 it is more regular, and infinity is a fixed interval. A `rate` of infinity sends all at once. As in sglang's
    benchmark the first request arrives at 0. With `exact_rate`, as in vLLM's, the first one waits for an interval, too, and
    times are scaled so that the last arrives after exactly count / `rate` seconds.
    """
    if math.isinf(rate) or not count:
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = np.full(count, 1.0 / rate)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), count)
    if not exact_rate:
        gaps[0] = 0.0
    times = np.cumsum(gaps)
    if exact_rate:
        times *= count / rate / times[-1]
    found: list[float] = times.tolist()
    return found
