"""The engine's own thread: whatever threads, finalizers, signals and failing kernels do, every request ends once, with a reason.

Owns what used to break: cancels by the cyclic collector in the middle of a step, interrupts between a step and the handing out of
its tokens, two threads on one model, a request that fails in a step and takes others along. Runs the reference kernels, so that a
survivor's text is its solo text bit for bit. Read `test_scheduler.py` for the engine alone.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor

import gemcutter
from gemcutter import GemcutterError, Model, RequestError
from gemcutter.engine.engine import Engine
from gemcutter.engine.loop import EngineLoop
from gemcutter.engine.request import FinishReason, Request, RequestEvent
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.scheduler import ScheduledChunk
from tests.topologies import prompt
from tests.unit.test_scheduler import decoder

OPTIONS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
TICK_S = 0.2


def open_loop(**limits: int) -> EngineLoop:
    return EngineLoop(Engine(decoder(), 40, 16, 6, 1 << 20, **limits))


def free_pages(engine: Engine) -> bool:
    """Return whether every page is free once the prefix cache is empty."""
    while engine.prefix.evict():
        pass
    return all(book.free == len(book.ref_counts) for book in engine.pool.allocators.values())


def read(events: SimpleQueue[RequestEvent]) -> list[RequestEvent]:
    """Read a request's events to the last one."""
    found = [events.get(timeout=60)]
    while found[-1].finish is None:
        found.append(events.get(timeout=60))
    return found


@pytest.fixture(scope="module")
def shared() -> Iterator[Model]:
    with gemcutter.load("demo", dtype="float32", kernels="reference", context=256, max_num_seqs=4) as model:
        yield model


# ---- the loop ----


