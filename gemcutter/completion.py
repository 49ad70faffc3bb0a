"""What a request brings, piece by piece and whole.

Owns `Stream` (an iterator over one request's chunks), `Completion` and `RequestMetrics`; refuses to know how prompts become ids.
Read `api.py` for who makes streams, `engine/loop.py` for where events come from, `text/reply.py` for how ids become text.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal

from gemcutter.engine.loop import EngineLoop, failure
from gemcutter.engine.request import FinishReason, PromptReport, Request, RequestEvent
from gemcutter.engine.sampling import TokenLogprobs
from gemcutter.engine.speculate.tally import NO_DRAFTS
from gemcutter.text.reply import ReplyParser, ReplyPiece
from gemcutter.text.tool_calls import ToolCall

log = logging.getLogger(__name__)

Reason = Literal["stop", "length", "cancelled", "timeout", "repetition"]


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Wall-clock seconds and tokens of one request.

    `prefill_tokens` counts computed prompt rows, `cached_tokens` those found in the prefix cache. `ttft_s` runs from submission
    to the first token, `queue_s` of it to the first prompt row; `decode_tokens` and `decode_s` are those after it.
    `drafted_tokens` were guessed and verified, `accepted_tokens` of them right.
    """

    prefill_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    queue_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_s(self) -> float:
        """Return the time from the first prompt row to the first token."""
        return max(self.ttft_s - self.queue_s, 0.0)

    @property
    def tpot_s(self) -> float:
        """Return the time per output token after the first; 0 without any."""
        return self.decode_s / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def e2e_s(self) -> float:
        """Return the time from submission to the last token."""
        return self.ttft_s + self.decode_s


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request brought: `tokens` without the stop token, `text` without stop strings, markers, reasoning and tool calls.

    `tool_calls` holds the calls that are complete, `reasoning_tokens` counts the tokens of the reasoning, `stopped` is the stop
    string that ended the text, `unreadable_calls` counts blocks that were no calls and became text. The reason of the end is
    "timeout" where a deadline passed, and "repetition" where a watchdog saw the reply go round in circles. `logprobs` has an
    entry for each of `tokens`, if that was asked for, and `end_logprobs` is that of the stop token; `model.tokenizer.piece(id)`
    spells their ids.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: Reason
    prompt_tokens: tuple[int, ...]
    reasoning: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: PromptReport = field(default_factory=PromptReport)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_tokens: int = 0
    stopped: str | None = None
    unreadable_calls: int = 0
    end_logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of new text; the last chunk of a request carries its completion.

    Of a tool call, `text` is the next fragment of the arguments' JSON, `index` counts the calls of the reply, and `name` is set
    in the first chunk of a call only.
    """

    text: str
    kind: Literal["content", "reasoning", "tool_call"] = "content"
    completion: Completion | None = None
    index: int = 0
    name: str | None = None


class Stream:
    """The chunks of one request, the last one with its completion; it may be read from any thread.

    A context manager, which closes it. The engine works on whether the stream is read or not. Closing a stream, or dropping it,
    cancels its request; what was computed stays in the cache for reuse. An interrupt while a stream is read closes it. Reading
    raises the error of a request that ended with one.
    """

    def __init__(self, request: Request, text: ReplyParser) -> None:
        """Wait for events of a request that is to be submitted; `attach` says as what."""
        self._request, self._text = request, text
        self._events: SimpleQueue[RequestEvent] = SimpleQueue()
        self.sink = self._events.put
        self._ready: deque[Chunk] = deque()
        self._tokens, self._logprobs, self._report = list[int](), list[TokenLogprobs](), PromptReport()
        self._tally = NO_DRAFTS
        self._end_logprobs: TokenLogprobs | None = None
        self._submitted_s, self._first_s, self._last_s = time.perf_counter(), 0.0, 0.0
        self._completion: Completion | None = None
        self._error: Exception | None = None
        self.on_end: Callable[[Completion], None] | None = None  # is told what the reply became, unless it is closed before
        self._is_closed = False
        self._lock = threading.Lock()  # of readers; the engine's thread takes none

    def attach(self, loop: EngineLoop, number: int) -> None:
        """Set the number of the request that the stream reads. A stream that is dropped before the end posts a cancellation."""
        self._number = number
        self._cancel = weakref.finalize(self, loop.cancel, number)
        self._cancel.atexit = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._lock:
            if self._is_closed:
                raise StopIteration
            try:
                while not self._ready:
                    if self._error is not None:
                        raise failure(self._error)
                    if self._completion is not None:
                        raise StopIteration
                    self._take(self._events.get())
                return self._ready.popleft()
            except Exception:
                raise
            except BaseException:  # an interrupt may have come in the middle of an event
                self.close()
                raise

    def read_event(self, event: RequestEvent) -> list[Chunk]:
        """Return the chunks that an event brings, to a caller who gave the request a sink of his own.

        Raises the error of a request that ended with one.
        """
        with self._lock:
            self._take(event)
            if self._error is not None:
                raise failure(self._error)
            ready, self._ready = list(self._ready), deque()
            return ready

    def close(self) -> None:
        """Stop early; later reads end at once."""
        self._is_closed = True
        self._cancel()

    def finish(self) -> Completion:
        """Read to the end and return the completion: of a stream that was closed, as far as it was read."""
        for _ in self:
            pass
        if self._completion is None:
            self._completion = self._complete("cancelled")
        return self._completion

    def _take(self, event: RequestEvent) -> None:
        """Turn an event into chunks."""
        if event.error is not None:
            self._error = event.error
            self._cancel.detach()
            return
        self._first_s, self._last_s = self._first_s or event.time_s, event.time_s
        self._report = event.prompt or self._report
        self._tally = event.tally or self._tally
        finish = event.finish
        if event.token is None and event.finish is FinishReason.STOP:
            self._end_logprobs = event.logprobs
        if event.token is not None:
            self._tokens.append(event.token)
            self._logprobs += [event.logprobs] if event.logprobs is not None else []
            self._ready += map(_as_chunk, self._text.push(event.token))
        if finish is not None:
            self._cancel.detach()
        elif self._text.is_finished:
            self._cancel()
        if self._text.is_finished:
            finish = FinishReason.STOP
        if finish is not None:
            self._end(finish)

    def _end(self, finish: FinishReason) -> None:
        self._ready += map(_as_chunk, self._text.finish(finish is FinishReason.STOP))
        self._completion = found = self._complete(_REASONS[finish])
        log.debug(
            "request %d: %d prompt tokens, %d of them cached; %d tokens in %.3f s; end: %s",
            self._number,
            len(found.prompt_tokens),
            found.metrics.cached_tokens,
            len(found.tokens),
            found.metrics.e2e_s,
            found.finish_reason,
        )
        self._ready.append(Chunk("", completion=self._completion))
        if self.on_end is not None:
            self.on_end(found)

    def _complete(self, finish: Reason) -> Completion:
        report, text = self._report, self._text
        metrics = RequestMetrics(
            prefill_tokens=len(self._request.prompt) - report.cached_tokens,
            cached_tokens=report.cached_tokens,
            ttft_s=max(self._first_s - self._submitted_s, 0.0),
            decode_tokens=max(len(self._tokens) - 1, 0),
            decode_s=self._last_s - self._first_s,
            queue_s=max(report.started_s - self._submitted_s, 0.0) if report.started_s else 0.0,
            drafted_tokens=self._tally.drafted,
            accepted_tokens=self._tally.accepted,
        )
        return Completion(
            text.text,
            tuple(self._tokens),
            finish,
            self._request.prompt,
            text.reasoning,
            tuple(self._logprobs),
            report,
            metrics,
            text.tool_calls,
            text.num_reasoning_tokens,
            text.stopped,
            text.num_unreadable,
            self._end_logprobs,
        )


def _as_chunk(piece: ReplyPiece) -> Chunk:
    return Chunk(piece.text, piece.kind, None, piece.index, piece.name)


_REASONS: dict[FinishReason, Reason] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.TIMEOUT: "timeout",
    FinishReason.REPETITION: "repetition",
}
