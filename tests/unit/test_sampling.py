"""Every sampling option against its definition, written out in numpy one token at a time.

The reference here is slow and plain on purpose. Draws are counter-based, so the statistics below are the same in every run. Knows
nothing of engines. Read `test_scheduler.py` for the same seed alone, in a batch and after a preemption.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemcutter.engine.sampler import HostSampler, SampledToken, SamplingRow
from gemcutter.engine.sampling import best_of, token_logprobs
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.errors import RequestError, spell_value

VOCAB = 12
PROMPT, REPLY = (3, 4, 4, 5), (5, 6, 6, 6)
Floats = NDArray[np.float64]


def sample(logits_V: Tensor, sampling: SamplingParams, prompt: tuple[int, ...], reply: tuple[int, ...], seed: int) -> int:
    """Sample the token after prompt and reply on the host."""
    counts = dict.fromkeys(prompt, 0) | Counter(reply)
    row = SamplingRow(sampling, seed, len(prompt) + len(reply), prompt, reply, counts)
    (found,) = HostSampler().sample(logits_V[None], [row])
    assert isinstance(found, SampledToken)
    return found.token


def random_logits(seed: int) -> Tensor:
    """Draw distinct logits, positive and negative."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0.0, 3.0, VOCAB)).float()


def altered(logits_V: Tensor, sampling: SamplingParams, prompt: tuple[int, ...], reply: tuple[int, ...]) -> Floats:
    """Apply bias, suppression and penalties as their definitions say."""
    logits: Floats = logits_V.numpy().astype(np.float64)
    for token in range(VOCAB):
        logits[token] += sampling.logit_bias.get(token, 0.0)
        if token in sampling.suppress:
            logits[token] = -np.inf
        if token in prompt or token in reply:
            logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
        times = reply.count(token)
        logits[token] -= sampling.presence_penalty * (times > 0) + sampling.frequency_penalty * times
    return logits


def distribution(
    logits_V: Tensor, sampling: SamplingParams, prompt: tuple[int, ...] = PROMPT, reply: tuple[int, ...] = REPLY
) -> dict[int, float]:
    """Return the probability of every token that may be drawn."""
    logits = altered(logits_V, sampling, prompt, reply) / sampling.temperature
    weights = {token: math.exp(logits[token] - logits.max()) for token in range(VOCAB)}
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)[: sampling.top_k or VOCAB]
    total, mass, kept = sum(weights[token] for token in ranked), 0.0, list[int]()
    for token in ranked:  # the fewest of the likeliest tokens that together reach top_p
        if mass < sampling.top_p:
            kept.append(token)
            mass += weights[token] / total
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[ranked[0]] and weights[token] > 0]
    return {token: weights[token] / sum(weights[other] for other in kept) for token in kept}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 50},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 2.0},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 0.3, "temperature": 2.0},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 2.5},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0, "frequency_penalty": 0.4},
    {"frequency_penalty": 0.7},
    {"logit_bias": {0: 2.5, 5: -1.0, 7: -math.inf}},
    {"suppress": (1, 2, 8)},
    {"logit_bias": {1: 4.0, 5: 3.0}, "suppress": (1,), "repetition_penalty": 1.3, "frequency_penalty": 0.2, "top_p": 0.95},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    sampling, draws = SamplingParams(**{"temperature": 1.0, **options}), 1200
    logits_V = random_logits(1)
    expected = distribution(logits_V, sampling)
    counts = Counter(
        sample(logits_V, sampling, PROMPT + PROMPT[:1] * position, REPLY, seed=2) for position in range(draws)
    )  # a longer prompt only moves the position of the draw
    assert counts.keys() <= expected.keys()
    chi_square = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in expected.items() if draws * p >= 5)
    freedom = max(1, sum(draws * p >= 5 for p in expected.values()) - 1)
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_only_allowed_tokens_are_drawn(options: dict[str, Any]) -> None:
    for seed in range(60):
        sampling, logits_V = SamplingParams(**{"temperature": 1.0, **options}), random_logits(seed)
        allowed = distribution(logits_V, sampling)
        assert {sample(logits_V, sampling, PROMPT, REPLY, seed=draw) for draw in range(8)} <= allowed.keys()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_greedy_takes_the_best_altered_logit(options: dict[str, Any]) -> None:
    sampling = SamplingParams(**{**options, "temperature": 0.0})
    for seed in range(200):
        logits_V = random_logits(seed)
        for reply in (REPLY, ()):
            assert sample(logits_V, sampling, PROMPT, reply, seed) == altered(logits_V, sampling, PROMPT, reply).argmax()


