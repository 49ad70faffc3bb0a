"""Which examples stand before a question: the first of a split, or a random draw as lm-eval makes it.

Owns the choice; refuses to know what an example looks like.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from gemcutter.errors import RequestError

T = TypeVar("T")
SEED = 1234  # of lm-eval's draws, unless its user gives another


def first(pool: Sequence[T], count: int, what: str) -> Sequence[T]:
    """Return the first examples of a split, `what` names it. Raises RequestError where it has too few."""
    _check(pool, count, what)
    return pool[:count]


def draws(pool: Sequence[T], count: int, what: str, questions: Iterable[T], *, leaves_out: bool = False) -> Iterator[list[T]]:
    """Yield the examples of each question in turn, as lm-eval 0.4.13 draws them: they depend on how many draws came before.

    Where `leaves_out`, one more is drawn, and the question itself left out: lm-eval does so where it can't tell the split of the
    examples from the test's. Raises RequestError where the split, named by `what`, has too few.
    """
    _check(pool, count + (leaves_out and count > 0), what)
    generator = random.Random(SEED)
    for question in questions:
        if not count:
            yield []
        elif not leaves_out:
            yield generator.sample(pool, count)
        else:
            found = [each for each in generator.sample(pool, count + 1) if each != question][:count]
            if len(found) < count:  # the question is there more than once
                found = generator.sample([each for each in pool if each != question], count)
            yield found


def _check(pool: Sequence[T], count: int, what: str) -> None:
    if count > len(pool):
        raise RequestError(f"{what}: {count} examples are wanted, and there are {len(pool)}; give fewer with --shots")
