"""Requests that begin alike and run at once: who waits for what another one computes, and who does not.

Owns that nobody waits for ever, whoever is cancelled or preempted. Read `test_scheduler.py` for the laws of every step, which
hold here too, `tests/parity/test_prefix_parity.py` for larger models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.topologies import prompt
from tests.unit.test_scheduler import Watched, alone, ask, assert_no_leaks, assert_same, make_engine


def test_a_shared_beginning_is_computed_once() -> None:
    """Requests that come together, or while the first is in its prompt, wait for what it computes, and no others do."""
    long = prompt(30, 70)
    requests = [ask(long + prompt(3, seed), 4, seed=seed) for seed in (71, 72, 73)]
    other = ask(prompt(4, 75), 2)
    watched = Watched(make_engine(max_rows=8, max_sequences=5, checkpoints=20))
    numbers = [watched.submit(request) for request in requests[:2]]
    passes = watched.submit(other)
    watched.step()
    assert watched.engine.scheduler.awaiting == {numbers[1]}
    numbers.append(watched.submit(requests[2]))
    watched.step()
    assert watched.engine.scheduler.awaiting == set(numbers[1:])
    assert watched.answers[passes].tokens, "who shares nothing does not wait"
    watched.finish()
    assert [watched.answers[number].cached for number in numbers] == [0, len(long), len(long)]
    for number, request in zip(numbers, requests, strict=True):
        assert_same(watched.answers[number], alone(request))
    assert_no_leaks(watched.engine)


@pytest.mark.parametrize("changed", [{"adapter": None, "cache_salt": "b"}, {"prompt_logprobs": 0}], ids=repr)
def test_nobody_waits_for_what_is_not_shared(changed: dict[str, Any]) -> None:
    request = ask(prompt(30, 70), 2, cache_salt="a")
    watched = Watched(make_engine(max_rows=8, checkpoints=20))
    numbers = [watched.submit(each) for each in (request, replace(request, **changed))]
    watched.step()
    assert not watched.engine.scheduler.awaiting
    watched.finish()
    assert [watched.answers[number].cached for number in numbers] == [0, 0]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_beginning_whose_request_is_cancelled_is_computed_by_the_next(after: int) -> None:
    long = prompt(30, 70)
    requests = [ask(long + prompt(3, seed), 4, seed=seed) for seed in (71, 72, 73)]
    watched = Watched(make_engine(max_rows=8, max_sequences=5, checkpoints=20))
    first, second, third = (watched.submit(request) for request in requests)
    for _ in range(after):
        watched.step()
    watched.cancel(first)
    watched.finish()
    assert watched.answers[second].cached == 8 * after  # what the first has left
    assert watched.answers[third].cached == len(long)
    for number, request in zip((second, third), requests[1:], strict=True):
        assert_same(watched.answers[number], alone(request))
    assert_no_leaks(watched.engine)


def test_a_more_urgent_request_waits_for_nobody() -> None:
    request = ask(prompt(30, 70), 2)
    watched = make_engine(max_rows=8, checkpoints=20)
    watched.submit(request)
    watched.step()
    watched.submit(replace(request, priority=-1))
    watched.step()
    assert not watched.scheduler.awaiting
    assert len(watched.scheduler.running) == 2


def test_preempted_prompts_find_what_they_had_computed() -> None:
    watched = Watched(make_engine(max_rows=16, max_sequences=2, checkpoints=20, spare=2))
    requests = [ask(prompt(12, 80), 20, seed=80), ask(prompt(30, 81), 4, seed=81)]
    numbers = [watched.submit(request) for request in requests]
    watched.finish()
    assert watched.preempted
    for number, request in zip(numbers, requests, strict=True):
        assert watched.answers[number].cached == 0, "its own rows are no hit"
        assert_same(watched.answers[number], alone(request))
    assert_no_leaks(watched.engine)
