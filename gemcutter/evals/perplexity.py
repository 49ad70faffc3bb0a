"""How well a model predicts a text: windows of ids, the loss of every token that counts, and their mean.

Owns the cut of a text into windows and which token counts in which; log-probabilities come from `scoring.py`. Refuses to know
files and command lines. Read `tasks/perplexity.py` for the task, `cli/score.py` for the command.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemcutter.errors import RequestError

if TYPE_CHECKING:
    from gemcutter.engine.loop import EngineLoop

WINDOW = 512  # tokens
LARGEST_EXPONENT = 700.0  # a perplexity beyond it is no float


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of ids that is predicted on its own; the first `context` tokens, at least 1, do not count."""

    ids: tuple[int, ...]
    context: int = 1

    @property
    def counted(self) -> int:
        """Count the tokens whose log-probability enters the mean."""
        return len(self.ids) - self.context


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The mean negative log-likelihood in nats per token, and its exponential, the perplexity.

    The errors are the standard errors that these would have if tokens were independent of each other.
    """

    nll: float
    nll_error: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Return exp(nll), infinite where no float holds it."""
        return exponential(self.nll)

    @property
    def perplexity_error(self) -> float:
        """Return the perplexity's error to first order, as other programs give it."""
        return self.perplexity * self.nll_error


def exponential(value: float) -> float:
    """Return the exponential, infinite where no float holds it."""
    return math.inf if value >= LARGEST_EXPONENT else math.exp(value)


def cut(ids: Sequence[int], bos: int, length: int, stride: int) -> Iterator[Window]:
    """Cut ids into windows of `length` that start with `bos` and lie `stride` <= length - 1 apart; each token counts once.

    A `bos` that the ids bring along is not one of the tokens to predict.
    """
    body = ids[1:] if ids[0] == bos else ids
    start = counted = 0
    while counted < len(body):
        end = min(start + length - 1, len(body))
        yield Window((bos, *body[start:end]), 1 + counted - start)
        start, counted = start + stride, end


def losses(loop: EngineLoop, windows: Sequence[Window], in_flight: int) -> Iterator[tuple[float, ...]]:
    """Yield the negative log-probabilities of a window's counted tokens, window by window as they are found.

    Windows without such tokens are left out. Raises RequestError for ids outside the vocabulary and windows that are too long.
    """
    from gemcutter.scoring import Pair, score_pairs  # which imports torch

    pairs = [Pair(each.ids[: each.context], each.ids[each.context :]) for each in windows if each.counted > 0]
    for _, score in score_pairs(loop, pairs, in_flight=in_flight):
        yield tuple(-each for each in score.logprobs)


def mean_of(found: Sequence[float]) -> Likelihood:
    """Return the mean of losses, at least one. Raises RequestError where it is no number."""
    count, mean = len(found), math.fsum(found) / len(found)
    if not math.isfinite(mean):
        raise RequestError(
            "the likelihood is not a number: some of the model's weights or states are not finite; `gemcutter verify` names the "
            "first layer concerned"
        )
    spread = math.sqrt(math.fsum((loss - mean) ** 2 for loss in found) / max(count - 1, 1))
    return Likelihood(mean, spread / math.sqrt(count), count)
