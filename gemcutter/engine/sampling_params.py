"""How a request wants its tokens sampled.

Owns `SamplingParams` and the check of every field. Standard library only, so that files that name defaults can be judged without
torch. Read `sampling.py` for the arithmetic behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemcutter.errors import RequestError, spell_value

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
