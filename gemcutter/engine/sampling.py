"""How a request wants its tokens sampled, and the arithmetic behind it for one row of logits.

Owns `SamplingParams`, log-probabilities, truncation and the random number of a token, which depends on seed and absolute position
alone: the same seed gives the same tokens alone, in a batch, and after a preemption. Refuses to know sequences, batches and text.
Read `sampler.py` for rows of many requests. Shape letters: V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemcutter.errors import NumericError, RequestError, spell_value

LARGEST = 1e30  # of a factor or summand: float32 holds its products with any logit
SMALLEST = 1e-30
COLDEST = 1e-100  # the least temperature above 0: logits divided by it are finite in float64


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_summand(value: Any) -> bool:
    return _is_number(value) and abs(value) <= LARGEST


def _are_biases(value: Any) -> bool:
    return all(_is_int(token) and (_is_summand(bias) or bias == -math.inf) for token, bias in value.items())


FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda value: _is_number(value) and (value == 0 or COLDEST <= value <= LARGEST),
        "0 (greedy), or a number above it",
    ),
    "top_k": (lambda value: _is_int(value) and 0 <= value < 2**63, "0 (off) or a count"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "above 0, at most 1"),
    "min_p": (lambda value: _is_number(value) and 0 <= value < 1, "from 0, below 1"),
    "repetition_penalty": (lambda value: _is_number(value) and SMALLEST <= value <= LARGEST, "a number above 0"),
    "presence_penalty": (_is_summand, "a finite number"),
    "frequency_penalty": (_is_summand, "a finite number"),
    "logit_bias": (_are_biases, "ids with finite numbers or -inf"),
    "suppress": (lambda value: isinstance(value, list | tuple) and all(map(_is_int, value)), "a list of ids"),
    "seed": (lambda value: value is None or (_is_int(value) and 0 <= value < 2**64), "from 0 to 2**64 - 1"),
    "logprobs": (lambda value: value is None or (_is_int(value) and value >= 0), "a count"),
}


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    """Apply a check to a value that may be of any type."""
    try:
        return check(value)
    except (TypeError, AttributeError, OverflowError):
        return False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is sampled. The defaults are greedy; a `temperature` above 0 samples.

    Order: soft cap (in the head), the request's logits processors, suppressed ids and bias, penalties, temperature, top-k, top-p,
    min-p. `repetition_penalty` looks at prompt and reply, presence and frequency penalties at the reply. `logprobs` asks for the
    n best log-probabilities of each token, taken before all processors, biases and penalties. Raises RequestError with every
    field of a wrong kind or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    suppress: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"sampling.{name}: expected {want}, found {spell_value(getattr(self, name))}"
            for name, (holds, want) in FIELDS.items()
            if not _holds(holds, getattr(self, name))
        ]
        if problems:
            raise RequestError("the sampling options can't be used", problems)

    @property
    def is_plain_greedy(self) -> bool:
        """Return whether the choice is the arg max of the logits as they are."""
        return self.temperature == 0 and not self.alters_logits

    @property
    def has_penalties(self) -> bool:
        """Return whether the choice depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def alters_logits(self) -> bool:
        """Return whether bias, suppression or penalties change the logits."""
        return self.has_penalties or bool(self.logit_bias or self.suppress)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token and the best alternatives as (id, log-probability), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def is_finite(x: Tensor) -> bool:
    """Return whether all elements are finite."""
    return bool(torch.isfinite(x).all())


def not_finite(where: str = "; is the checkpoint damaged?") -> NumericError:
    """Return the error of logits that are not finite."""
    return NumericError(
        f"the logits are not finite (NaN or infinity){where}; `gemcutter doctor MODEL --data` looks at all stored values"
    )


def token_logprobs(logits_V: Tensor, token: int, best: int) -> TokenLogprobs:
    """Return the log-probabilities of soft-capped logits."""
    logprobs = logits_V.log_softmax(-1)
    return TokenLogprobs(token, float(logprobs[token]), best_of(logprobs, best))


def best_of(values_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Return the `count` largest entries as (index, value), largest first."""
    values, ids = values_V.topk(min(count, values_V.shape[-1]))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def sample_token(logits_V: Tensor, params: SamplingParams, random: float) -> int:
    """Return the token that a number `random` of [0, 1) picks from edited logits, on any device.

    Where some are not finite it is one whose own logit is not.
    """
    if params.temperature == 0:
        return int(logits_V.argmax())
    probs_C, ids_C = candidates(logits_V, params)
    total = probs_C.cumsum(0)
    if not math.isfinite(whole := float(total[-1])):
        return int(logits_V.argmax())  # of NaN and infinity, which it takes for the largest
    place = torch.searchsorted(total, random * whole, right=True)
    return int(ids_C[min(int(place), len(ids_C) - 1)])


def candidates(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return the probabilities that are left after temperature and truncation, unnormalised in float64, and their ids."""
    ids = torch.arange(logits_V.shape[-1], device=logits_V.device)
    if params.top_k:
        logits_V, ids = logits_V.topk(min(params.top_k, len(ids)))
    elif params.top_p < 1:
        logits_V, ids = logits_V.sort(descending=True, stable=True)
    logits = logits_V.double() / float(params.temperature)
    probs = logits.softmax(0)
    if params.top_p < 1:
        before = probs.cumsum(0) - probs  # a token stays if those before it have not reached top_p yet
        probs, ids = probs[before < params.top_p], ids[before < params.top_p]
    if params.min_p > 0:
        likely = probs >= params.min_p * probs.max()
        probs, ids = probs[likely], ids[likely]
    return probs, ids


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Return the probability [V], float64, with which each token is sampled from edited logits; greedy is certain."""
    found = torch.zeros(logits_V.shape[-1], dtype=torch.float64, device=logits_V.device)
    if params.temperature == 0:
        found[logits_V.argmax()] = 1.0
        return found
    probs_C, ids_C = candidates(logits_V, params)
    found[ids_C] = probs_C / probs_C.sum()
    return found


def uniform(seed: int, position: int) -> float:
    """Return the random number of [0, 1) that belongs to a seed and a position, and to nothing else."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[position, 0, 0, 0])).random())
