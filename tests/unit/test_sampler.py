"""One law of sampling, two implementations: host and device give the same tokens, whatever options share a batch.

Owns the property test over both, logits processors, and what a captured graph may sample itself. Everything runs on the CPU,
whose tensors stand for a device's. Read `test_sampling.py` for whether the law is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.cuda_graphs import _is_sampled_by_graph
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.sampler import HostSampler, SampledToken, SamplingRow
from gemcutter.engine.sampler_device import CANDIDATES, FLOATS, DeviceSampler, SamplingTensors, sample_batch
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.errors import RequestError
from tests.unit.test_scheduler import decoder

VOCAB = 300
PROMPT = (3, 4, 4, 5)


def ban(prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
    """Ban one token for good, in place."""
    logits_V[7] = -torch.inf
    return logits_V


def rising(prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
    """Allow the ids above the last one only, as a grammar allows what may follow; a new tensor."""
    last = (*prompt, *reply)[-1]
    mask = torch.full_like(logits_V, -torch.inf)
    mask[last % (VOCAB - 1) + 1 :] = 0
    return logits_V + mask


PENALTY = st.sampled_from((0.0, 0.0, 0.7, -1.5))
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.0, 0.0, 0.3, 1.0, 2.5)),
    top_k=st.sampled_from((0, 1, 5, 64, CANDIDATES, CANDIDATES + 1, 10**6)),
    top_p=st.sampled_from((1.0, 0.95, 0.5, 1e-9)),
    min_p=st.sampled_from((0.0, 0.05, 0.4)),
    repetition_penalty=st.sampled_from((1.0, 1.0, 1.3, 0.6)),
    presence_penalty=PENALTY,
    frequency_penalty=PENALTY,
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from((-5.0, 2.5, 9.0, -torch.inf)), max_size=4),
    suppress=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    logprobs=st.sampled_from((None, None, 0, 3)),
)


@st.composite
def sampling_rows(draw: st.DrawFn) -> SamplingRow:
    """Make a row of any options at any point of a reply."""
    params, reply = draw(PARAMS), draw(st.lists(st.integers(0, 40), max_size=9))
    counts = dict.fromkeys(PROMPT, 0) | Counter(reply)
    processors = draw(st.sampled_from(((), (), (ban,), (rising,), (rising, ban))))
    seed, is_wanted = draw(st.integers(0, 2**64 - 1)), draw(st.booleans())
    return SamplingRow(params, seed, len(PROMPT) + len(reply), PROMPT, reply, counts, processors, is_wanted)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(rows=st.lists(sampling_rows(), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_host_and_device_sample_alike_alone_and_in_any_batch(rows: list[SamplingRow], seed: int) -> None:
    logits_RV = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    before = logits_RV.clone()
    host, device = (sampler.sample(logits_RV, rows) for sampler in (HostSampler(), DeviceSampler()))
    assert torch.equal(logits_RV, before)
    for index, (row, mine, other) in enumerate(zip(rows, host, device, strict=True)):
        (alone,) = HostSampler().sample(logits_RV[index : index + 1], [row])
        assert isinstance(mine, SampledToken)
        assert isinstance(other, SampledToken)
        assert isinstance(alone, SampledToken)
        assert mine.token == other.token == alone.token
        assert (mine.logprobs is None) == (other.logprobs is None) == (row.params.logprobs is None)
        if mine.logprobs is not None and other.logprobs is not None:
            assert [mine.logprobs.token, *mine.logprobs.top] == [other.logprobs.token, *other.logprobs.top]
            raw = logits_RV[index].log_softmax(-1)
            assert mine.logprobs.logprob == pytest.approx(float(raw[mine.token]), abs=1e-5)  # before processors and penalties
        if row.want_probs:
            assert mine.probs_V is not None
            assert other.probs_V is not None
            torch.testing.assert_close(mine.probs_V, other.probs_V)
            assert float(mine.probs_V.sum()) == pytest.approx(1.0)
            assert float(mine.probs_V[mine.token]) > 0


@pytest.mark.parametrize("sampler", [HostSampler(), DeviceSampler()], ids=["host", "device"])
class TestEither:
    """What both samplers do with processors."""

    def test_processors_run_in_order_before_bias_and_penalties(self, sampler: Any) -> None:
        seen = list[tuple[str, int]]()

        def named(name: str) -> Any:
            def processor(prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
                seen.append((name, int(logits_V.argmax())))
                return torch.zeros_like(logits_V).index_fill(0, torch.tensor([5]), 1.0)

            return processor

        logits = torch.zeros(1, VOCAB)
        logits[0, 9] = 3.0
        params = SamplingParams(logit_bias={8: 0.5, 9: 100.0}, suppress=(9,), repetition_penalty=4.0)
        row = SamplingRow(params, 0, 4, PROMPT, (), dict.fromkeys(PROMPT, 0), (named("a"), named("b")))
        (found,) = sampler.sample(logits, [row])
        assert seen == [("a", 9), ("b", 5)]
        assert found.token == 8  # 5 is in the prompt: 1 / 4 is less than the bias of 8, and 9 is suppressed

    def test_an_error_stays_with_its_row(self, sampler: Any) -> None:
        def broken(prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
            raise ValueError("lost")

        plain = SamplingRow(SamplingParams(), 0, 4, PROMPT)
        nothing = SamplingParams(temperature=1.0, suppress=tuple(range(VOCAB)))
        rows = [
            plain,
            replace(plain, processors=(broken,)),
            replace(plain, processors=(lambda prompt, reply, logits_V: logits_V[:3],)),
            replace(plain, params=nothing),
            replace(plain, params=replace(nothing, temperature=0.0)),
        ]
        logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1))
        good, *bad = sampler.sample(logits, rows)
        assert good.token == logits[0].argmax()
        assert [type(each) for each in bad] == [ValueError, RequestError, RequestError, RequestError]
        assert "returned (3,), expected logits of shape (300,)" in str(bad[1])
        assert "no token is left to sample" in str(bad[2])


def test_a_greedy_row_takes_the_first_of_equals_whatever_the_batch_holds() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, [200, 7, 90]] = 3.0
    rows = [SamplingRow(SamplingParams(), 0, 1), SamplingRow(SamplingParams(temperature=1.0, top_k=64, top_p=0.95), 0, 1)]
    tensors = SamplingTensors.of(rows, logits.device)
    assert sample_batch(logits, tensors)[0][0].item() == logits[0].argmax().item()


def test_rows_that_pad_a_batch_give_anything_but_an_error() -> None:
    nothing = SamplingTensors(
        **{name: torch.zeros(1, dtype=torch.float64) for name in FLOATS}, top_k=torch.zeros(1, dtype=torch.long)
    )
    assert 0 <= sample_batch(torch.randn(1, VOCAB), nothing)[0].item() < VOCAB


def chunk_of(request: Request, in_prompt: bool) -> ScheduledChunk:
    """Schedule the next row of a request, the last one of its prompt or one of its reply."""
    sequence = SequenceState(0, request)
    if not in_prompt:
        sequence.append(1)
    table = BlockTable(PagedKVCache(decoder().plan, page_counts(decoder().plan, 8, 4), torch.float32))
    table.reserve(sequence.num_tokens)
    table.commit(sequence.num_tokens - 1)
    table.reserve(1)
    return ScheduledChunk.of(sequence, table, 1)


FAMILY = SamplingParams(temperature=1.0, top_k=64, top_p=0.95)  # the family's own


@pytest.mark.parametrize(
    ("request_", "by_graph"),
    [
        (Request((1,)), True),
        (Request((1,), FAMILY), True),
        (Request((1,), SamplingParams(temperature=1.0)), False),
        (Request((1,), SamplingParams(temperature=1.0, top_k=CANDIDATES + 1)), False),
        (Request((1,), SamplingParams(repetition_penalty=1.1)), False),
        (Request((1,), SamplingParams(logprobs=0)), False),
        (Request((1,), logits_processors=(ban,)), False),
        (Request((1,), max_tokens=0), False),
    ],
)
def test_what_a_graph_samples_itself(request_: Request, by_graph: bool) -> None:
    assert _is_sampled_by_graph(chunk_of(request_, in_prompt=False)) is by_graph


def test_best_logits_of_the_prompt_leave_the_graph() -> None:
    request = Request((1,), top_logits=3)
    assert [_is_sampled_by_graph(chunk_of(request, in_prompt)) for in_prompt in (True, False)] == [False, True]


def test_a_vocabulary_smaller_than_the_candidates() -> None:
    for seed in range(20):
        logits, row = torch.randn(1, 7), SamplingRow(SamplingParams(temperature=1.0, top_k=100), seed, 1, (1,))
        assert DeviceSampler().sample(logits, [row]) == HostSampler().sample(logits, [row])


def test_samples_do_differ_from_the_arg_max() -> None:
    generator, found = torch.Generator().manual_seed(0), set()
    for position in range(3, 60):
        logits = torch.randn(1, VOCAB, generator=generator) * 4
        (sampled,) = DeviceSampler().sample(logits, [SamplingRow(FAMILY, position, position, PROMPT)])
        assert isinstance(sampled, SampledToken)
        found.add(sampled.token == logits.argmax().item())
    assert found == {True, False}
