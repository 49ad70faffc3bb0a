"""Engine and scheduler under pressure: random arrivals, cancellations, faults, and fewer pages than the requests want.

Owns the claim that a request's tokens and numbers are those it gets alone, in one step, from a roomy cache, whatever runs beside
it, and the laws of every step (see `Watched`). All runs use the reference kernels. Before each step all free pages are filled
with NaN. Refuses to judge the numbers themselves; read `tests/parity/test_engine_parity.py` for those.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.cache.prefix_cache import PrefixCache
from gemcutter.engine.engine import Engine
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import FinishReason, PromptReport, Request, RequestEvent
from gemcutter.engine.sampler import HostSampler
from gemcutter.engine.sampling import TokenLogprobs
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.errors import RequestError
from gemcutter.model.text import Decoder
from gemcutter.plan import group_of
from tests.topologies import FULL, SIZES, SLIDING, build_decoder, build_oracle, plan_of, prompt

CONTEXT = 40
PAGE_TOKENS = 4
CHECKPOINT_PAGES = 4  # of each group; a window's pages, and one before them
# A windowed writer, a global one, and a reader, so that unwanted rows are dropped; an untied head, so that replies do not loop.
TINY = SIZES["E2B"] | {
    "hidden_size": 16,
    "hidden_size_per_layer_input": 0,
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, FULL, FULL],
    "num_kv_shared_layers": 1,
    "num_attention_heads": 2,
    "sliding_window": 6,
    "tie_word_embeddings": False,
}


@functools.cache
def decoder() -> Decoder:
    return build_decoder(build_oracle(TINY), plan_of(TINY), kernels="reference")


def ask(ids: tuple[int, ...], max_tokens: int = 6, seed: int | None = None, **wants: Any) -> Request:
    """Write a request that is greedy without a seed."""
    return Request(ids, SamplingParams(0.0 if seed is None else 1.0, seed=seed, logprobs=3), max_tokens, **wants)


EARLY = (FinishReason.CANCELLED, FinishReason.ERROR)  # a request that ends so has the beginning of its answer
ROWS: dict[str, Any] = {"prompt_logprobs": 3, "hidden_states": True, "top_logits": 3}
SHARED = prompt(14, 1)
REQUESTS = (
    ask(SHARED + prompt(2, 2), 17, seed=1, top_logits=2),
    ask(SHARED, 14, seed=2),
    ask(SHARED + prompt(6, 3), 5),
    ask(SHARED + prompt(1, 4), 12, seed=3, **ROWS),
    ask(prompt(1, 5), 20, seed=4, prompt_logprobs=0),
    ask(prompt(23, 6), 4, **ROWS),
    ask(prompt(30, 7), 10, seed=5),  # ends with the context
    ask(prompt(CONTEXT, 8), 0, **ROWS),
    ask(prompt(5, 9), 35, seed=6, stop_ids=frozenset({3, 29})),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A request, when it joins (in steps), and the tokens after which it is cancelled (0: after its first step)."""

    request: Request
    joins: int = 0
    cancel_at: int | None = None


@dataclass(slots=True)
class Answer:
    """What came back for a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    report: PromptReport | None = None
    given: PromptReport | None = None  # a copy of the report as it came
    finish: FinishReason | None = None
    error: Exception | None = None

    def note(self, event: RequestEvent) -> None:
        assert self.finish is None, "an event after the end"
        assert (event.prompt is None) == (self.report is not None or event.finish in EARLY), "one report, at first"
        self.finish, self.error = event.finish, event.error
        self.tokens += [] if event.token is None else [event.token]
        self.logprobs += [] if event.logprobs is None else [event.logprobs]
        if event.prompt is not None:
            self.report, self.given = event.prompt, copy(event.prompt)

    @property
    def cached(self) -> int | None:
        return self.report.cached_tokens if self.report is not None else None

    def prompt_numbers(self) -> Tensor:
        """Lay the report's log-probabilities, logits and states in a row."""
        assert self.report is not None
        listed = [*_flat(self.report.logprobs), *(value for _, value in self.report.top_logits)]
        return torch.cat([torch.tensor(listed), *(chunk.flatten() for chunk in self.report.hidden_states)])


def _flat(entries: Iterable[TokenLogprobs]) -> Iterable[float]:
    return (value for entry in entries for value in (entry.token, entry.logprob, *(value for _, value in entry.top)))


