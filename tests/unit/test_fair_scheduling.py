"""Who gets the rows of a step: short prompts beside long ones, urgent requests, deadlines, and steps of any size.

Owns the claims that a short prompt passes a long one, that no prompt starves, that steps sized in time keep a stream's gaps short
on a clock that is made up, and that results depend on none of it. Read `tests/unit/test_scheduler.py` for the laws of every step
and for what `Watched` and its requests are, `tests/unit/test_step_sizer.py` for the sizes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.engine.engine import Engine
from gemcutter.engine.request import FinishReason, Request, RequestEvent
from gemcutter.engine.scheduler import RowPlan
from gemcutter.engine.step_sizer import StepSizer
from gemcutter.engine.watchdog import TokenClasses
from gemcutter.errors import RequestError
from tests.topologies import prompt
from tests.unit.test_scheduler import (
    JOBS,
    REQUESTS,
    Job,
    Watched,
    alone,
    ask,
    assert_no_leaks,
    assert_same,
    decoder,
    drive,
    make_engine,
    wanted,
)


class Sizes:
    """A sizer that says what it is told, in turn."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows, self._turn = rows, 0

    def prompt_rows(self, decode_rows: int, most: int) -> int:
        self._turn += 1
        return min(self._rows[self._turn % len(self._rows)], most)

    def observe(self, decode_rows: int, prompt_rows: int, seconds: float) -> None:
        """Learn nothing."""


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    jobs=st.lists(JOBS, min_size=4, max_size=7).map(lambda jobs: sorted(jobs, key=lambda job: job.joins)),
    sizes=st.lists(st.integers(1, 16), min_size=1, max_size=9),
    checkpoints=st.integers(0, 4),
    spare=st.integers(0, 20),
)
def test_results_do_not_depend_on_the_sizes_of_steps(jobs: list[Job], sizes: list[int], checkpoints: int, spare: int) -> None:
    engine = make_engine(16, 4, checkpoints, spare)
    engine.scheduler.sizer = Sizes(sizes)  # type: ignore[assignment]
    for job, answer in zip(jobs, drive(Watched(engine), jobs), strict=True):
        assert_same(answer, wanted(REQUESTS.index(job.request)))
    found = engine.stats()
    assert (found.running, found.waiting, found.queued_prompt_tokens) == (0, 0, 0)


def test_a_short_prompt_passes_a_long_one() -> None:
    watched = Watched(make_engine(max_rows=8))
    long = watched.submit(ask(prompt(39, 1), 1))
    watched.step()
    short = watched.submit(ask(prompt(5, 2), 1))
    watched.step()
    assert watched.rows[-1] == {long: 3, short: 5}
    assert watched.answers[short].finish is FinishReason.LENGTH
    assert watched.answers[long].finish is None
    watched.finish()
    assert_same(watched.answers[long], alone(ask(prompt(39, 1), 1)))


