"""From the engine's thread to the server's event loop: events of requests, read as chunks of text.

Owns `Mailbox`, which brings all events of a step over in one hand-over, and `Reply`, one request as an asynchronous iterator:
parsing happens on the reader's side, what came while it was busy is read at once, and closing it cancels the request. Refuses to
know HTTP. Read `engine/loop.py` for the other side, `service.py` for who opens replies.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from gemcutter.api import Model, PreparedRequest
from gemcutter.completion import Chunk, Completion, Stream
from gemcutter.engine.request import RequestEvent
from gemcutter.engine.sampling import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader gets at once: chunks in order, the number of tokens that came, and their log-probabilities if wanted."""

    chunks: tuple[Chunk, ...]
    tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


class Mailbox:
    """Takes events on the engine's thread and hands them to the event loop, as many as have come at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._letters: deque[tuple[Reply, RequestEvent]] = deque()
        self._lock = threading.Lock()  # of whether a hand-over is under way
        self._is_called = False

    def put(self, reply: Reply, event: RequestEvent) -> None:
        """Take an event; called on the engine's thread, which must not wait."""
        self._letters.append((reply, event))
        with self._lock:
            if self._is_called:
                return
            self._is_called = True
        self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        with self._lock:
            self._is_called = False
        while self._letters:
            reply, event = self._letters.popleft()
            reply.arrive(event)


class Reply:
    """One request that runs; iterate over its readings, once. Closing it cancels the request."""

    def __init__(self, prepared: PreparedRequest, on_token: Callable[[Reply, RequestEvent], None]) -> None:
        self.prepared = prepared
        self.submitted_s = time.perf_counter()
        self._unread_since_s = self.submitted_s  # while events wait
        self._events: deque[RequestEvent] = deque()
        self._arrived = asyncio.Event()
        self._on_token = on_token
        self._stream: Stream | None = None
        self._failure: Exception | None = None
        self._is_closed = False
        self.completion: Completion | None = None
        self.on_end: Callable[[Completion], None] | None = None  # the stream's, kept off the event loop

    @classmethod
    def open_all(
        cls,
        model: Model,
        mailbox: Mailbox,
        prepared: Sequence[PreparedRequest],
        on_token: Callable[[Reply, RequestEvent], None],
    ) -> list[Reply]:
        """Submit requests that start in the same step. Raises RequestError."""
        replies = [cls(each, on_token) for each in prepared]
        sinks = [lambda event, reply=reply: mailbox.put(reply, event) for reply in replies]
        for reply, stream in zip(replies, model.submit_many(prepared, sinks), strict=True):
            reply._stream = stream
            reply.on_end, stream.on_end = stream.on_end, None
        return replies

    def arrive(self, event: RequestEvent) -> None:
        """Take an event, on the event loop."""
        if not self._events:
            self._unread_since_s = time.perf_counter()
        self._events.append(event)
        self._on_token(self, event)
        self._arrived.set()

    def reader_lag_s(self, now_s: float) -> float:
        """Return for how long events have waited for the reader."""
        return now_s - self._unread_since_s if self._events else 0.0

    def fail(self, error: Exception) -> None:
        """End the request, and raise an error in its reader."""
        if self.completion is None and not self._is_closed:
            self._failure = self._failure or error
            self.close()
            self._arrived.set()

    def close(self) -> None:
        """End the request, unless it has ended."""
        self._is_closed = True
        if self._stream is not None:
            self._stream.close()

    def __aiter__(self) -> AsyncIterator[Reading]:
        return self._readings()

    async def _readings(self) -> AsyncIterator[Reading]:
        """Yield all that has come since the last reading; the last one holds the chunk with the completion."""
        try:
            while self.completion is None:
                await self._arrived.wait()
                self._arrived.clear()
                if self._failure is not None:
                    raise self._failure
                reading = self._read()
                if reading.chunks or reading.tokens:
                    yield reading
        finally:
            self.close()

    def _read(self) -> Reading:
        stream, chunks, logprobs, tokens = self._stream, list[Chunk](), list[TokenLogprobs](), 0
        assert stream is not None
        while self._events and self.completion is None:
            event = self._events.popleft()
            found = stream.read_event(event)
            chunks += found
            tokens += event.token is not None
            if event.logprobs is not None:
                logprobs.append(event.logprobs)
            self.completion = next((chunk.completion for chunk in found if chunk.completion is not None), None)
        return Reading(tuple(_joined(chunks)), tokens, tuple(logprobs))

    async def finish(self) -> Completion:
        """Read to the end. Raises the request's error."""
        async for _ in self:
            pass
        assert self.completion is not None
        return self.completion


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Join neighbours of one kind: a reader that lags gets fewer, longer ones."""
    found = list[Chunk]()
    for chunk in chunks:
        before = found[-1] if found else None
        if (
            before is not None
            and before.completion is None
            and chunk.completion is None
            and chunk.name is None
            and (before.kind, before.index) == (chunk.kind, chunk.index)
        ):
            found[-1] = Chunk(before.text + chunk.text, before.kind, None, before.index, before.name)
        else:
            found.append(chunk)
    return found
