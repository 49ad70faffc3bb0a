"""What a request brings, piece by piece and whole.

Owns `Stream` (an iterator over one request's chunks), `Completion` and `Timings`; refuses to know how prompts become ids. Read
`api.py` for who makes streams, `text/stream.py` for how ids become text.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Event, Finish, PromptReport, Request
from gemcutter.engine.sampling import TokenLogprobs
from gemcutter.text.stream import TextStream


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds of one request. `prefill_tokens` counts computed prompt rows, `cached_tokens` those found in the cache.

    `prefill_s` runs from submission to the first token, waiting for other requests included; `decode_tokens` are those after it.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request brought: `tokens` without the stop token, `text` without stop strings, markers and reasoning."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: tuple[int, ...]
    reasoning: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: PromptReport = field(default_factory=PromptReport)
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of new text; the last chunk of a request carries its completion."""

    text: str
    kind: Literal["content", "reasoning"] = "content"
    completion: Completion | None = None


class Mail:
    """The events of every request under way, kept until its stream is read; whichever stream is read steps the engine for all."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._boxes: dict[int, deque[tuple[float, Event]]] = {}

    def open(self, request: Request) -> int:
        """Queue a request and give its number. Raises RequestError."""
        number = self.engine.submit(request)
        self._boxes[number] = deque()
        return number

    def take(self, number: int) -> tuple[float, Event]:
        """Give a request's next event and when it came, stepping the engine until there is one."""
        box = self._boxes[number]
        while not box:
            events = self.engine.step()
            now = time.perf_counter()
            for event in events:
                if event.request in self._boxes:  # else someone else's, submitted to the engine itself
                    self._boxes[event.request].append((now, event))
        return box.popleft()

    def close(self, number: int) -> None:
        """Forget a request; it is cancelled if it still runs."""
        self.engine.cancel(number)
        self._boxes.pop(number, None)


class Stream:
    """The chunks of one request, the last one with its completion.

    Closing a stream, or dropping it, cancels its request; what was computed stays in the cache for reuse.
    """

    def __init__(self, mail: Mail, request: Request, text: TextStream) -> None:
        self._mail = mail
        self._number = mail.open(request)
        # The generator holds no reference to the stream, so that dropping the stream ends the request at once.
        self._chunks = _read(mail, self._number, request, text, time.perf_counter())

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Stop early; later reads end at once."""
        self._chunks.close()
        self._mail.close(self._number)

    def __del__(self) -> None:
        if hasattr(self, "_chunks"):
            self.close()

    def finish(self) -> Completion:
        """Read to the end and give the completion."""
        completion = None
        for chunk in self:
            completion = chunk.completion
        assert completion is not None
        return completion


def _read(mail: Mail, number: int, request: Request, text: TextStream, submitted: float) -> Generator[Chunk, None, None]:
    """Turn a request's events into chunks."""
    tokens, logprobs, report = list[int](), list[TokenLogprobs](), PromptReport()
    finish, first, now = None, 0.0, 0.0
    while finish is None:
        now, event = mail.take(number)
        first, report, finish = first or now, event.prompt or report, event.finish
        if event.token is not None:
            tokens.append(event.token)
            logprobs += [event.logprobs] if event.logprobs is not None else []
            yield from (Chunk(piece.text, piece.kind) for piece in text.push(event.token))
            finish = Finish.STOP if text.stopped is not None else finish
    yield from (Chunk(piece.text, piece.kind) for piece in text.finish())
    mail.close(number)
    computed = len(request.prompt) - report.cached_tokens
    timings = Timings(computed, first - submitted, max(len(tokens) - 1, 0), now - first, report.cached_tokens)
    completion = Completion(
        text.text, tuple(tokens), finish.value, request.prompt, text.reasoning, tuple(logprobs), report, timings
    )
    yield Chunk("", completion=completion)