def test_several_prompts_are_in_progress_at_once() -> None:
    watched = Watched(make_engine(max_rows=16, max_sequences=4))
    numbers = [watched.submit(ask(prompt(30, seed), 1)) for seed in range(4)]
    watched.step()
    assert watched.rows[-1] == dict(zip(numbers, (13, 1, 1, 1), strict=True))
    watched.finish()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.integers(1, 64),
    st.lists(st.integers(1, 500), min_size=1, max_size=8),
    st.lists(st.integers(1, 60), min_size=1, max_size=50),
)
def test_the_oldest_prompt_gets_its_quarter_whatever_comes(rows: int, prompts: list[int], sizes: list[int]) -> None:
    """A prompt of n tokens is over after at most 4 n / rows steps as the oldest one, so each of finitely many ends."""
    pending = [Mock(pending=each, number=number) for number, each in enumerate(prompts)]
    plan = RowPlan(rows)
    plan.share(pending)
    assert plan.of(pending[0]) >= min(prompts[0], -(-rows // 4))
    assert sum(plan.rows.values()) + plan.left == rows
    assert plan.left == max(rows - sum(prompts), 0)
    assert all(0 <= plan.of(each) <= each.pending for each in pending)
    rest = sorted(pending[1:], key=lambda each: each.pending)
    shortest_first = [plan.of(each) == each.pending for each in rest]
    assert shortest_first == sorted(shortest_first, reverse=True)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(st.integers(2, 9), st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(2, 4))
def test_no_prompt_starves_behind_a_stream_of_shorter_ones(max_rows: int, lengths: list[int], sequences: int) -> None:
    watched = Watched(make_engine(max_rows, sequences))
    long = watched.submit(ask(prompt(39, 1), 1))
    for step in range(4 * 39):
        watched.step()
        if watched.answers[long].finish is not None:
            break
        watched.submit(ask(prompt(lengths[step % len(lengths)], step), 2))
    assert watched.answers[long].finish is FinishReason.LENGTH


class Simulated:
    """An engine whose steps last what a made-up machine needs for them."""

    def __init__(self, engine: Engine, base_s: float, row_s: float) -> None:
        self.engine, self.now_s, self.events = engine, 0.0, list[RequestEvent]()
        launch = engine.runner.launch

        def timed(chunks: Any) -> Any:
            self.now_s += base_s + row_s * sum(chunk.rows for chunk in chunks)
            return launch(chunks)

        engine.clock = lambda: self.now_s
        pytest.MonkeyPatch().setattr(engine.runner, "launch", timed)

    def run_until(self, number: int) -> None:
        """Step until a request has a token."""
        while not any(event.request == number and event.token is not None for event in self.events):
            self.events += self.engine.step()

    def times(self, number: int) -> list[float]:
        return [event.time_s for event in self.events if event.request == number]


def test_steps_are_sized_by_the_clock() -> None:
    """A base of 10 ms and 5 ms a row: 8 rows beside a stream fit into 60 ms, where 32 would take 170."""
    gaps = dict[float | None, float]()
    for stall_ms in (None, 60.0):
        engine = make_engine(max_rows=32, max_sequences=3)
        engine.scheduler.sizer = None if stall_ms is None else StepSizer(stall_ms / 1000)
        simulated = Simulated(engine, 0.01, 0.005)
        chat = engine.submit(ask(prompt(1, 1), 35))
        for _ in range(5):
            simulated.events += engine.step()
        learns = engine.submit(ask(prompt(33, 2), 1))
        simulated.run_until(learns)
        known = len(simulated.times(chat))
        long = engine.submit(ask(prompt(39, 3), 1))
        simulated.run_until(long)
        times = simulated.times(chat)[known - 1 :]
        gaps[stall_ms] = max(after - before for before, after in pairwise(times))
    assert gaps[None] == pytest.approx(0.17)
    assert gaps[60.0] is not None
    assert gaps[60.0] <= 0.0601


def test_a_short_request_behind_a_long_prompt_waits_for_two_steps_at_most() -> None:
    engine = make_engine(max_rows=32, max_sequences=3)
    engine.scheduler.sizer = StepSizer(0.06)
    simulated = Simulated(engine, 0.01, 0.005)
    for seed in (1, 2, 3):
        engine.submit(ask(prompt(39, seed), 1))
    for _ in range(6):
        engine.step()
    long = engine.submit(ask(prompt(39, 4), 1))
    engine.step()
    came_s = simulated.now_s
    short = engine.submit(ask(prompt(6, 5), 1))
    simulated.run_until(short)
    assert simulated.times(short)[0] - came_s <= 2 * 0.0601
    assert not simulated.times(long)


def test_urgent_requests_come_first_and_keep_their_pages() -> None:
    engine = make_engine(max_rows=16, max_sequences=1)
    runs = engine.submit(ask(prompt(4, 1), 2))
    engine.step()
    idle, late, urgent, also = (
        engine.submit(replace(ask(prompt(4, seed), 2), priority=level)) for seed, level in ((2, 5), (3, 0), (4, -1), (5, -1))
    )
    order = [event.request for _ in iter(lambda: engine.has_work, False) for event in engine.step() if event.finish]
    assert order == [runs, urgent, also, late, idle]
    crowded = make_engine(max_rows=16, max_sequences=2, spare=0)
    first = crowded.submit(replace(ask(prompt(20, 6), 10, seed=6), priority=1))
    crowded.step()
    crowded.step()
    second = crowded.submit(ask(prompt(20, 7), 10, seed=7))
    order = [event.request for _ in iter(lambda: crowded.has_work, False) for event in crowded.step() if event.finish]
    assert crowded.scheduler.preemptions
    assert order == [second, first]
    assert_no_leaks(crowded)


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    engine = make_engine(max_rows=6, max_sequences=2, checkpoints=2)
    simulated = Simulated(engine, 0.0, 1.0)  # a second a row
    decodes = engine.submit(replace(ask(prompt(2, 1), 30), deadline_s=20.0))
    prefills = engine.submit(replace(ask(prompt(39, 2), 1), deadline_s=19.0))
    waits = engine.submit(replace(ask(prompt(3, 3), 1), deadline_s=3.0))
    free = engine.submit(ask(prompt(3, 4), 2))
    while engine.has_work:
        simulated.events += engine.step()
    ends = {event.request: (event.finish, event.time_s) for event in simulated.events if event.finish}
    assert ends.keys() == {decodes, prefills, waits, free}
    assert ends[free][0] is FinishReason.LENGTH
    for number, deadline_s in ((decodes, 20), (prefills, 19), (waits, 3)):
        finish, at_s = ends[number]
        assert finish is FinishReason.TIMEOUT
        assert deadline_s <= at_s <= deadline_s + 6  # the step under way
    assert engine.prefix.nbytes  # what was computed stays
    assert_no_leaks(engine)


def test_no_stop_id_is_sampled_before_min_tokens() -> None:
    request = REQUESTS[8]
    early = len(wanted(8).tokens)
    assert alone(replace(request, min_tokens=early)).tokens == wanted(8).tokens
    found = alone(replace(request, min_tokens=early + 5))
    assert len(found.tokens) >= early + 5
    assert not set(found.tokens[: early + 5]) & request.stop_ids
    assert found.tokens[:early] == wanted(8).tokens
    together = drive(Watched(make_engine()), [Job(replace(request, min_tokens=35)), Job(request)])
    assert_same(together[0], alone(replace(request, min_tokens=35)))
    assert_same(together[1], wanted(8))
    assert len(together[0].tokens) == 35


def test_a_watchdog_ends_a_request_alone() -> None:
    loop = replace(ask(prompt(3, 1), 36), watchdog=TokenClasses(blanks=frozenset(range(decoder().plan.vocab))))
    engine = make_engine()
    number, other = engine.submit(loop), engine.submit(ask(prompt(3, 2), 36))
    watchdog = engine._sequences[number].watchdog
    assert watchdog is not None
    watchdog._blanks = 250  # as after a longer reply than the context holds here
    ends = {e.request: e.finish for _ in iter(lambda: engine.has_work, False) for e in engine.step() if e.finish}
    assert ends == {number: FinishReason.REPETITION, other: FinishReason.LENGTH}
    assert_no_leaks(engine)


def test_what_can_not_be_meant_is_refused() -> None:
    engine = make_engine()
    wrong: dict[str, Any] = {"min_tokens": 9, "priority": 1.5, "deadline_s": 0, "watchdog": True}
    with pytest.raises(RequestError) as caught:
        engine.submit(Request((1,), max_tokens=3, **wrong))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"request.{name}" for name in wrong]


def test_stats_say_what_the_engine_holds() -> None:
    engine = make_engine(max_rows=8, max_sequences=2, checkpoints=4)
    for seed in (1, 2, 3):
        engine.submit(ask(prompt(14, seed), 2))
    assert (engine.stats().running, engine.stats().waiting, engine.stats().queued_prompt_tokens) == (0, 3, 42)
    assert (engine.stats().steps, engine.stats().kv_usage) == (0, 0)
    engine.step()
    found = engine.stats()
    assert (found.running, found.waiting, found.queued_prompt_tokens, found.step_tokens) == (2, 1, 42 - 8, 8)
    assert found.kv_usage > 0
    while engine.has_work:
        engine.step()
    again = engine.submit(ask(prompt(14, 3), 2))
    while engine.has_work:
        engine.step()
    found = engine.stats()
    assert (found.running, found.waiting, found.queued_prompt_tokens) == (0, 0, 0)
    assert (found.prefix_queries, found.prefix_hits) == (4 * 14, 13)
    assert found.preemptions == 0
    waits = engine.submit(ask(prompt(14, 3), 2))
    assert engine.stats().waiting == 1
    engine.cancel(waits)
    assert engine.stats().waiting == 0
    assert again < waits
