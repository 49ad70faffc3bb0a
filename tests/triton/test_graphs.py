"""Decode steps over static memory give the tokens of plain steps, launched ahead or not, captured or (without a GPU) not."""

from __future__ import annotations

import pytest
import torch

from gemcutter.engine.cuda_graphs import CapturedStep
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import FinishReason, Request, RequestEvent
from gemcutter.engine.runner import StepResult
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.speculate.speculator import Speculator
from tests.triton.decoders import decode_with, prompt
from tests.unit.test_drafts import Oracle

pytest.importorskip("gemcutter.ops.triton.linear")

CONTEXT = 40
pytestmark = pytest.mark.usefixtures("plain_products")
DRAWN = SamplingParams(temperature=1.0, top_k=8, top_p=0.9, seed=5)


def engine(name: str, device: torch.device, graphs: bool, **limits: int) -> Engine:
    return Engine(decode_with("triton", name, device), CONTEXT, max_batched_tokens=16, graphs=graphs, **limits)


def replies(engine: Engine, requests: list[Request]) -> dict[int, list[int]]:
    """Run requests, submitted one a step, and give each one's reply."""
    found: dict[int, list[int]] = {}
    waiting = list(requests)
    with torch.inference_mode():
        while waiting or engine.has_work:
            if waiting:
                found[engine.submit(waiting.pop(0))] = []
            for event in engine.step():
                found[event.request] += [] if event.token is None else [event.token]
    return found


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """List every result: the source of its tokens, the rows of all chunks, and whether the step after was launched."""
    found: list[tuple[str, int, bool]] = []
    result = CapturedStep.result

    def listed(self: CapturedStep) -> StepResult:
        found.append((self.source.value, sum(chunk.rows for chunk in self.chunks), self.is_followed))
        return result(self)

    monkeypatch.setattr(CapturedStep, "result", listed)
    return found


def test_a_single_stream_gets_the_tokens_of_plain_steps(device: torch.device, results: list[tuple[str, int, bool]]) -> None:
    """Beyond the window of 8, across pages; the last step is the only one that nothing follows."""
    requests = [Request(prompt(13), max_tokens=7)]
    wanted = replies(engine("readers", device, graphs=False), requests)
    assert not results
    assert replies(engine("readers", device, graphs=True), requests) == wanted
    assert results == [("greedy", 1, True)] * 5 + [("greedy", 1, False)]