def assert_same(found: Answer, wanted: Answer) -> None:
    """See that an answer is the one wanted; that of a cancelled or failed request is its beginning."""
    tokens = len(found.tokens)
    if found.finish in EARLY:
        assert found.tokens == wanted.tokens[:tokens]
        assert len(found.logprobs) == tokens
    else:
        assert (found.tokens, found.finish) == (wanted.tokens, wanted.finish)
        assert len(found.logprobs) == len(wanted.logprobs)
    torch.testing.assert_close(list(_flat(found.logprobs)), list(_flat(wanted.logprobs[: len(found.logprobs)])))
    assert (found.report is None) <= (found.finish in EARLY)
    if found.report is not None:
        torch.testing.assert_close(found.prompt_numbers(), wanted.prompt_numbers())
        assert found.report == found.given, "a report changed after it was given"


def make_engine(max_rows: int = 8, max_sequences: int = 3, checkpoints: int = 0, spare: int = 99) -> Engine:
    """Build an engine whose every group has pages for one whole sequence and `spare` more."""
    engine = Engine(decoder(), CONTEXT, max_rows, max_sequences)
    counts = page_counts(decoder().plan, CONTEXT, max_rows, page_tokens=PAGE_TOKENS)
    roomier = {window: PoolSize(count.pages + spare, count.tokens) for window, count in counts.items()}
    engine.pool = engine.scheduler.pool = engine.runner.pool = PagedKVCache(decoder().plan, roomier, torch.float32)
    engine.prefix = engine.scheduler.prefix = PrefixCache(engine.pool, dict.fromkeys(counts, CHECKPOINT_PAGES * checkpoints))
    return engine


