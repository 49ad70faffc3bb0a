"""The arithmetic of sampling for one row of logits.

Owns log-probabilities, truncation and the random number of a token, which depends on seed and absolute position alone: the same
seed gives the same tokens alone, in a batch, and after a preemption. Refuses to know sequences, batches and text. Read
`sampling_params.py` for what a request may ask for, `sampler.py` for rows of many requests. Shape letters: V vocabulary, C
candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.errors import NumericError


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


def logprobs_of(logits_RV: Tensor, tokens: Sequence[int], best: int) -> list[TokenLogprobs]:
    """Return the log-probability of one token for each row of soft-capped logits. Raises NumericError."""
    logprobs_RV = logits_RV.log_softmax(-1)
    found = logprobs_RV.gather(1, torch.tensor([tokens], device=logits_RV.device).T).squeeze(1).tolist()
    if not all(map(math.isfinite, found)):
        raise not_finite()
    top_values, top_ids = (each.tolist() for each in logprobs_RV.topk(min(best, logprobs_RV.shape[1])))
    pairs = (tuple(zip(ids, values, strict=True)) for ids, values in zip(top_ids, top_values, strict=True))
    return [TokenLogprobs(token, logprob, top) for token, logprob, top in zip(tokens, found, pairs, strict=True)]


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
    whole = float(total[-1]) if len(total) else math.nan
    if not math.isfinite(whole):
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