def test_two_hundred_requests_of_sixteen_threads_end_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random cancels, readers that leave, a layer that raises in three steps; survivors say what they say alone."""
    prompts = [prompt(3 + seed % 20, seed) for seed in range(20)]
    with torch.inference_mode():
        solo = [
            [event.token for event in EngineLoop(Engine(decoder(), 40)).complete([Request(ids, max_tokens=9)])[0]]
            for ids in prompts
        ]
    loop, attention, steps = open_loop(), decoder().layers[0].attention, iter(range(10**9))

    def failing(*arguments: Any) -> Tensor:
        if next(steps) in (40, 90, 91):
            raise RuntimeError("the kernel failed")
        found: Tensor = attention(*arguments)
        return found

    monkeypatch.setattr(decoder().layers[0], "attention", failing)
    ends: Counter[int] = Counter()
    reasons: Counter[FinishReason] = Counter()
    lock = threading.Lock()

    def use(seed: int) -> None:
        chance = random.Random(seed)
        index, fate = chance.randrange(20), chance.random()
        events: SimpleQueue[RequestEvent] = SimpleQueue()

        def sink(event: RequestEvent) -> None:
            if event.finish is not None:
                with lock:
                    ends[event.request] += 1
                    reasons[event.finish] += 1
            if fate > 0.9 and event.token is not None:
                raise ValueError("the reader has left")
            events.put(event)

        number = loop.submit(Request(prompts[index], max_tokens=9), sink)
        if fate < 0.3:
            time.sleep(chance.random() * 0.05)
            loop.cancel(number)
        if fate > 0.9:
            return
        found = read(events)
        tokens = [event.token for event in found if event.token is not None]
        assert tokens == solo[index][: len(tokens)]
        match found[-1].finish:
            case FinishReason.LENGTH:
                assert tokens == solo[index]
            case FinishReason.CANCELLED:
                assert fate < 0.3
            case _:
                assert str(found[-1].error) == "the kernel failed"

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(200)))
    assert not loop.run(lambda engine: engine.has_work)
    assert loop.run(free_pages)
    assert len(ends) + reasons[FinishReason.STOP] >= 170  # a reader that left is told nothing more
    assert set(ends.values()) == {1}
    assert {FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.ERROR} <= set(reasons)
    loop.close()


def test_requests_of_one_call_start_together() -> None:
    loop, sizes = open_loop(), list[int]()
    engine: Engine = loop.engine
    launch = engine.runner.launch

    def noted(chunks: Sequence[ScheduledChunk]) -> Any:
        sizes.append(len(chunks))
        return launch(chunks)

    engine.runner.launch = noted  # type: ignore[method-assign]
    loop.complete([Request(prompt(3, seed), max_tokens=4) for seed in range(5)])
    assert sizes[0] == 5
    loop.close()


def test_the_thread_starts_late_sleeps_and_ends() -> None:
    before = threading.active_count()
    loop = open_loop()
    assert threading.active_count() == before
    assert loop.problem is None
    assert loop.run(lambda engine: torch.is_inference_mode_enabled())
    assert threading.active_count() == before + 1
    spent = time.process_time()
    time.sleep(TICK_S)
    assert time.process_time() - spent < TICK_S / 4
    assert loop.problem is None
    loop.close()
    loop.close()
    assert loop.problem == "the model is closed; load it again"
    assert threading.active_count() == before
    with pytest.raises(RequestError, match="the model is closed"):
        loop.run(lambda engine: None)


def serving_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gemcutter-engine"]


def wait_for_the_end(threads: set[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_thread_that_python_takes_for_ended_is_not_started_again() -> None:
    """Up to Python 3.12 an interrupt inside of `Thread.is_alive` or `join` marks a running thread as stopped."""
    before, loop = set(serving_threads()), open_loop()
    first = loop.run(lambda engine: threading.get_ident())
    (thread,) = set(serving_threads()) - before
    thread.is_alive = lambda: False  # type: ignore[method-assign]
    assert loop.run(lambda engine: threading.get_ident()) == first
    assert set(serving_threads()) - before == {thread}
    assert loop.problem is None
    del thread.is_alive  # type: ignore[method-assign]
    loop.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("is_late", [False, True])
def test_an_interrupt_while_the_thread_starts_leaves_one_thread(is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the thread whose start was interrupted runs by itself, a single one serves, and `close` ends it."""
    before, loop, start, interrupted = set(serving_threads()), open_loop(), threading.Thread.start, threading.Event()

    def interrupt(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        if is_late:
            start(thread)
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.run(lambda engine: None)
    assert interrupted.is_set()
    assert len({loop.run(lambda engine: threading.get_ident()) for _ in range(3)}) == 1
    loop.close()
    wait_for_the_end(set(serving_threads()) - before)


def test_a_second_thread_leaves_an_engine_that_is_served() -> None:
    before, loop = set(serving_threads()), open_loop()
    first = loop.run(lambda engine: threading.get_ident())
    loop._owner.start()
    assert {loop.run(lambda engine: threading.get_ident()) for _ in range(3)} == {first}
    loop.close()
    loop._owner.start()  # late: nothing is left to serve
    wait_for_the_end(set(serving_threads()) - before)


def test_a_loop_that_is_dropped_ends_its_thread() -> None:
    before = threading.active_count()
    loop = open_loop()
    loop.complete([Request(prompt(3), max_tokens=2)])
    del loop
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_closing_ends_every_request_and_refuses_new_ones() -> None:
    loop, boxes = open_loop(), [SimpleQueue[RequestEvent]() for _ in range(9)]
    for seed, events in enumerate(boxes):
        loop.submit(Request(prompt(5, seed), max_tokens=30), events.put)
    loop.close()
    assert {read(events)[-1].finish for events in boxes} <= {FinishReason.CANCELLED, FinishReason.LENGTH}
    with pytest.raises(RequestError, match="the model is closed"):
        loop.complete([Request(prompt(3))])


@pytest.mark.parametrize("count", [1, 2])
def test_torch_has_as_many_threads_as_the_caller(count: int) -> None:
    loop, before = open_loop(), torch.get_num_threads()
    try:
        loop.run(lambda engine: None)
        torch.set_num_threads(count)  # after the thread has started
        assert loop.run(lambda engine: torch.get_num_threads()) == count
        loop.complete([Request(prompt(3), max_tokens=3)])
        assert loop.run(lambda engine: torch.get_num_threads()) == count
    finally:
        torch.set_num_threads(before)
        loop.close()


def test_an_error_between_two_steps_reaches_who_asked() -> None:
    loop = open_loop()

    def broken(engine: Engine) -> None:
        raise KeyError("nothing")

    with pytest.raises(KeyError, match="nothing"):
        loop.run(broken)
    assert len(loop.complete([Request(prompt(3), max_tokens=2)])[0]) == 2
    loop.close()


def test_an_engine_that_raises_ends_its_requests_and_serves_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes out of a step, even an interrupt, the thread lives on."""
    loop, schedule = open_loop(), Engine.step

    def raises_once(engine: Engine) -> Any:
        monkeypatch.setattr(Engine, "step", schedule)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", raises_once)
    with pytest.raises(GemcutterError, match="the engine was interrupted"):
        loop.complete([Request(prompt(3), max_tokens=4)])
    assert len(loop.complete([Request(prompt(3), max_tokens=4)])[0]) == 4
    assert loop.run(free_pages)
    loop.close()


# ---- streams ----


def test_the_collector_may_end_a_stream_in_the_middle_of_a_step(shared: Model) -> None:
    """A stream in a reference cycle is freed wherever the collector runs: here right after rows were reserved."""
    right = [shared.generate([[2, 10 + seed, 20, 30]], **OPTIONS)[0].tokens for seed in range(4)]
    streams = [shared.stream([2, 10 + seed, 20, 30], **OPTIONS) for seed in range(4)]
    for stream in streams:
        next(stream)
    cycle: list[Any] = [streams.pop(1)]
    cycle.append(cycle)
    del cycle, stream
    scheduler, collected = shared.engine.scheduler, list[int]()
    schedule = scheduler.schedule

    def collecting() -> list[ScheduledChunk]:
        found = schedule()
        if not collected:
            collected.append(gc.collect())
        return found

    scheduler.schedule = collecting  # type: ignore[method-assign]
    try:
        assert [stream.finish().tokens for stream in streams] == [right[index] for index in (0, 2, 3)]
    finally:
        del scheduler.schedule  # type: ignore[method-assign]
    assert shared.loop.run(free_pages)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_interrupts_lose_no_token_of_other_streams_and_no_page(shared: Model) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    chance, prompts = random.Random(1), [[2, *(8 + seed * 5 % 50 for seed in range(count))] for count in (3, 40, 90)]
    started = time.perf_counter()
    right = [found.tokens for found in shared.generate(prompts, **OPTIONS)]
    usual = time.perf_counter() - started
    before, hits, done = signal.signal(signal.SIGALRM, interrupt), 0, 0
    try:
        for _ in range(15):
            pair = [chance.randrange(3) for _ in range(2)]
            streams = [shared.stream(prompts[index], **OPTIONS) for index in pair]
            for index, stream in zip(pair, streams, strict=True):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-4 + chance.random() * 2 * usual)
                    found = stream.finish()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    assert found.tokens == right[index]
                    done += 1
                except KeyboardInterrupt:
                    hits += 1
                    assert stream.finish().finish_reason == "cancelled" or list(stream) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits
    assert done
    del stream, streams
    assert not shared.loop.run(lambda engine: engine.has_work)
    assert shared.loop.run(free_pages)


def test_threads_share_a_model(shared: Model) -> None:
    right = [shared.generate([[2, 5 + index, 6]], **OPTIONS)[0].tokens for index in range(4)]

    def use(seed: int) -> bool:
        index = seed % 4
        return shared.generate([[2, 5 + index, 6]], **OPTIONS)[0].tokens == right[index]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(24)))


def test_a_stream_may_be_read_by_one_thread_and_closed_by_another(shared: Model) -> None:
    stream = shared.stream([2, 5, 6], max_tokens=200, ignore_eos=True)
    next(stream)
    threading.Timer(TICK_S, stream.close).start()
    assert stream.finish().finish_reason == "cancelled"


def test_a_request_that_fails_in_a_step_fails_alone(shared: Model) -> None:
    def broken(prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        raise ValueError("the grammar is lost")

    good = shared.stream([2, 5, 6], **OPTIONS)
    next(good)
    bad = shared.stream([2, 9, 9], **OPTIONS, logits_processors=(broken,))
    for _ in range(2):
        with pytest.raises(RequestError, match="ValueError: the grammar is lost"):
            bad.finish()
    assert len(good.finish().tokens) == 12
    assert len(shared.generate([[2, 4]], max_tokens=2, ignore_eos=True)[0].tokens) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {1.5: 1.0}}, {"top_k": True, "temperature": 1.0}, {"temperature": 2**640}, {"repetition_penalty": 2**640},
        {"logprobs": True}, {"suppress": {True: 1}}, {"max_tokens": None}, {"max_tokens": True}, {"stop": 5}, {"sampling": {}},
        {"stop": (text for text in "e")}, {"suppress": 5}, {"suppress": "a"}, {"presence_penalty": 10**400}, {"seed": 1.5},
        {"hidden_states": 1}, {"ignore_eos": "no"}, {"enable_thinking": 1}, {"logits_processors": [5]}, {"adapter": "none"},
        {"top_logits": None}, {"prompt_logprobs": 1.5},
    ],
    ids=lambda options: f"{next(iter(options))}={next(iter(options.values()))!r:.12}",
)  # fmt: skip
def test_options_of_a_wrong_kind_are_refused_where_the_request_is_made(options: dict[str, Any], shared: Model) -> None:
    with pytest.raises(RequestError):
        shared.prepare([2, 9, 9], **options)


@pytest.mark.parametrize("options", [{"temperature": 2.0**64}, {"repetition_penalty": 2**64}, {"temperature": 2**64}], ids=str)
def test_large_numbers_are_numbers(options: dict[str, Any], shared: Model) -> None:
    assert len(shared.generate([[2, 9]], **OPTIONS, **options)[0].tokens) == 12


def test_a_completion_may_be_asked_for_again(shared: Model) -> None:
    stream = shared.stream([2, 5], **OPTIONS)
    assert stream.finish() is stream.finish()
    closed = shared.stream([2, 5], **OPTIONS)
    next(closed)
    closed.close()
    found = closed.finish()
    assert found is closed.finish()
    assert found.finish_reason == "cancelled"
    assert list(closed) == []


def test_a_prepared_request_may_be_submitted_again(shared: Model) -> None:
    prepared = shared.prepare("The king", max_tokens=4, stop=["\n"])
    assert prepared.stop == ("\n",)
    first, second = (shared.submit(prepared).finish() for _ in range(2))
    assert first.tokens == second.tokens


def test_metrics_add_up(shared: Model) -> None:
    metrics = shared.generate([[2, 5, 6]], **OPTIONS)[0].metrics
    assert metrics.tpot_s == pytest.approx(metrics.decode_s / 11)
    assert metrics.e2e_s == pytest.approx(metrics.ttft_s + metrics.decode_s)
    assert SamplingParams().is_plain_greedy


# ---- closing a model ----


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_closing_gives_memory_threads_and_files_back() -> None:
    def use() -> None:
        with gemcutter.load("demo", dtype="float32", context=512) as model:
            open_streams.append(model.stream("The king", max_tokens=400))
            next(open_streams[-1])

    open_streams: list[Any] = []
    use()
    handles, threads, memory = len(os.listdir("/proc/self/fd")), threading.active_count(), resident_mb()
    for _ in range(4):
        use()
    assert len(os.listdir("/proc/self/fd")) <= handles
    assert threading.active_count() == threads
    assert resident_mb() - memory < 40  # of the 30 MB and more that each load takes
    assert {stream.finish().finish_reason for stream in open_streams} <= {"cancelled", "length"}


def test_a_closed_model_says_so() -> None:
    model = gemcutter.load("demo", context=64)
    model.close()
    model.close()
    for call in (lambda: model.generate("a"), lambda: model.stream("a"), lambda: model.encode("a"), lambda: model.tokenizer):
        with pytest.raises(RequestError, match="the model is closed; load it again"):
            call()