def test_batches_are_padded_and_drawn_alike(
    device: torch.device, results: list[tuple[str, int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to three sequences in a bucket of four, which come and go; while one of them is drawn, all are."""
    monkeypatch.setattr("gemcutter.engine.cuda_graphs.BUCKETS", (1, 2, 4))
    requests = [Request(prompt(5, 1), max_tokens=6), Request(prompt(11, 2), DRAWN, 5), Request(prompt(3, 3), max_tokens=3)]
    wanted = replies(engine("Gemma 3", device, graphs=False, max_num_seqs=4), requests)
    assert replies(engine("Gemma 3", device, graphs=True, max_num_seqs=4), requests) == wanted
    assert {("sampled", 2), ("sampled", 3)} <= {(choice, rows) for choice, rows, _ in results}


def test_a_few_rows_each_are_a_static_step_from_the_second_time_on(
    device: torch.device, results: list[tuple[str, int, bool]]
) -> None:
    """The short ends of prompts whose beginning is cached: side by side, of different lengths and choices, then alone."""
    start = prompt(21)
    rounds = [
        [Request(start + prompt(rows, seed), sampling, 2) for rows, seed, sampling in ends]
        for ends in (
            ((3, 30, SamplingParams()), (4, 31, DRAWN)),
            ((2, 32, DRAWN), (4, 33, SamplingParams())),
            ((4, 34, SamplingParams()),),
            ((4, 35, SamplingParams()),),
        )
    ]
    found: list[list[list[int | None]]] = []
    for graphs in (False, True):
        small, tokens = engine("readers", device, graphs, max_num_seqs=2, prefix_cache_bytes=1 << 20), []
        replies(small, [Request(start, max_tokens=1)])
        with torch.inference_mode():
            for requests in rounds:
                numbers = {small.submit(request) for request in requests}
                tokens.append([event.token for _ in range(3) for event in small.step() if event.request in numbers])
        found.append(tokens)
    assert found[0] == found[1]
    assert [rows for _, rows, _ in results] == [2, 6, 2, 1, 4, 1]  # 7 rows in the first round and 4 in the third came first


def test_a_stop_wastes_one_row_and_nothing_else(device: torch.device) -> None:
    """The sequence beside goes on; what was kept of the stopped one serves its continuation."""
    first, second = Request(prompt(6, 4), max_tokens=6), Request(prompt(9, 5), max_tokens=8)
    plain = replies(engine("Gemma 3", device, graphs=False, max_num_seqs=2), [first, second])
    stop = plain[0][3]
    requests = [Request(first.prompt, max_tokens=6, stop_ids=frozenset({stop})), second]
    found = engine("Gemma 3", device, graphs=True, max_num_seqs=2, prefix_cache_bytes=1 << 20)
    short = plain[0][: plain[0].index(stop)]
    assert replies(found, requests) == {0: short, 1: plain[1]}
    again = Request((*first.prompt, *short, stop), max_tokens=2)
    assert replies(found, [again]) == {2: plain[0][len(short) + 1 :][:2]}


def test_what_the_host_chooses_is_not_launched_ahead(device: torch.device, results: list[tuple[str, int, bool]]) -> None:
    requests = [Request(prompt(4), SamplingParams(repetition_penalty=1.3, logprobs=1), 5)]
    wanted = replies(engine("Gemma 3", device, graphs=False), requests)
    assert replies(engine("Gemma 3", device, graphs=True), requests) == wanted
    assert set(results) == {("sampler", 1, False)}


def test_cancelling_while_a_row_is_on_its_way(device: torch.device) -> None:
    wanted = replies(engine("Gemma 3", device, graphs=False), [Request(prompt(5, 2), max_tokens=8)])[0]
    found, tokens = engine("Gemma 3", device, graphs=True, max_num_seqs=2), []
    with torch.inference_mode():
        first, second = (found.submit(Request(prompt(5, seed), max_tokens=8)) for seed in (1, 2))
        for step in range(20):
            if step == 4:
                ended = found.cancel(first)
            tokens += [event.token for event in found.step() if event.request == second] if found.has_work else []
    assert ended == RequestEvent(first, finish=FinishReason.CANCELLED)
    assert tokens == wanted


def test_an_interrupt_loses_no_token(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt(6), max_tokens=6)
    wanted = replies(engine("Gemma 3", device, graphs=False), [request])
    found = engine("Gemma 3", device, graphs=True)
    result, calls = CapturedStep.result, iter(range(100))

    def interrupted(self: CapturedStep) -> StepResult:
        if next(calls) in (1, 3):
            raise KeyboardInterrupt
        return result(self)

    monkeypatch.setattr(CapturedStep, "result", interrupted)
    found.submit(request)
    tokens = []
    with torch.inference_mode():
        while found.has_work:
            try:
                tokens += [event.token for event in found.step()]
            except KeyboardInterrupt:
                continue
    assert tokens == wanted[0]


def test_a_cache_of_eight_bits(device: torch.device) -> None:
    """Keys and values are rounded by up to 2^-4 of themselves; the same replies come from plain steps and from static memory."""
    found = []
    for graphs in (False, True):
        decoder = decode_with("triton", "Gemma 3", device)
        small = Engine(decoder, CONTEXT, max_batched_tokens=16, graphs=graphs, kv_dtype=torch.float8_e4m3fn)
        assert {pages.dtype for pages in small.pool.keys.values()} == {torch.float8_e4m3fn}
        found.append(replies(small, [Request(prompt(9), max_tokens=4)]))
    assert found[0] == found[1]
    assert len(found[0][0]) == 4


def test_only_a_gpu_captures(device: torch.device) -> None:
    reason = decode_with("triton", "Gemma 3", device).capture_refusal()
    assert (reason is None) is (device.type == "cuda")


def test_drafts_are_verified_over_static_memory(device: torch.device, results: list[tuple[str, int, bool]]) -> None:
    """Right ones and wrong ones, of a greedy and of a sampled sequence; a shape is captured when it comes a second time."""
    requests = [Request(prompt(5, 1), max_tokens=9), Request(prompt(7, 2), DRAWN, 9)]
    wanted = replies(engine("readers", device, graphs=False, max_num_seqs=2), requests)
    answers = {request.prompt: wanted[number] for number, request in enumerate(requests)}
    for good in (2, 1):
        drafted = engine("readers", device, graphs=True, max_num_seqs=2)
        drafted.scheduler.proposer = Speculator(Oracle(answers, good, limit=2), draft_tokens=2)
        assert replies(drafted, requests) == wanted
    assert max(rows for _, rows, _ in results) == 6
    assert not any(is_followed for _, _, is_followed in results)
