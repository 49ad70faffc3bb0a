"""From logits to a token: penalties, temperature, truncation, and a draw that depends on nothing but seed and position.

Owns `Sampling` and the arithmetic behind it; refuses to know sequences, batches and text. The draw is counter-based, so the
same seed gives the same tokens alone, in a batch, and after a preemption. Shape letters: V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemcutter.errors import RequestError

FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: 0 <= value < math.inf, "a number from 0 (greedy)"),
    "top_k": (lambda value: isinstance(value, int) and value >= 0, "0 (off) or a count"),
    "top_p": (lambda value: 0 < value <= 1, "above 0, at most 1"),
    "min_p": (lambda value: 0 <= value < 1, "from 0, below 1"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "above 0"),
    "presence_penalty": (math.isfinite, "a finite number"),
    "frequency_penalty": (math.isfinite, "a finite number"),
    "logit_bias": (
        lambda value: not any(math.isnan(bias) or bias == math.inf for bias in value.values()),
        "ids with finite numbers or -inf",
    ),
    "seed": (lambda value: value is None or (isinstance(value, int) and 0 <= value < 2**64), "from 0 to 2**64 - 1"),
    "logprobs": (lambda value: value is None or (isinstance(value, int) and value >= 0), "a count"),
}


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    """Apply a check to a value that may be of any type."""
    try:
        return check(value)
    except (TypeError, AttributeError):
        return False


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen. The defaults are greedy; a `temperature` above 0 samples.

    Order: soft cap (in the head), suppressed ids and bias, penalties, temperature, top-k, top-p, min-p. `repetition_penalty`
    looks at prompt and reply, presence and frequency penalties at the reply. `logprobs` asks for the n best log-probabilities
    of each token, taken before all penalties. Raises RequestError with every field that is out of range.
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
            f"sampling.{name}: expected {want}, found {getattr(self, name)!r}"
            for name, (holds, want) in FIELDS.items()
            if not _holds(holds, getattr(self, name))
        ]
        if problems:
            raise RequestError("the sampling options can't be used", problems)

    @property
    def is_plain_greedy(self) -> bool:
        """Tell whether the choice is the arg max of the logits as they are."""
        return self.temperature == 0 and not self.alters_logits

    @property
    def alters_logits(self) -> bool:
        """Tell whether bias, suppression or penalties change the logits."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.logit_bias or self.suppress)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token and the best alternatives as (id, log-probability), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits_V: Tensor, token: int, best: int) -> TokenLogprobs:
    """Take log-probabilities of soft-capped logits."""
    logprobs = logits_V.log_softmax(-1)
    return TokenLogprobs(token, float(logprobs[token]), best_of(logprobs, best))


def best_of(values_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """List the `count` largest entries as (index, value), largest first."""
    values, ids = values_V.topk(min(count, values_V.shape[-1]))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def sample(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], reply: Sequence[int], seed: int) -> int:
    """Choose the token that follows prompt and reply, from its soft-capped logits."""
    if sampling.alters_logits:
        logits_V = _altered(logits_V, sampling, prompt, reply)
    if sampling.temperature == 0:
        return int(logits_V.numpy().argmax())  # ten times as fast as torch's on one thread
    probs_C, ids_C = _candidates(logits_V, sampling)
    total = probs_C.cumsum(0)
    drawn = torch.searchsorted(total, uniform(seed, len(prompt) + len(reply)) * float(total[-1]), right=True)
    return int(ids_C[min(int(drawn), len(ids_C) - 1)])


def _altered(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    logits = logits_V.clone()
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if sampling.suppress:
        logits[list(sampling.suppress)] = -torch.inf
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *reply}))
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    if reply and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(reply)
        weights = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
        logits[torch.tensor(list(counts))] -= torch.tensor(weights)
    return logits


def _candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Give the probabilities that are left after temperature and truncation, unnormalised in float64, and their ids."""
    ids = torch.arange(logits_V.shape[-1])
    if sampling.top_k:
        logits_V, ids = logits_V.topk(min(sampling.top_k, len(ids)))
    elif sampling.top_p < 1:
        logits_V, ids = logits_V.sort(descending=True, stable=True)
    logits = logits_V.double() / sampling.temperature
    probs = logits.softmax(0)
    if sampling.top_p < 1:
        before = probs.cumsum(0) - probs  # a token stays if those before it have not reached top_p yet
        probs, ids = probs[before < sampling.top_p], ids[before < sampling.top_p]
    if sampling.min_p > 0:
        likely = probs >= sampling.min_p * probs.max()
        probs, ids = probs[likely], ids[likely]
    return probs, ids


def uniform(seed: int, position: int) -> float:
    """Draw from [0, 1) by seed and position alone."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[position, 0, 0, 0])).random())
