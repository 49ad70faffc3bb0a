"""Server-sent events: frames, comments while nothing happens, and errors once the headers are gone.

Owns the bytes on the wire and the clock behind them. Refuses to know what the events say. Read `errors.py` for the shapes of
errors, `routes/` for the events.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
COMMENT = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def frame(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """Return one event; JSON has no line breaks of its own."""
    name = "" if event is None else f"event: {event}\n"
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"{name}data: {text}\n\n".encode(errors="replace")


async def with_pings(frames: AsyncIterator[bytes], every_s: float, ping: bytes = COMMENT) -> AsyncIterator[bytes]:
    """Yield frames, and a ping whenever none came for `every_s` seconds: clients drop connections that are silent."""
    source = aiter(frames)
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait({pending}, timeout=every_s)
            if not done:
                yield ping
                continue
            finished, pending = pending, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await pending


class ClosingStream(StreamingResponse):
    """An answer that sends bytes as they come; `close` is called when it ends, even if it never began."""

    def __init__(self, parts: AsyncIterator[bytes], close: Callable[[], None], **more: Any) -> None:
        super().__init__(parts, **more)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all parts, until the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def event_stream(frames: AsyncIterator[bytes], close: Callable[[], None], every_s: float, ping: bytes = COMMENT) -> ClosingStream:
    """Return an answer that sends frames as they come, and a ping where none has come for a while."""
    return ClosingStream(with_pings(frames, every_s, ping), close, media_type="text/event-stream", headers=HEADERS)
