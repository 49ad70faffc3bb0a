"""One thread owns the engine; whoever wants something of it puts a message into its inbox.

Owns that thread, the inbox (submit, cancel, run a function or exchange adapters between two steps, close) and the routing of
events to one sink a request, so that nothing reaches the engine during a step, from whatever thread, finalizer or signal handler
it comes. Every request ends exactly once, with a reason. Refuses to know text. Read `engine.py` for what a step does,
`completion.py` for the stream that reads from a sink.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from gemcutter.engine.engine import Engine
from gemcutter.engine.request import FinishReason, Request, RequestEvent
from gemcutter.engine.threads import thread_count
from gemcutter.errors import CapacityError, GemcutterError, RequestError
from gemcutter.model.text import AdaptedBody
from gemcutter.ops.types import AdapterDeltas

Found = TypeVar("Found")
Sink = Callable[[RequestEvent], None]  # called on the engine's thread: it must not block
Message = Callable[["_Owner"], None]
CLOSED = "the model is closed; load it again"
ALLOCATORS = ("can't allocate memory", "out of memory")  # how torch words what Python calls a MemoryError
EXIT_S = 10.0  # that the end of the program waits for a step to end

log = logging.getLogger(__name__)
_owners: weakref.WeakSet[_Owner] = weakref.WeakSet()


class EventRouter:
    """Hands each event to its request's sink; after a request's last event its sink is forgotten."""

    def __init__(self) -> None:
        self._sinks: dict[int, Sink] = {}

    def open(self, number: int, sink: Sink) -> None:
        """Send a request's events to a sink from now on."""
        self._sinks[number] = sink

    @property
    def numbers(self) -> list[int]:
        """Return the requests whose last event has not come yet."""
        return list(self._sinks)

    def deliver(self, event: RequestEvent) -> bool:
        """Hand over an event; return whether somebody could take it. A sink that raises gets nothing more."""
        sink = self._sinks.get(event.request)
        if sink is None:
            return True  # its request has ended for its reader, or belongs to the engine's own caller
        if event.finish is not None:
            del self._sinks[event.request]
        try:
            sink(event)
        except Exception:
            log.exception("the sink of request %d failed; the request is cancelled", event.request)
            self._sinks.pop(event.request, None)
            return False
        return True


class _Serving:
    """The one thread that serves an engine, and that it has ended. `Thread.is_alive` and `join` can't tell that last thing.

    Up to Python 3.12 an interrupt inside of either marks a thread that runs as stopped, for good.
    """

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self._ended = threading.Event()

    def end(self) -> None:
        """Let those that wait go on."""
        self._ended.set()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end, unless this is the thread itself."""
        if self.thread is not threading.current_thread() and self._ended.wait(timeout):
            self.thread.join()


class _Owner:
    """What the engine's thread holds. It knows no one who holds the loop, so a loop that is dropped ends its thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.router = engine, EventRouter()
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.is_closing = False
        self.was_started = False
        self._servings: dict[int, _Serving] = {}  # by process: a fork leaves the thread behind

    @property
    def serving(self) -> _Serving | None:
        """Return the thread that serves the inbox in this process."""
        return self._servings.get(os.getpid())

    def start(self) -> None:
        """Start a thread and wait until one serves, this one or another: whoever was interrupted here may call again."""
        self.was_started, is_served = True, threading.Event()
        threading.Thread(target=self.run, args=(is_served,), name="gemcutter-engine", daemon=True).start()
        is_served.wait()

    def run(self, is_served: threading.Event) -> None:
        """Serve the inbox and step while there is work; blocks while there is none. Returns at once if another thread does."""
        serving, process = _Serving(), os.getpid()
        is_first = self._servings.setdefault(process, serving) is serving  # at once, whatever other threads do
        is_served.set()
        if not is_first:
            return
        try:
            if not self.is_closing:  # a thread that came late, whose loop another one has served and ended
                self._serve()
        finally:
            del self._servings[process]
            serving.end()

    def _serve(self) -> None:
        device = self.engine.decoder.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.inference_mode():
            while not self.is_closing:
                self._read_inbox()
                if self.engine.has_work and not self.is_closing:
                    self._deliver(self._step())
            self._end()

    def _read_inbox(self) -> None:
        with suppress(Empty):
            while not self.is_closing:
                self._obey(self.inbox.get(block=not self.engine.has_work))

    def _obey(self, message: Message) -> None:
        try:
            message(self)
        except Exception:
            log.exception("a message to the engine failed")

    def _step(self) -> list[RequestEvent]:
        try:
            with self.engine.turns.turn():
                return self.engine.step()
        except BaseException as error:  # nobody may end this thread but `close`
            kept = error if isinstance(error, Exception) else RuntimeError(f"the engine was interrupted: {error!r}")
            return self.engine.fail_all(kept)

    def _deliver(self, events: Sequence[RequestEvent]) -> None:
        for event in events:
            if not self.router.deliver(event):
                self.engine.cancel(event.request)

    def enqueue(self, number: int, request: Request, sink: Sink) -> None:
        """Take a request that was checked."""
        self.router.open(number, sink)
        try:
            self.engine.enqueue(request, number)
        except Exception as error:
            self._deliver([RequestEvent(number, finish=FinishReason.ERROR, error=error, time_s=time.perf_counter())])

    def cancel(self, number: int) -> None:
        """End a request, unless it has ended."""
        event = self.engine.cancel(number)
        if event is not None:
            self._deliver([event])

    def use_threads(self, count: int) -> None:
        """Let torch use as many threads here as in the thread that asks."""
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def close(self) -> None:
        """End after this message."""
        self.is_closing = True

    def _end(self) -> None:
        """End every request, those whose messages are still in the inbox too."""
        with suppress(Empty):
            while True:
                self._obey(self.inbox.get_nowait())
        for number in self.router.numbers:
            self.cancel(number)
        del self.engine