def test_sampling_leaves_the_logits_alone() -> None:
    logits_V = random_logits(0)
    before = logits_V.clone()
    sampling = SamplingParams(1.0, 4, 0.9, 0.1, 1.2, 0.5, 0.5, {1: 2.0}, (2,))
    sample(logits_V, sampling, PROMPT, REPLY, 0)
    assert torch.equal(logits_V, before)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    sampling, logits_V = SamplingParams(temperature=2.0), random_logits(3)

    def draws(seed: int, prompt: int = 1) -> list[int]:
        return [sample(logits_V, sampling, (1,) * prompt, (2,) * reply, seed) for reply in range(30)]

    first = draws(5)
    torch.manual_seed(0)
    assert draws(5) == first
    assert draws(5, prompt=11)[:20] == first[10:]  # the same positions, whatever is prompt and what reply
    assert draws(6) != first
    assert draws(2**64 - 1) != first
    assert len(set(first)) > 1


@pytest.mark.parametrize("best", [0, 1, 3, VOCAB, 100])
def test_logprobs_are_the_log_softmax(best: int) -> None:
    logits_V = random_logits(4)
    logits = logits_V.numpy().astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    found = token_logprobs(logits_V, 7, best)
    assert found.token == 7
    assert found.logprob == pytest.approx(expected[7], abs=1e-5)
    ranked = np.argsort(-expected)[:best]
    assert [token for token, _ in found.top] == ranked.tolist()
    assert [logprob for _, logprob in found.top] == pytest.approx(expected[ranked].tolist(), abs=1e-5)


def test_logprobs_of_all_tokens_sum_to_one() -> None:
    logits_V = random_logits(9)
    assert sum(math.exp(logprob) for _, logprob in token_logprobs(logits_V, 0, VOCAB).top) == pytest.approx(1.0, abs=1e-5)
    assert best_of(logits_V, 2) == tuple(sorted(enumerate(logits_V.tolist()), key=lambda item: -item[1])[:2])


@pytest.mark.parametrize(
    ("options", "plain"),
    [({}, True), ({"seed": 3, "logprobs": 2}, True), ({"temperature": 1.0}, False), ({"suppress": (1,)}, False)]
    + [({key: 0.5}, False) for key in ("repetition_penalty", "presence_penalty", "frequency_penalty")],
)
def test_plain_greedy_is_told_from_the_rest(options: dict[str, Any], plain: bool) -> None:
    assert SamplingParams(**options).is_plain_greedy is plain


BAD: dict[str, list[Any]] = {
    "temperature": [-0.1, math.nan, math.inf, True, "1", None, 10**400, 1e-308],
    "top_k": [-1, True, 2.0, None, 2**70],
    "top_p": [0.0, 1.01, -0.5, math.nan, True, "a"],
    "min_p": [-0.1, 1.0, math.nan, False],
    "repetition_penalty": [0.0, -1.0, math.inf, math.nan, True, 1e300],
    "presence_penalty": [math.inf, math.nan, 10**400, -1e308, True],
    "frequency_penalty": [-math.inf, math.nan, [1]],
    "logit_bias": [{3: math.nan}, {1: 0.0, 2: math.inf}, {1.5: 1.0}, {"a": 1}, {True: 1.0}, {3: True}, [3], None],
    "suppress": [5, "a", (1.5,), (True,), None],
    "seed": [-1, 2**64, 1.5, True],
    "logprobs": [-1, True, 2.5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_an_option_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"sampling.{name}: expected ")
    assert problem.endswith(f"found {spell_value(value)}")  # a long one is cut


def test_all_bad_options_are_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: values[0] for name, values in BAD.items()})
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"sampling.{name}" for name in BAD]