class Watched:
    """An engine that must keep the laws of every step.

    At most `max_rows` rows of at most `max_sequences` sequences, those that decode first. The oldest request advances, nobody
    overtakes an older one, nobody is let in while a running one gets no rows; so every request ends.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.answers = engine, dict[int, Answer]()
        self.steps_left = 0  # one a row: once a request is the oldest, it is never preempted
        self.rows: list[dict[int, int]] = []  # of every step, by request
        self.failed: list[dict[int, int]] = []  # of every step that an error ended
        self.preempted: list[bool] = []  # for every preemption: was it within the prompt?
        self._schedule = engine.scheduler.schedule
        pytest.MonkeyPatch().setattr(engine.scheduler, "schedule", self._checked)

    def _checked(self) -> list[ScheduledChunk]:
        scheduler = self.engine.scheduler
        poison_free_pages(self.engine.pool)
        before = [(sequence, sequence.table) for sequence in scheduler.running]
        works = self._schedule()
        rows = {work.sequence.number: work.rows for work in works}
        self.rows.append(rows)
        self.preempted += [sequence.in_prompt for sequence, table in before if sequence.table is not table]
        self.steps_left -= bool(works)
        assert self.steps_left >= 0, "requests do not end"
        assert len(works) == len(rows) <= len(scheduler.running) <= scheduler.max_num_seqs
        assert all(rows.values())
        assert sum(rows.values()) <= scheduler.max_batched_tokens
        late = [work.sequence.in_prompt or work.sequence.pending > 1 for work in works]
        assert late == sorted(late), "a prompt's rows lie before a decode row"
        unfinished = [number for number, answer in self.answers.items() if answer.finish is None]
        patient = scheduler.awaiting
        there = [s.number for s in (*scheduler.running, *scheduler.waiting) if s.number not in patient]
        assert there == [number for number in unfinished if number not in patient], "a request overtook an older one"
        assert all(number in rows for number in unfinished[:1]), "the oldest request stands still"
        newcomers = rows.keys() - {sequence.number for sequence, _ in before}
        assert not newcomers or len(rows) == len(scheduler.running), "somebody was let in while another gets no rows"
        return works

    def submit(self, request: Request) -> int:
        number = self.engine.submit(request)
        self.answers[number] = Answer()
        self.steps_left += len(request.prompt) + request.max_tokens
        return number

    def step(self) -> list[RequestEvent]:
        events = self.engine.step()
        for event in events:
            self.answers[event.request].note(event)
        if any(event.finish is FinishReason.ERROR for event in events):
            self.failed.append(self.rows[-1])
        return events

    def cancel(self, number: int) -> None:
        event = self.engine.cancel(number)
        assert event is not None
        self.answers[number].note(event)

    def finish(self) -> None:
        """Step until every request has ended."""
        while self.engine.has_work:
            self.step()
        assert all(answer.finish is not None for answer in self.answers.values())


def poison_free_pages(pool: PagedKVCache) -> None:
    """Fill what nobody holds with NaN."""
    for group in pool.groups:
        book = pool.allocators[group.id]
        free = torch.tensor([holders == 0 for holders in book.ref_counts])
        for layer in group.layers:
            for tensor in (pool.keys[layer], pool.values[layer]):
                tensor.view(-1, book.tokens, *tensor.shape[1:])[free] = torch.nan


def assert_no_leaks(engine: Engine) -> None:
    """See that every page is free once the checkpoints are gone."""
    while engine.prefix.evict():
        pass
    assert all(book.free == len(book.ref_counts) for book in engine.pool.allocators.values()), "pages were leaked"


def alone(request: Request) -> Answer:
    """Run a request by itself: its prompt in one step, one page, no checkpoints."""
    watched = Watched(Engine(decoder(), CONTEXT, max_batched_tokens=CONTEXT))
    number = watched.submit(request)
    watched.finish()
    return watched.answers[number]


@functools.cache
def wanted(index: int) -> Answer:
    """Return the answer to one of REQUESTS alone."""
    return alone(REQUESTS[index])


def drive(watched: Watched, jobs: Sequence[Job], fault: BaseException | None = None) -> list[Answer]:
    """Submit each job when it is due (they are in order), cancel those that say so, outlive `fault`; give the answers."""
    numbers = dict[int, Job]()
    for step in count():
        for job in jobs[len(numbers) :]:
            if job.joins == step:
                numbers[watched.submit(job.request)] = job
        try:
            watched.step()
        except BaseException as error:
            if error is not fault:
                raise
            watched.steps_left += 1
        for number, job in numbers.items():
            answer = watched.answers[number]
            if job.cancel_at is not None and len(answer.tokens) >= job.cancel_at and answer.finish is None:
                watched.cancel(number)
        if len(numbers) == len(jobs) and not watched.engine.has_work:
            break
    assert_no_leaks(watched.engine)
    return [watched.answers[number] for number in numbers]


JOBS = st.builds(
    Job,
    st.sampled_from(REQUESTS),
    joins=st.integers(0, 20),
    cancel_at=st.sampled_from((None, None, None, None, 0, 3)),
)


# Requests that come and go, and an engine with few rows, places and pages.
SCENES: dict[str, st.SearchStrategy[Any]] = {
    "jobs": st.lists(JOBS, min_size=4, max_size=7).map(lambda jobs: sorted(jobs, key=lambda job: job.joins)),
    "max_rows": st.sampled_from((16, 7, 4)),
    "max_sequences": st.integers(2, 4),
    "checkpoints": st.integers(0, 6),
    "spare": st.integers(0, 9),
}


@settings(derandomize=True, deadline=None, max_examples=20)
@given(**SCENES)
def test_every_request_ends_with_what_it_gets_alone(
    jobs: list[Job], max_rows: int, max_sequences: int, checkpoints: int, spare: int
) -> None:
    watched = Watched(make_engine(max_rows, max_sequences, checkpoints, spare))
    for job, answer in zip(jobs, drive(watched, jobs), strict=True):
        assert_same(answer, wanted(REQUESTS.index(job.request)))
        assert (answer.finish is FinishReason.CANCELLED) <= (job.cancel_at is not None)


@pytest.mark.parametrize("checkpoints", [0, 2])
def test_preempted_requests_start_again_unseen(checkpoints: int) -> None:
    watched = Watched(make_engine(max_rows=16, max_sequences=4, checkpoints=checkpoints, spare=2))
    order = (4, 1, 3, 5, 6, 8)
    for index, answer in zip(order, drive(watched, [Job(REQUESTS[index]) for index in order]), strict=True):
        assert_same(answer, wanted(index))
    assert set(watched.preempted) == {True, False}, "the test needs requests preempted within their prompts, and after"


def test_a_report_is_not_changed_by_a_preemption_after_it() -> None:
    watched = Watched(make_engine(max_rows=16, checkpoints=2, spare=0))
    watched.submit(REQUESTS[1])
    watched.finish()
    watched.submit(ask(prompt(5, 20), 34))
    late = watched.submit(REQUESTS[0])
    watched.finish()
    assert not all(watched.preempted), "the test needs the later request preempted after its report"
    assert watched.answers[late].cached == len(SHARED)
    assert_same(watched.answers[late], wanted(0))


def test_the_draw_follows_the_seed_alone() -> None:
    requests = [ask(SHARED, 12, seed=seed) for seed in (7, 7, 8)]
    watched = Watched(make_engine(max_rows=16, spare=0))
    first, same, other = drive(watched, [Job(request) for request in requests])
    assert watched.preempted
    assert first.tokens == same.tokens == alone(requests[0]).tokens
    assert other.tokens == alone(requests[2]).tokens != first.tokens


def test_a_stream_of_short_requests_does_not_starve_a_long_prompt() -> None:
    watched = Watched(make_engine(max_rows=16, max_sequences=4, spare=0))
    long = -1
    for step in range(40):  # for ever, as far as the long prompt can tell
        if step == 15:
            long = watched.submit(ask(prompt(39, 30), 1))
        elif step % 2 == 0:
            watched.submit(ask(prompt(2, step), 5))
        watched.step()
    assert watched.answers[long].finish is FinishReason.LENGTH


def test_a_long_prompt_does_not_stall_those_who_decode() -> None:
    watched = Watched(make_engine(max_rows=6))
    chats = [watched.submit(ask(prompt(1, seed), 20, seed=seed)) for seed in (1, 2)]
    watched.step()
    long = watched.submit(ask(prompt(33, 3), 2))
    while watched.answers[long].report is None:
        events = watched.step()
        assert [event.request for event in events[:2]] == chats
    assert watched.rows[1:] == [{chats[0]: 1, chats[1]: 1, long: rows} for rows in (4, 4, 4, 4, 4, 4, 4, 4, 1)]


@pytest.mark.parametrize("fault", [KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["reserve", "attention", "logits", "sample"])
def test_a_fault_in_a_step_leaves_no_trace(where: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    order = (1, 4, 3, 5, 0, 6)
    answers = [wanted(index) for index in order]
    owner = {"reserve": BlockTable, "attention": decoder().layers[0], "logits": decoder(), "sample": HostSampler}[where]
    real, calls, raised = getattr(owner, where), count(1), list[int]()

    def failing(*args: Any) -> Any:
        found = real(*args)  # so that there is something to undo
        if (call := next(calls)) in (1, 2, 3, 5, 8, 13, 21, 34):
            raised.append(call)
            raise fault
        return found

    monkeypatch.setattr(owner, where, failing)
    watched = Watched(make_engine(max_rows=16, checkpoints=3, spare=1))
    jobs = [Job(REQUESTS[index], joins) for joins, index in enumerate(order)]
    for found, answer in zip(drive(watched, jobs, fault), answers, strict=True):
        assert_same(found, answer)
    assert len(raised) == 8


@pytest.mark.parametrize("where", ["reserve", "attention", "logits", "sample"])
def test_an_error_ends_the_requests_of_its_step_and_no_others(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised while rows are chosen, in a layer, in the head or in the sampler as a whole."""
    order, fault = (1, 4, 3, 5, 0, 6), RuntimeError("out of memory")
    answers = [wanted(index) for index in order]
    owner = {"reserve": BlockTable, "attention": decoder().layers[0], "logits": decoder(), "sample": HostSampler}[where]
    real, calls, raised = getattr(owner, where), count(1), list[int]()

    def failing(*args: Any) -> Any:
        found = real(*args)
        if (call := next(calls)) in (3, 13):
            raised.append(call)
            raise fault
        return found

    monkeypatch.setattr(owner, where, failing)
    watched = Watched(make_engine(max_rows=16, checkpoints=3, spare=1))
    found = drive(watched, [Job(REQUESTS[index], 2 * joins) for joins, index in enumerate(order)])
    assert len(raised) == 2
    failed = {number for number, answer in enumerate(found) if answer.finish is FinishReason.ERROR}
    assert 0 < len(failed) < len(order)
    for answer, other in zip(found, answers, strict=True):
        assert (answer.error is fault) is (answer.finish is FinishReason.ERROR)
        assert_same(answer, other)
    if where == "attention":
        assert failed == {number for step in watched.failed for number in step}