class EngineLoop:
    """A thread that runs an engine, started when it is first needed; all methods may be called from any thread.

    Dropping the loop ends the thread, as `close` does. `cancel` takes no lock, so finalizers and signal handlers may call it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._owner = _Owner(engine)
        self._lock = threading.Lock()  # of starting and closing
        self._is_closed = False
        weakref.finalize(self, self._owner.inbox.put, _Owner.close).atexit = False

    @property
    def engine(self) -> Engine:
        """Return the engine, whose limits and checks any thread may use; all else goes through `run`. Raises RequestError."""
        engine = self._engine
        if engine is None:
            raise RequestError(CLOSED)
        return engine

    @property
    def problem(self) -> str | None:
        """Return why no request can be served any more: it is closed, or its thread is gone; None while all is well."""
        if self._is_closed:
            return CLOSED
        owner = self._owner
        return "the engine's thread has ended" if owner.was_started and owner.serving is None else None

    def submit(self, request: Request, sink: Sink, *, is_checked: bool = False) -> int:
        """Queue a request and return its number; its events go to `sink`. Raises RequestError if it can never run."""
        return self.submit_many([(request, sink)], is_checked=is_checked)[0]

    def submit_many(self, requests: Sequence[tuple[Request, Sink]], *, is_checked: bool = False) -> list[int]:
        """Queue requests that start in the same step, and return their numbers. Raises RequestError if one can never run."""
        if not is_checked:
            for request, _ in requests:
                self.engine.check(request)
        numbered = [(self.engine.new_number(), request, sink) for request, sink in requests]
        threads = thread_count()

        def enqueue(owner: _Owner) -> None:
            owner.use_threads(threads)
            for each in numbered:
                owner.enqueue(*each)

        self._post(enqueue)
        return [number for number, _, _ in numbered]

    def complete(self, requests: Sequence[Request]) -> list[list[RequestEvent]]:
        """Run requests together and return the events of each. Raises the first one's error of those that failed."""
        found = dict(self.complete_each(requests, len(requests)))
        events = [found[index] for index in range(len(requests))]
        for last in (each[-1] for each in events):
            if last.error is not None:
                raise failure(last.error)
        return events

    def complete_each(self, requests: Iterable[Request], in_flight: int) -> Iterator[tuple[int, list[RequestEvent]]]:
        """Run requests, `in_flight` of them at a time, and yield the place and the events of each as it ends.

        What fails has its error in the last event. Whoever stops reading, or raises, cancels the others.
        """
        queue: SimpleQueue[RequestEvent] = SimpleQueue()
        waiting, places, found = enumerate(requests), dict[int, int](), dict[int, list[RequestEvent]]()
        try:
            while True:
                taken = list(islice(waiting, max(in_flight - len(found), 0)))
                numbers = self.submit_many([(request, queue.put) for _, request in taken]) if taken else ()
                for number, (place, _) in zip(numbers, taken, strict=True):
                    places[number], found[number] = place, []
                if not found:
                    return
                event = queue.get()
                found[event.request].append(event)
                if event.finish is not None:
                    yield places.pop(event.request), found.pop(event.request)
        finally:
            for number in found:
                self.cancel(number)

    def cancel(self, number: int) -> None:
        """End a request between two steps, unless it has ended by then; its sink gets the end."""
        self._owner.inbox.put(lambda owner: owner.cancel(number))

    def run(self, function: Callable[[Engine], Found]) -> Found:
        """Run a function on the engine's thread between two steps, after all messages before it, and return what it returns."""
        serving = self._owner.serving
        if serving is not None and serving.thread is threading.current_thread():
            return function(self.engine)
        outcome: Future[Found] = Future()
        threads = thread_count()

        def call(owner: _Owner) -> None:
            if owner.is_closing:
                outcome.set_exception(RequestError(CLOSED))
                return
            owner.use_threads(threads)
            try:
                outcome.set_result(function(owner.engine))
            except BaseException as error:
                outcome.set_exception(error)

        self._post(call)
        return outcome.result()

    def load_adapter(self, name: str, read: Callable[[], AdapterDeltas]) -> None:
        """Let requests made from now on ask for an adapter; those that run go on.

        `read` is called here and what it returns is bound here: the engine's thread only exchanges one set of adapters for
        another, between two steps. Raises RequestError if the name is taken, CapacityError if there is no memory, and what
        `read` raises; the adapters are as before then.
        """
        decoder = self.engine.decoder
        if not isinstance(name, str) or not name:
            raise RequestError(f"adapter name: expected a text that is not empty, found {name!r}")
        _check_is_new(name, decoder.adapters)
        try:
            with decoder.on_stream():
                deltas = read()
            while not self._exchange_adapters(decoder.with_adapter(name, deltas)):
                _check_is_new(name, decoder.adapters)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise CapacityError(f"adapter {name!r}: no memory is left for its factors; unload another one first") from error

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter: its memory is released and its prefixes are forgotten.

        Raises RequestError if it is not loaded, or while a request that runs or waits uses it.
        """
        decoder = self.engine.decoder
        while True:
            if name not in decoder.adapters:
                loaded = ", ".join(decoder.adapters) or "none"
                raise RequestError(f"adapter {name!r} is not loaded, so it can't be unloaded; loaded are: {loaded}")
            if self._exchange_adapters(decoder.without_adapter(name)):
                return

    def _exchange_adapters(self, body: AdaptedBody) -> bool:
        """Return whether a set of adapters took the place of the one that it was bound after; another thread may be faster."""
        return self.run(lambda engine: engine.exchange_adapters(body))

    def close(self) -> None:
        """End every request, then the thread; later calls raise RequestError. A second call does nothing."""
        with self._lock:
            self._is_closed = True
            serving = self._owner.serving
        self._owner.inbox.put(_Owner.close)
        if serving is not None:
            serving.wait()
        self._engine = None  # streams may outlive the model; its memory should not

    def _post(self, message: Message) -> None:
        """Put a message into the inbox, with a thread to read it. Raises RequestError once the loop is closed."""
        with self._lock:
            owner = self._owner
            if self._is_closed or owner.is_closing:
                raise RequestError(CLOSED)
            if owner.serving is None:
                _owners.add(owner)
                owner.start()
            owner.inbox.put(message)


def failure(error: Exception) -> GemcutterError:
    """Return an error to raise in the reader of a request that ended with `error`; several readers may share that one."""
    if isinstance(error, GemcutterError):
        return type(error)(error.summary, error.problems)
    found: GemcutterError = RequestError(f"the request failed in a step of the engine: {type(error).__name__}: {error}")
    if _is_out_of_memory(error):
        found = CapacityError("no memory is left for a step; lower the context or the batch, or choose a smaller model")
    found.__cause__ = error
    return found


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in ALLOCATORS)


def _check_is_new(name: str, loaded: Sequence[str]) -> None:
    if name in loaded:
        raise RequestError(f"adapter {name!r} is loaded already; unload it first, or take another name")


@atexit.register
def _close_all() -> None:
    """End all threads before the interpreter takes the ground from under them."""
    owners = list(_owners)
    for owner in owners:
        owner.inbox.put(_Owner.close)
    for serving in [owner.serving for owner in owners]:
        if serving is not None:
            serving.wait(EXIT_S)
