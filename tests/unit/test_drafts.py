"""Drafts are verified, several tokens a step, and change nothing but the number of steps: the seam for speculative decoding.

Owns fake proposers that know the answer: right, wrong, right for a while. Runs the trained demo model on the reference kernels.
Refuses to know how drafts are made. Read
`gemcutter/engine/speculate/speculator.py` for who asks proposers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import gemcutter
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import FinishReason, Request, RequestEvent, SequenceState
from gemcutter.engine.runner import ModelRunner
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.speculate.tally import MOST_DRAFTS
from gemcutter.model.text import Decoder

K = 4
Answers = dict[tuple[int, ...], list[int]]


@functools.cache
def decoder() -> Decoder:
    with gemcutter.load("demo", dtype="float32", kernels="reference", context=64) as model:
        return model.decoder


class Oracle:
    """Proposes what is known to come, spoilt from draft `good` on; every third time it has nothing to say."""

    def __init__(self, answers: Answers, good: int, limit: int = K) -> None:
        self.answers, self.good, self.limit, self.calls = answers, good, limit, 0

    def propose(self, sequence: SequenceState, limit: int) -> tuple[int, ...]:
        self.calls += 1
        if self.calls % 3 == 0:
            return ()
        done = len(sequence.reply)
        known = self.answers[sequence.request.prompt][done : done + self.limit]
        return tuple(token if index < self.good else token ^ 1 for index, token in enumerate(known))[:limit]


def guessing(answers: Answers, good: int) -> Speculator:
    """Return what takes an oracle's word for as many drafts as it has."""
    return Speculator(Oracle(answers, good), draft_tokens=MOST_DRAFTS)


def run(engine: Engine, requests: Sequence[Request], stagger: int = 0) -> tuple[list[list[RequestEvent]], int]:
    """Run requests, `stagger` steps apart, and return each one's events and the number of steps."""
    found: dict[int, list[RequestEvent]] = {}
    waiting, steps = list(requests), 0
    while waiting or engine.has_work:
        while waiting and steps >= stagger * len(found):
            found[engine.submit(waiting.pop(0))] = []
        for event in engine.step():
            found[event.request].append(event)
        steps += 1
    while engine.prefix.evict():
        pass
    assert all(book.free == len(book.ref_counts) for book in engine.pool.allocators.values()), "pages were leaked"
    return list(found.values()), steps