def test_an_error_of_its_own_ends_a_request_alone() -> None:
    """A processor that fails at its third token, beside requests that share its steps; drafts, masks and reports go on."""

    def third(prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        if len(reply) == 2:
            raise ValueError("the grammar is lost")
        return logits_V

    watched = Watched(make_engine(max_rows=16))
    jobs = [Job(REQUESTS[1]), Job(replace(REQUESTS[0], logits_processors=(third,))), Job(REQUESTS[4])]
    first, failed, last = drive(watched, jobs)
    assert_same(first, wanted(1))
    assert_same(last, wanted(4))
    assert (failed.finish, repr(failed.error)) == (FinishReason.ERROR, "ValueError('the grammar is lost')")
    assert failed.tokens == wanted(0).tokens[:2]


def test_a_report_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = wanted(1)
    monkeypatch.setattr("gemcutter.engine.runner.logprobs_of", Mock(side_effect=ValueError("no number")))
    first, failed = drive(Watched(make_engine(max_rows=32)), [Job(REQUESTS[1]), Job(REQUESTS[5])])
    assert_same(first, answer)
    assert (failed.tokens, failed.finish) == ([], FinishReason.ERROR)


def test_a_fault_leaves_the_tables_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(make_engine(checkpoints=2))
    stopped = watched.submit(REQUESTS[6])
    watched.step()
    before = [book.free for book in watched.engine.pool.allocators.values()]
    with monkeypatch.context() as patch:
        patch.setattr(decoder().layers[0], "attention", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            watched.step()
    assert [book.free for book in watched.engine.pool.allocators.values()] == before
    watched.cancel(stopped)
    again = watched.submit(REQUESTS[6])
    watched.finish()
    assert watched.answers[again].cached == 8  # one chunk
    assert_same(watched.answers[again], wanted(6))


def test_prompts_go_on_where_a_checkpoint_ends() -> None:
    watched = Watched(make_engine(checkpoints=20))

    def cached(request: Request) -> int | None:
        number = watched.submit(request)
        watched.finish()
        assert_same(watched.answers[number], alone(request))
        return watched.answers[number].cached

    assert cached(ask(SHARED, 9)) == 0
    turn = (*SHARED, *watched.answers[0].tokens)
    assert cached(ask(turn + prompt(5, 40), seed=1)) == len(turn) - 1  # the reply's last token was never computed
    assert cached(ask(SHARED, 9)) == len(SHARED) - 1  # the last token is computed again, for its logits
    assert cached(ask(SHARED + prompt(20, 41), seed=2, top_logits=3)) == len(SHARED)
    assert cached(ask(SHARED, prompt_logprobs=1)) == 0
    assert cached(ask(SHARED, hidden_states=True)) == 0
    assert cached(ask(prompt(14, 42))) == 0
    stopped = watched.submit(ask(prompt(30, 43)))
    for _ in range(3):
        watched.step()
    watched.cancel(stopped)
    assert cached(ask(prompt(30, 43))) == 24  # three chunks of 8
    twins = [ask(SHARED + prompt(3, seed), 9, seed=seed) for seed in (44, 45)]  # both write into the page that they share
    for number, request in [(watched.submit(request), request) for request in twins]:
        watched.finish()
        assert watched.answers[number].cached == len(SHARED)
        assert_same(watched.answers[number], alone(request))
    assert_no_leaks(watched.engine)


def test_checkpoints_give_way_before_anyone_is_preempted() -> None:
    watched = Watched(make_engine(checkpoints=4, spare=3))
    watched.submit(REQUESTS[6])
    watched.finish()
    assert watched.engine.prefix.nbytes
    assert watched.engine.pool.allocators[group_of(None)].free < 5  # which is what each of the next two needs
    requests = [ask(prompt(9, seed), 9, seed=seed) for seed in (50, 51)]
    numbers = [watched.submit(request) for request in requests]
    watched.finish()
    assert not watched.preempted
    for number, request in zip(numbers, requests, strict=True):
        assert_same(watched.answers[number], alone(request))
    assert_no_leaks(watched.engine)


def test_a_prefix_found_by_a_prompt_that_must_wait_stays() -> None:
    watched = Watched(make_engine(checkpoints=4, spare=3))
    watched.submit(ask(SHARED, 0))
    watched.finish()
    watched.submit(ask(prompt(32, 60), 8))
    for _ in range(5):
        watched.step()
    request = ask(SHARED + prompt(12, 61), 4)
    waits = watched.submit(request)
    watched.step()
    assert [sequence.number for sequence in watched.engine.scheduler.waiting] == [waits]
    assert watched.engine.prefix.usable(request.prompt) == len(SHARED), "a prefix was evicted in vain"
    watched.finish()
    assert_same(watched.answers[waits], alone(request))
    assert_no_leaks(watched.engine)


def test_requests_are_cancelled_wherever_they_are() -> None:
    watched = Watched(make_engine(max_rows=6))
    stays, decodes, prefills, waits = (watched.submit(REQUESTS[index]) for index in (4, 1, 6, 0))
    for _ in range(5):
        watched.step()
    running = {sequence.number: sequence for sequence in watched.engine.scheduler.running}
    assert [sequence.number for sequence in watched.engine.scheduler.waiting] == [waits]
    assert 0 < running[prefills].computed < len(REQUESTS[6].prompt)
    assert len(watched.answers[decodes].tokens) in range(1, 9)
    for number in (waits, prefills, decodes):
        watched.cancel(number)
        assert watched.engine.cancel(number) is None
    watched.finish()
    for number, index in ((stays, 4), (decodes, 1), (prefills, 6), (waits, 0)):
        assert_same(watched.answers[number], wanted(index))
        assert watched.engine.cancel(number) is None
    assert (watched.answers[stays].finish, watched.answers[decodes].finish) == (FinishReason.LENGTH, FinishReason.CANCELLED)
    assert_no_leaks(watched.engine)


@pytest.mark.parametrize(("length", "max_tokens", "reply"), [(9, 7, 7), (30, 10, 10), (30, 11, 10), (39, 50, 1), (40, 0, 0)])
def test_max_tokens_or_the_context_end_a_reply(length: int, max_tokens: int, reply: int) -> None:
    watched = Watched(make_engine(spare=0))
    (answer,) = drive(watched, [Job(ask(prompt(length, 7), max_tokens, seed=5))])
    assert answer.finish is FinishReason.LENGTH
    assert len(answer.tokens) == len(answer.logprobs) == reply
    assert answer.tokens == wanted(6).tokens[:reply] or length != len(REQUESTS[6].prompt)


def test_a_request_for_no_tokens_is_answered_by_its_report() -> None:
    answer, ids = wanted(7), REQUESTS[7].prompt
    assert (answer.tokens, answer.logprobs, answer.finish) == ([], [], FinishReason.LENGTH)
    assert answer.report is not None
    assert [entry.token for entry in answer.report.logprobs] == list(ids[1:])
    assert [len(answer.report.top_logits), *map(len, answer.report.hidden_states)] == [3, len(ids)]


def test_a_stop_id_ends_a_reply_and_is_not_part_of_it() -> None:
    free = alone(replace(REQUESTS[8], stop_ids=frozenset()))
    stop = next(place for place, token in enumerate(free.tokens) if token in REQUESTS[8].stop_ids)
    assert wanted(8).finish is FinishReason.STOP
    assert wanted(8).tokens == free.tokens[:stop]


def test_what_can_never_run_is_refused_with_every_reason() -> None:
    engine = make_engine()
    sampling = SamplingParams(logit_bias={60: 1.0, 3: 1.0}, suppress=(-7, 5))
    hopeless = Request((1,) * 40 + (-1, 60), sampling, max_tokens=-1, prompt_logprobs=-2, top_logits=-3)
    with pytest.raises(RequestError) as caught:
        engine.submit(hopeless)
    reasons = {
        "request.prompt: ids": "[-1, 60]",
        "request.prompt: 42": "the context holds 40",
        "request.max_tokens": "-1",
        "request.prompt_logprobs": "-2",
        "request.top_logits": "-3",
        "sampling.logit_bias": "[60]",
        "sampling.suppress": "[-7]",
    }
    problems = caught.value.problems
    assert len(problems) == len(reasons)
    for where, what in reasons.items():
        assert any(problem.startswith(where) and what in problem for problem in problems), where
    for ids, max_tokens, problem in (((), 1, "empty"), (prompt(40), 1, "40 tokens"), (prompt(41), 0, "41 tokens")):
        with pytest.raises(RequestError, match=problem):
            engine.submit(ask(ids, max_tokens))
    assert not engine.has_work
    assert engine.step() == []
