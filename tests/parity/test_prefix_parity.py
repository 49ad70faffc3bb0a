"""Tokens and numbers are the same with and without the prefix cache, wherever a prompt goes on from an earlier one.

Owns hits far beyond the windows, at any depth, in chunks, with adapters, after cancelled and preempted prompts, beside requests
that wait for what another one computes. Windows are 8 positions, pages 64. Read `tests/unit/test_prefix.py` for the tree alone.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from gemcutter.engine.engine import Engine
from gemcutter.errors import RequestError
from gemcutter.model.text import Decoder
from tests.parity.batches import Answer, Job, dense, drive
from tests.topologies import SIZES, TOLERANCE, build_decoder, build_oracle, plan_of, prompt, relative_error

CONTEXT = 640
ROOMY = 1 << 24
LONG = prompt(500, 1)

# The first one is computed alone; what comes later parts from it everywhere, and from each other.
DEPTHS = ((499, 0), (130, 0), (191, 0), (192, 3), (64, 3), (330, 4), (331, 9), (333, 9), (500, 9))  # and when they join
LATER = tuple(Job(LONG[:depth] + prompt(7, 40 + index), joins=joins) for index, (depth, joins) in enumerate(DEPTHS))


@functools.cache
def decoder(size: str, kernels: str) -> Decoder:
    """Build a decoder over random weights once."""
    return build_decoder(build_oracle(SIZES[size], seed=3), plan_of(SIZES[size]), kernels=kernels)


def engine(size: str, kernels: str = "reference", **options: Any) -> Engine:
    """Build an engine; without `prefix_cache_bytes` it reuses nothing."""
    return Engine(decoder(size, kernels), CONTEXT, **options)


def assert_same(found: list[Answer], wanted: list[Answer], is_exact: bool = True) -> None:
    """See that answers hold the same tokens and the same numbers: every bit, or within the tolerance."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.tokens, one.finish) == (other.tokens, other.finish)
        assert one.report is not None
        assert other.report is not None
        if is_exact:
            assert one.report.top_logits == other.report.top_logits
            assert one.logprobs == other.logprobs
        assert relative_error(dense(one.report.top_logits), dense(other.report.top_logits)) <= TOLERANCE
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert relative_error(dense(mine.top), dense(theirs.top)) <= TOLERANCE


def cached(answers: list[Answer]) -> list[int]:
    return [answer.report.cached_tokens for answer in answers if answer.report is not None]


@functools.cache
def plain(size: str, kernels: str) -> list[Answer]:
    """Return the answers without a cache."""
    return drive(engine(size, kernels, max_num_seqs=3), [Job(LONG), *LATER])


@pytest.mark.parametrize("max_rows", [50, 512])
@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_answers_are_the_same_with_the_cache(size: str, kernels: str, max_rows: int) -> None:
    running = engine(size, kernels, max_num_seqs=3, max_batched_tokens=max_rows, prefix_cache_bytes=ROOMY)
    found = [*drive(running, [Job(LONG)]), *drive(running, LATER)]
    assert_same(found, plain(size, kernels), is_exact=kernels == "reference")
    for job, count in zip(LATER, cached(found)[1:], strict=True):
        shared = len(job.prompt) - 7
        assert shared - 64 <= count <= shared, "at most one window, in whole pages, is computed again"


@functools.cache
def least_bytes() -> int:
    """Return the smallest budget that holds a prefix, as the error for a smaller one tells it."""
    with pytest.raises(RequestError) as caught:
        engine("E2B", prefix_cache_bytes=1)
    return int(str(caught.value).partition("give ")[2].split()[0])


@pytest.mark.parametrize("times", [1, 2, 8])
def test_answers_are_the_same_when_the_cache_is_too_small(times: int) -> None:
    """So many times the least that is of any use; everything is evicted all the time."""
    nbytes = times * least_bytes()
    running = engine("E2B", max_num_seqs=3, max_batched_tokens=50, prefix_cache_bytes=nbytes)
    assert running.prefix.most_bytes <= nbytes
    assert_same([*drive(running, [Job(LONG)]), *drive(running, LATER)], plain("E2B", "reference"))
    assert all(running.prefix.held[group] <= most for group, most in running.prefix.capacity.items())


def test_a_shared_beginning_is_computed_once_and_gives_everyone_the_same() -> None:
    jobs = tuple(Job(LONG[:300] + prompt(9, 60 + index)) for index in range(4))
    running = engine("E2B", max_num_seqs=4, max_batched_tokens=70, prefix_cache_bytes=ROOMY)
    found = drive(running, jobs)
    assert_same(found, drive(engine("E2B", max_num_seqs=4, max_batched_tokens=70), jobs))
    assert cached(found)[0] == 0
    assert all(256 <= count <= 300 for count in cached(found)[1:])


@pytest.mark.parametrize("tokens", [0, 3])
def test_what_a_cancelled_request_computed_serves_the_next(tokens: int) -> None:
    """Cancelled in the middle of its prompt, or of its reply."""
    running = engine("E2B", max_num_seqs=2, max_batched_tokens=90, prefix_cache_bytes=ROOMY)
    first, second = Job(LONG, cancel_at=tokens), Job(LONG[:400] + prompt(5, 70), joins=2)
    _, found = drive(running, [first, second])
    assert_same([found], drive(engine("E2B"), [Job(second.prompt)]))
    assert cached([found])[0] >= 64


def test_preempted_requests_go_on_from_the_cache() -> None:
    running = engine("E2B", max_batched_tokens=128, max_num_seqs=1, prefix_cache_bytes=2 * least_bytes())
    running.scheduler.max_num_seqs = 3  # more than the pages are for
    jobs = tuple(Job(prompt(250 + index, 20 + index), max_tokens=60) for index in range(3))
    found = drive(running, jobs)
    assert running.scheduler.preemptions, "the test needs fewer pages or longer replies"
    assert_same(found, drive(engine("E2B", max_batched_tokens=128, max_num_seqs=3), jobs))
    while running.prefix.evict():
        pass
    assert all(book.free == len(book.ref_counts) for book in running.pool.allocators.values()), "pages were leaked"
