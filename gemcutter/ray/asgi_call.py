"""A call answered by an ASGI application in this process: the head first, then bytes as they are sent.

Owns the two queues of such a call and its end: whoever stops reading is, to the application, a client that has left. Refuses to
know routes. Read `replica.py` for whose application it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from starlette.types import ASGIApp, Message, Scope

from gemcutter.ray.calls import Call, Head

PATIENCE_S = 5.0  # that an application has to end once its client has left
Part = Head | bytes


async def answer(app: ASGIApp, call: Call) -> AsyncGenerator[Part]:
    """Yield a call's head and its bytes, those that have come meanwhile at once. Raises what the application raises."""
    sent, gone, queue = False, asyncio.Event(), asyncio.Queue[Message | None]()

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        queue.put_nowait(message)

    async def run() -> None:
        try:
            await app(_scope(call), receive, send)
        finally:
            queue.put_nowait(None)

    task, is_begun = asyncio.create_task(run()), False
    try:
        while (message := await queue.get()) is not None:
            if message["type"] == "http.response.start":
                is_begun = True
                yield Head(message["status"], tuple((bytes(name), bytes(value)) for name, value in message["headers"]))
            else:
                body, is_last = _joined(message, queue)
                if body:
                    yield body
                if is_last:
                    break
        if not is_begun:
            await task
    finally:
        gone.set()
        await _end(task)


def _joined(message: Message, queue: asyncio.Queue[Message | None]) -> tuple[bytes, bool]:
    """Return the bytes of a message and of those behind it, and whether the application has ended."""
    found = [message.get("body", b"")]
    while not queue.empty():
        following = queue.get_nowait()
        if following is None:
            return b"".join(found), True
        found.append(following.get("body", b""))
    return b"".join(found), False


async def _end(task: asyncio.Task[None]) -> None:
    """Wait until an application has ended by itself, and end it where it takes long; its error has been answered."""
    await asyncio.wait({task}, timeout=PATIENCE_S)
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


def _scope(call: Call) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
        "state": {},
    }
