"""Parity with transformers through the Engine: chunks, ragged batches, joins and cancellations, skipped and unskipped rows.

Owns the claim that a request gets the numbers it would get alone, whatever runs beside it. Windows are shorter than prompts and
prompts longer than pages. Tolerances are those of `tests/topologies.py`; bitwise claims live in `test_batch_invariance.py`.
"""

from __future__ import annotations

import functools

import pytest
from transformers import PreTrainedModel

from gemcutter.engine.engine import Engine
from gemcutter.engine.request import FinishReason
from tests.parity.batches import Answer, Job, dense, drive, errors
from tests.topologies import SIZES, TOLERANCE, build_decoder, build_oracle, plan_of, prompt, relative_error

CONTEXT = 192

# Lengths lie around a page of 64 positions and a window of 8; late jobs join while others decode.
JOBS = (
    Job(prompt(130, 1)),
    Job(prompt(1, 2), wants_logprobs=True),
    Job(prompt(65, 3), wants_logprobs=True),
    Job(prompt(9, 4), joins=2, wants_states=True),
    Job(prompt(64, 5), joins=3, cancel_at=0),
    Job(prompt(17, 6), joins=3, max_tokens=0, wants_logprobs=True, wants_states=True),
    Job(prompt(70, 7), joins=6, max_tokens=12),
    Job(prompt(3, 8), joins=6, max_tokens=40, cancel_at=3),
    Job(prompt(33, 9), joins=8),
)


@functools.cache
def model(size: str) -> PreTrainedModel:
    """Build the oracle of a size once."""
    return build_oracle(SIZES[size], seed=3)


def engine(size: str, kernels: str = "auto", **options: int) -> Engine:
    """Build an engine over the oracle's weights."""
    return Engine(build_decoder(model(size), plan_of(SIZES[size]), kernels=kernels), CONTEXT, **options)


def too_far(size: str, jobs: tuple[Job, ...], answers: list[Answer]) -> dict[tuple[int, str], float]:
    """List what lies outside the tolerance."""
    found = {
        (index, what): error
        for index, (job, answer) in enumerate(zip(jobs, answers, strict=True))
        for what, error in errors(model(size), job, answer).items()
    }
    return {place: error for place, error in found.items() if not error <= TOLERANCE}


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("max_rows", [1, 7, 64])
@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_every_request_of_a_batch_equals_the_oracle_alone(size: str, max_rows: int, kernels: str) -> None:
    running = engine(size, kernels, max_batched_tokens=max_rows, max_num_seqs=4)
    answers = drive(running, JOBS)
    assert not too_far(size, JOBS, answers)
    for job, answer in zip(JOBS, answers, strict=True):
        if job.cancel_at is None:
            assert answer.finish is FinishReason.LENGTH
            assert len(answer.tokens) == len(answer.logprobs) == job.max_tokens
            assert answer.report is not None
        else:
            assert answer.finish is FinishReason.CANCELLED
            assert len(answer.tokens) <= max(job.cancel_at, 1)
    for book in running.pool.allocators.values():
        assert book.free == len(book.ref_counts), "pages were leaked"


@pytest.mark.parametrize("max_rows", [7, 64, 192])
@pytest.mark.parametrize("size", ["E2B", "E4B", "31B"])
def test_rows_are_skipped_for_one_request_and_not_for_its_neighbour(size: str, max_rows: int) -> None:
    ids = prompt(40, 11)
    jobs = (Job(ids), Job(ids, wants_logprobs=True), Job(ids, wants_states=True), Job(ids))
    together = drive(engine(size, max_batched_tokens=max_rows, max_num_seqs=4), jobs)
    assert not too_far(size, jobs, together)
    alone = drive(engine(size, max_batched_tokens=max_rows), jobs[:1])
    for answer in together:
        assert answer.report is not None
        assert alone[0].report is not None
        assert relative_error(dense(answer.report.top_logits), dense(alone[0].report.top_logits)) <= TOLERANCE
        assert answer.tokens == alone[0].tokens


@pytest.mark.parametrize("max_rows", [7, 192])
@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_reused_prefixes_equal_the_oracle(size: str, max_rows: int) -> None:
    running = engine(size, max_batched_tokens=max_rows, prefix_cache_bytes=1 << 20)
    first = Job(prompt(90, 12))
    (answer,) = drive(running, [first])
    turn = first.prompt + tuple(answer.tokens)
    later = (
        Job(turn + prompt(9, 13)),  # the next turn of a chat
        Job(first.prompt[:80] + prompt(20, 14), joins=1),  # another ending, inside what the window still holds
        Job(first.prompt, joins=2),  # the same again: only its last token is computed
        Job(prompt(12, 15), joins=3),  # nothing in common
    )
    answers = drive(running, later)
    assert not too_far(size, later, answers)
    cached = [found.report.cached_tokens for found in answers if found.report is not None]
    assert cached == [len(turn) - 1, 80, 89, 0]


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_preempted_requests_equal_the_oracle(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = engine(size, max_batched_tokens=64, max_num_seqs=2)
    running.scheduler.max_num_seqs = 5  # more than the pages are for
    left: list[int] = []
    leave = running.scheduler.leave
    monkeypatch.setattr(running.scheduler, "leave", lambda sequence: (left.append(sequence.number), leave(sequence)))
    jobs = tuple(Job(prompt(50 + index, 20 + index), max_tokens=90, wants_logprobs=index == 4) for index in range(5))
    answers = drive(running, jobs)
    assert len(left) > len(jobs), "nothing was preempted: the test needs fewer pages or longer replies"
    assert not too_far(size, jobs, answers)
