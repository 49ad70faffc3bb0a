"""A server for tests of the chat page: the page's own route, and replies that are written here rather than generated.

Owns what each prompt is answered with, chunk by chunk as the API streams it, and a record of the requests. Refuses to know the
engine: what the page makes of an answer must not depend on a model. Read `test_chat_page.py` next.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from gemcutter.server.routes import chat_page

MARKDOWN = """# A *small* tour

Some **bold**, *italic*, ~~gone~~ and `inline <code>` text, see [the docs](https://example.org/a_(b)?q=1 "t").

1. First
   - nested one
   - nested two
2. Second, with code:

   ```sh
   echo hi # say so
   ```

- [x] done
- [ ] open

| name | share |
|:-----|------:|
| a \\| b | 12 % |
| c | **3** % |

> Quoted, and
> going on.

```python
def gcd(a: int, b: int) -> int:
    # Euclid
    while b:
        a, b = b, a % b
    return a  # "done"
```

---
snake_case_name and 2 * 3 * 4 and \\*stars\\* and https://example.org/x.
"""

HOSTILE = """<img src=x onerror="window.pwned = 1"> <script>window.pwned = 1</script>

[click](javascript:window.pwned=1) [data](data:text/html,<script>window.pwned=1</script>) ![spy](https://evil.example/spy.png)

<https://evil.example/"onmouseover="window.pwned=1> **<b onclick="window.pwned=1">bold</b>**

| <img src=x onerror=window.pwned=1> | b |
|---|---|
| <svg onload=window.pwned=1> | `<iframe src="https://evil.example">` |

```"><img src=x onerror=window.pwned=1>
</code></pre><img src=x onerror="window.pwned=1">
```
"""

SHOWPIECE = """A **snapshot** keeps one window of the cache, so a follow-up recomputes little.

| layers | kept per token | after a hit |
|:-------|---------------:|:------------|
| global | all pages      | nothing     |
| sliding| one window     | at most one window |

```python
def reuse(prompt: list[int], cache: dict[tuple[int, ...], int]) -> int:
    # the longest beginning that was computed before
    for end in range(len(prompt), 0, -1):
        if tuple(prompt[:end]) in cache:
            return end
    return 0
```

1. Look up the **longest** prefix.
2. Restore the snapshot, then compute `prompt[end:]`.
"""

PICTURED = "How does prefix reuse work?"  # streamed at a speed that can be read off the picture
USAGE = {"prompt_tokens": 40, "completion_tokens": 25, "total_tokens": 65, "prompt_tokens_details": {"cached_tokens": 32}}


def in_pieces(kind: str, text: str, size: int = 7) -> list[dict[str, Any]]:
    """Cut a text into deltas of one kind."""
    return [{kind: text[at : at + size]} for at in range(0, len(text), size)]


CALL = [
    {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "<b>Os'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": 'lo</b>"}'}}]},
]
REPLIES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "markdown": (in_pieces("content", MARKDOWN), "stop"),
    "hostile": (in_pieces("content", HOSTILE), "stop"),
    "think": (
        in_pieces("reasoning_content", "First I weigh **both** sides.") + in_pieces("content", "The answer is 42."),
        "stop",
    ),
    "think elsewhere": (in_pieces("reasoning", "Weighing.") + in_pieces("content", "It is 7."), "stop"),
    "call": ([*in_pieces("content", "Let me look."), *CALL], "tool_calls"),
    "long": (in_pieces("content", "\n\n".join(f"Paragraph {number}." for number in range(80))), "length"),
    PICTURED: (
        in_pieces("reasoning_content", "Windows forget, global layers do not.") + in_pieces("content", SHOWPIECE),
        "stop",
    ),
}


@dataclass
class CannedServer:
    """What a test sees of the server: where it is, what it was asked, which streams were abandoned."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    abandoned: int = 0
    wanted_key: str | None = None
    models: tuple[str, ...] = ("gem-small",)
    modalities: tuple[str, ...] | None = None  # that models read, where the server says so


def chunk_line(delta: dict[str, Any] | None, finish: str | None = None, usage: dict[str, Any] | None = None) -> str:
    """Write one event of a stream; without a delta it is the chunk that carries the usage alone."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "gem-small", "choices": choices, "usage": usage}
    return f"data: {json.dumps(chunk)}\n\n"


async def stream(server: CannedServer, prompt: str) -> AsyncIterator[str]:
    """Yield the events that answer a prompt."""
    yield chunk_line({"role": "assistant", "content": ""})
    yield ": ping\n\n"
    if prompt == "slow":
        try:
            for number in range(10_000):
                yield chunk_line({"content": f"word{number} "})
                await asyncio.sleep(0.02)
        finally:
            server.abandoned += 1
    deltas, finish = REPLIES.get(prompt, (in_pieces("content", f"You said: {prompt}"), "stop"))
    for delta in deltas:
        yield chunk_line(delta)
        await asyncio.sleep(0.003 if deltas is REPLIES[PICTURED][0] else 0)
    if prompt == "breaks":
        yield 'data: {"error": {"message": "The engine <b>failed</b>.", "type": "server_error"}}\n\ndata: [DONE]\n\n'
        return
    if prompt == "cut off":
        return
    yield chunk_line({}, finish)
    yield chunk_line(None, usage=USAGE)
    yield "data: [DONE]\n\n"


def spoken(content: Any) -> str:
    """Return what a message says, without what it shows."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def canned_app(server: CannedServer) -> FastAPI:
    """Build the application; `server` is what the test changes and reads."""
    app = FastAPI()
    app.include_router(chat_page.router)

    def refusal(request: Request) -> Response | None:
        key = request.headers.get("authorization")
        server.keys.append(key)
        if server.wanted_key and key != f"Bearer {server.wanted_key}":
            return JSONResponse({"error": {"message": "Incorrect API key.", "code": "invalid_api_key"}}, 401)
        return None

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        told = {} if server.modalities is None else {"input_modalities": list(server.modalities)}
        listed = [{"id": name, "object": "model", "max_model_len": 8192, **told} for name in server.models]
        return refusal(request) or JSONResponse({"object": "list", "data": listed})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        server.bodies.append(body)
        prompt = next(spoken(message["content"]) for message in reversed(body["messages"]) if message["role"] in ("user", "tool"))
        if prompt == "too much":
            error = {"message": "The prompt has 9000 tokens; the context holds 8192.", "param": "messages"}
            return JSONResponse({"error": error}, 400)
        if prompt == "busy":
            return JSONResponse({"error": {"message": "Too many requests."}}, 429, {"Retry-After": "3"})
        return refusal(request) or StreamingResponse(stream(server, prompt), media_type="text/event-stream")

    return app


@contextmanager
def serving(server: CannedServer) -> Iterator[CannedServer]:
    """Serve on a free port of loopback until the block ends."""
    config = uvicorn.Config(canned_app(server), host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    server.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join()