def no_repeats(prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
    """Ban the last three ids, as a grammar's state would: it depends on every token before."""
    logits_V[torch.tensor([*prompt, *reply][-3:])] = -torch.inf
    return logits_V


PROMPTS = [(2, 50 + seed, 90, 7 * seed + 20) for seed in range(5)]
PLAIN = SamplingParams()
EVERYTHING = SamplingParams(1.2, 40, 0.95, 0.02, 1.3, 0.4, 0.3, {60: 2.0}, (61,), seed=11, logprobs=2)
KINDS: dict[str, Callable[[Request], Request]] = {
    "greedy": lambda request: request,
    "sampled": lambda request: replace(request, sampling=EVERYTHING),
    "processed": lambda request: replace(request, logits_processors=(no_repeats,)),
}


@functools.cache
def plain(kind: str) -> tuple[list[Request], list[list[RequestEvent]], int]:
    """Return requests, and what comes of them without drafts."""
    requests = [KINDS[kind](Request(ids, PLAIN, 9 + 3 * index)) for index, ids in enumerate(PROMPTS)]
    return requests, *run(Engine(decoder(), 64, max_num_seqs=4), requests)


def tokens(events: Sequence[Sequence[RequestEvent]]) -> list[list[int | None]]:
    return [[event.token for event in each] for each in events]


def assert_same(found: Sequence[Sequence[RequestEvent]], wanted: Sequence[Sequence[RequestEvent]]) -> None:
    """See that requests brought the same tokens, ends and log-probabilities."""
    assert tokens(found) == tokens(wanted)
    assert [each[-1].finish for each in found] == [each[-1].finish for each in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        for event, other in zip(mine, theirs, strict=True):
            assert (event.logprobs is None) == (other.logprobs is None)
            if event.logprobs is not None and other.logprobs is not None:
                assert event.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
                assert [token for token, _ in event.logprobs.top] == [token for token, _ in other.logprobs.top]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("good", [K, 2, 0], ids=["right", "half right", "wrong"])
@pytest.mark.parametrize("batch", [1, 4])
def test_text_is_the_same_with_drafts(kind: str, good: int, batch: int) -> None:
    requests, wanted, steps = plain(kind)
    answers = {
        request.prompt: [token for token in each if token is not None]
        for request, each in zip(requests, tokens(wanted), strict=True)
    }
    engine = Engine(
        decoder(),
        64,
        max_num_seqs=batch,
        prefix_cache_bytes=1 << 20,
        speculator=guessing(answers, good),
    )
    found, fewer = run(engine, requests, stagger=2)
    assert_same(found, wanted)
    assert engine.speculator is not None
    counts = engine.speculator.tally
    assert counts.drafted > 2 * counts.bursts  # all that was proposed, whatever was compared
    assert counts.accepted == sum(counts.accepted_at)
    assert all((share > 0) == (place < good) for place, share in enumerate(counts.accepted_at[:K]))
    if good == K and batch == 4:
        assert fewer < steps


@pytest.mark.parametrize("stop_at", [0, 3, 5])
def test_a_stop_or_the_last_token_within_a_draft_ends_the_reply(stop_at: int) -> None:
    (request, *_), (wanted, *_), _ = plain("greedy")
    answer = [event.token for event in wanted if event.token is not None]
    stop = answer[stop_at]
    for changed in (replace(request, stop_ids=frozenset({stop})), replace(request, max_tokens=stop_at + 1)):
        alone, _ = run(Engine(decoder(), 64), [changed])
        engine = Engine(
            decoder(),
            64,
            prefix_cache_bytes=1 << 20,
            speculator=guessing({request.prompt: answer}, K),
        )
        found, _ = run(engine, [changed])
        assert tokens(found) == tokens(alone)
        assert found[0][-1].finish is alone[0][-1].finish
        assert found[0][-1].finish in (FinishReason.STOP, FinishReason.LENGTH)


def test_a_reply_may_be_continued_from_the_cache_after_drafts() -> None:
    (request, *_), (wanted, *_), _ = plain("greedy")
    answer = [event.token for event in wanted if event.token is not None]
    engine = Engine(
        decoder(),
        64,
        prefix_cache_bytes=1 << 20,
        speculator=guessing({request.prompt: answer}, 2),
    )
    engine.submit(replace(request, max_tokens=6))
    while engine.has_work:
        engine.step()
    again = Request((*request.prompt, *answer[:6]), max_tokens=3)
    engine.scheduler.proposer = None
    found, _ = run(engine, [again])
    assert tokens(found) == [answer[6:9]]
    assert found[0][0].prompt is not None
    assert found[0][0].prompt.cached_tokens == len(request.prompt) + 5


def test_probabilities_are_given_on_request() -> None:
    """One row of them for every sampled token: certain where greedy, those after truncation where sampled."""
    engine = Engine(decoder(), 64)
    runner: ModelRunner = engine.runner
    engine.submit(Request(PROMPTS[0], EVERYTHING, 8))
    (chunk,) = engine.scheduler.schedule()
    assert isinstance(chunk, ScheduledChunk)
    (result,) = runner.launch([replace(chunk, want_probs=True)]).result().chunks
    (sampled,) = result.tokens
    assert sampled.probs_V is not None
    assert sampled.probs_V.shape == (decoder().plan.vocab,)
    assert float(sampled.probs_V.sum()) == pytest.approx(1.0)
    assert 1 < int((sampled.probs_V > 0).sum()) <= 40
    assert float(sampled.probs_V[sampled.token]) > 0
