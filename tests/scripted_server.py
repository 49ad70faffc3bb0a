"""A server whose streams are written down: which events, and after which pauses; plain asyncio, in a thread of its own.

Owns the bytes on the wire and a record of what came when, on the clock of this process. Refuses to know models. What a client
measures can so be compared with what was sent. Read `unit/test_bench_serve.py` for who uses it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DONE = "[DONE]"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Sent:
    """One event of a stream: a pause, then a payload (an object, a line as it is, or None: the connection is cut off)."""

    pause_s: float
    payload: Mapping[str, Any] | str | None


@dataclass
class Asked:
    """A request that came: its body, when, and when each event of the answer was written."""

    path: str
    body: dict[str, Any]
    came_s: float
    sent_s: list[float] = field(default_factory=list)
    key: str = ""


Script = Callable[[dict[str, Any]], "Sequence[Sent] | tuple[int, str]"]


@dataclass
class ScriptedServer:
    """What a test sees: `script` maps a body to the events of its stream, or to a status and a text."""

    script: Script
    url: str = ""
    pages: dict[str, str] = field(default_factory=lambda: {"/v1/models": '{"data": [{"id": "scripted"}]}'})
    asked: list[Asked] = field(default_factory=list)
    posts: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while (line := await reader.readline()).strip():
                method, path, _ = line.decode().split()
                headers = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._answer(method, path, content, headers, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return  # the client has gone, or the test is over
        finally:
            writer.close()

    async def _answer(
        self, method: str, path: str, content: bytes, headers: Mapping[str, str], writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; return whether the connection lives on."""
        if not content:
            self.posts += [path] if method == "POST" else []
            page = self.pages.get(path)
            whole(writer, 404 if page is None else 200, page or "")
            return True
        asked = Asked(path, json.loads(content), time.perf_counter(), key=headers.get("authorization", ""))
        self.asked.append(asked)
        found = self.script(asked.body)
        if isinstance(found, tuple):
            whole(writer, *found)
            return True
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._stream(found, asked, writer)
        finally:
            self.at_once -= 1

    async def _stream(self, events: Sequence[Sent], asked: Asked, writer: asyncio.StreamWriter) -> bool:
        writer.write(HEAD)
        for event in events:
            await asyncio.sleep(event.pause_s)
            if event.payload is None:
                return False
            text = event.payload if isinstance(event.payload, str) else json.dumps(event.payload)
            line = (text if text.startswith(":") else f"data: {text}").encode() + b"\n\n"
            asked.sent_s.append(time.perf_counter())
            writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def whole(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    """Write an answer that is no stream."""
    body = text.encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def chat(text: str = "", *, reasoning: str | None = None, finish: str | None = None) -> dict[str, Any]:
    """Return a chunk of a chat; without text it is the one of the role, or of the end."""
    delta: dict[str, Any] = {"content": text} if text else {} if finish else {"role": "assistant", "content": ""}
    if reasoning is not None:
        delta = {"reasoning_content": reasoning}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def usage(prompt: int, reply: int, **details: Any) -> dict[str, Any]:
    """Return the chunk of usage."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": reply, **details}}


def steady(tokens: int, gap_s: float, first_s: float = 0.0, prompt: int = 10) -> list[Sent]:
    """Return a chat of so many chunks at equal gaps, with a role before and usage behind."""
    texts = [Sent(first_s if not place else gap_s, chat(f"w{place} ")) for place in range(tokens)]
    return [Sent(0, chat()), *texts, Sent(0, chat(finish="length")), Sent(0, usage(prompt, tokens)), Sent(0, DONE)]


@contextmanager
def scripted(script: Script) -> Iterator[ScriptedServer]:
    """Serve on a free port of loopback until the block ends."""
    server, started = ScriptedServer(script), threading.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        async with await asyncio.start_server(server.handle, "127.0.0.1", 0) as listening:
            server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            stop.append(lambda: loop.call_soon_threadsafe(over.set))
            started.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        stop[0]()
        thread.join(10)
        assert not thread.is_alive()
