"""The arithmetic of results: intervals of shares, and whether two runs differ.

Owns formulas alone. Sources: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927;
Q. McNemar, "Note on the sampling error of the difference between correlated proportions", 1947, in its exact form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054  # of the normal distribution, for 95 percent on both sides together


def wilson(right: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Return the interval of a share of which `right` in `count` were seen; (0, 1) for none."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, z * z
    middle = (share + square / (2 * count)) / (1 + square / count)
    reach = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Return a mean by weights and its standard error, 0 below two values; (0, 0) for none.

    With equal weights that is the sample's deviation over the root of its size, as lm-eval gives it.
    """
    count, total = len(values), math.fsum(weights)
    if not total:
        return 0.0, 0.0
    mean = math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / total
    if count < 2:
        return mean, 0.0
    square = math.fsum((weight / total * (value - mean)) ** 2 for weight, value in zip(weights, values, strict=True))
    return mean, math.sqrt(square * count / (count - 1))


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a plain mean."""
    return weighted_mean(values, [1.0] * len(values))[1]


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test: how likely so uneven a split of the differing pairs is by chance alone."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    if only_first == only_second:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(2 * tail / (1 << count), 1.0)
