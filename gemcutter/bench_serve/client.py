"""The HTTP client: one streamed request over a connection of its own, and the small questions beside a run.

Owns bodies, headers and sockets (httpcore's, which the server's extra brings). Refuses to know workloads as a whole, and retries
nothing: a benchmark counts failures. Read `reply.py` for what is kept of an answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gemcutter.bench_serve.reply import LineReader, Reply, read_line
from gemcutter.bench_serve.workload import Turn
from gemcutter.errors import RequestError

if TYPE_CHECKING:
    import httpcore

Api = Literal["chat", "completions"]
PATHS: dict[Api, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
ANSWER_S = 10.0  # for the small questions
FLUSHES = ("/flush_cache", "/reset_prefix_cache")  # sglang's and vLLM's


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked. `url` has no path; `body` is added to every request."""

    url: str
    model: str
    api: Api = "chat"
    api_key: str | None = None
    ignore_eos: bool = True
    temperature: float | None = 0.0
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0


def normal_url(text: str) -> str:
    """Return a server's address without a path, from one with or without `/v1`. Raises RequestError for no address."""
    url = text.strip().rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")) or not url.split("://")[1]:
        raise RequestError(f"URL: expected the address of a server, such as http://127.0.0.1:8000, found {text!r}")
    return url


def request_body(target: Target, turn: Turn, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON of one turn behind `history`.

    Raises RequestError for ids to the chat API, and for images or a history of messages to the completions API.
    """
    body: dict[str, Any] = {"model": target.model, "stream": True, "stream_options": {"include_usage": True}}
    if target.temperature is not None:
        body["temperature"] = target.temperature
    if target.ignore_eos:
        body["ignore_eos"] = True
    if target.api == "chat":
        if isinstance(turn.prompt, tuple):
            raise RequestError("--tokenize-prompt: token ids go to --api completions; the chat API takes text")
        body["messages"] = [*history, {"role": "user", "content": _content(turn.prompt, turn.images)}]
        if turn.output_len is not None:
            body["max_completion_tokens"] = turn.output_len
            body["max_tokens"] = turn.output_len  # servers that know the older name alone
    else:
        if turn.images or history:
            raise RequestError("--api completions takes one prompt; images and conversations go to --api chat")
        body["prompt"] = list(turn.prompt) if isinstance(turn.prompt, tuple) else turn.prompt
        if turn.output_len is not None:
            body["max_tokens"] = turn.output_len
    return body | dict(target.body)


def _content(text: str, images: Sequence[str]) -> Any:
    if not images:
        return text
    return [*({"type": "image_url", "image_url": {"url": url}} for url in images), {"type": "text", "text": text}]


class Client:
    """Sends requests to one server; belongs to one event loop."""

    def __init__(self, target: Target) -> None:
        """Connect to nothing yet. Raises RequestError where httpcore is not installed."""
        try:
            import httpcore
        except ImportError:
            raise RequestError("bench-serve needs httpcore: pip install 'gemcutter[serve]'") from None
        self.target = target
        self._pool: httpcore.AsyncConnectionPool = httpcore.AsyncConnectionPool(
            max_connections=None,
            max_keepalive_connections=0,  # a server may close an idle one just when the next request is sent on it
        )
        self._errors = (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.aclose()

    async def send(self, turn: Turn, history: Sequence[Mapping[str, Any]], reply: Reply) -> None:
        """Send one turn and take its stream into `reply`; what goes wrong is noted there, not raised."""
        content = json.dumps(request_body(self.target, turn, history)).encode()
        reply.started_s = reply.ended_s = time.perf_counter()
        try:
            async with self._pool.stream(
                "POST",
                self.target.url + PATHS[self.target.api],
                headers=self._headers(content),
                content=content,
                extensions=self._limits(self.target.timeout_s),
            ) as answer:
                if answer.status == 200:
                    lines = LineReader()
                    async for data in answer.aiter_stream():
                        now_s = time.perf_counter()
                        for line in lines.push(data):
                            read_line(reply, line, now_s)
                else:
                    reply.fail(f"status {answer.status}: {(await answer.aread()).decode('utf-8', errors='replace')}")
        except self._errors as error:
            reply.fail(f"{type(error).__name__}: {error}")
        if not reply.error and not (reply.is_done or reply.finish_reason):
            reply.fail("the stream ended without a finish_reason and without [DONE]")

    async def models(self) -> list[str]:
        """Return the names that the server lists. Raises RequestError if it does not answer."""
        status, body = await self._ask("GET", "/v1/models")
        try:
            return [str(model["id"]) for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError):
            raise RequestError(
                f"{self.target.url}/v1/models answers {status} without a list of models; give the name with --model"
            ) from None

    async def get(self, path: str) -> str | None:
        """Return what the server has at a path; None for anything but 200."""
        status, body = await self._ask("GET", path)
        return body if status == 200 else None

    async def flush(self) -> None:
        """Empty the server's prefix cache. Raises RequestError for a server that has no such route."""
        for path in FLUSHES:
            if (await self._ask("POST", path))[0] == 200:
                return
        raise RequestError(f"--flush-cache: {self.target.url} has none of {', '.join(FLUSHES)}; leave the option out")

    async def _ask(self, method: str, path: str) -> tuple[int, str]:
        try:
            answer = await self._pool.request(
                method, self.target.url + path, headers=self._headers(), extensions=self._limits(ANSWER_S)
            )
        except self._errors as error:
            raise RequestError(f"{self.target.url} does not answer ({type(error).__name__}: {error}); is it serving?") from None
        return answer.status, answer.content.decode("utf-8", errors="replace")

    def _headers(self, content: bytes | None = None) -> list[tuple[str, str]]:
        found = [("Accept", "*/*")]
        if content is not None:
            found += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        return [*found, ("Authorization", f"Bearer {self.target.api_key}")] if self.target.api_key else found

    def _limits(self, seconds: float) -> dict[str, Any]:
        return {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), seconds)}
