"""Hard users on a server: many streams at once, clients that leave, read slowly or send nonsense, for so many minutes.

Every greedy reply must be what the model says when it is asked alone (reference kernels, whose results depend on no neighbour),
every request must end once, and afterwards nothing may be left: no request, no page, no thread, no file, no memory that grows.
`make load MINUTES=10` calls it; continuous integration does so for a shorter time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import httpx
import uvicorn
from held import held

import gemcutter
from gemcutter.api import Model
from gemcutter.server.app import create_app
from gemcutter.server.options import ServerOptions

CLIENTS = 64
QUESTIONS = [
    f"{word} {number}?" for number in range(6) for word in ("What is a lantern", "Count to", "Tell me about the sea", "Who")
]
LENGTHS = (1, 7, 24, 60)
ROOM_BYTES = 48 << 20  # that resident memory may grow from the first third to the end
NONSENSE = (
    b"{",
    b"[]",
    b'{"model": "demo"}',
    b'{"model": "demo", "messages": [{"role": "king", "content": 3}]}',
    b'{"model": "other", "messages": [{"role": "user", "content": "Hi"}]}',
    b'{"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "n": 1000}',
)


class Users:
    """The clients, what they should read, and what went wrong."""

    def __init__(self, url: str, wanted: dict[str, str], until_s: float, seed: int) -> None:
        self.url, self.wanted, self.until_s = url, wanted, until_s
        self.random = random.Random(seed)
        self.wrong, self.done = list[str](), Counter[str]()

    async def run(self) -> None:
        """Let all clients ask until the time is over."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._client(client, random.Random(self.random.random())) for _ in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        while time.monotonic() < self.until_s:
            kind = draw.choices(("stream", "whole", "leave", "slow", "nonsense"), (6, 3, 3, 1, 2))[0]
            try:
                await getattr(self, f"_{kind}")(client, draw)
            except Exception as error:
                self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
            self.done[kind] += 1

    def _body(self, draw: random.Random, stream: bool) -> tuple[dict[str, object], str]:
        question, length = draw.choice(QUESTIONS), draw.choice(LENGTHS)
        messages = [{"role": "user", "content": question}]
        body = {"model": "demo", "messages": messages, "max_tokens": length, "temperature": 0, "stream": stream}
        return body, self.wanted[f"{question}/{length}"]

    async def _whole(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body, wanted = self._body(draw, stream=False)
        answer = await client.post("/v1/chat/completions", json=body)
        self._judge("whole", answer.json()["choices"][0]["message"]["content"], wanted)

    async def _stream(self, client: httpx.AsyncClient, draw: random.Random, pause_s: float = 0.0) -> None:
        body, wanted = self._body(draw, stream=True)
        parts, ends = list[str](), 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                await asyncio.sleep(pause_s)
                if line.startswith("data: {"):
                    choice = json.loads(line.removeprefix("data: "))["choices"][0]
                    parts.append(choice["delta"].get("content", ""))
                    ends += choice["finish_reason"] is not None
        self._judge("stream", "".join(parts), wanted)
        if ends != 1:
            self.wrong.append(f"a stream ended {ends} times")

    async def _slow(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        await self._stream(client, draw, pause_s=0.05)

    async def _leave(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body, _ = self._body(draw, stream=draw.random() < 0.7)
        with suppress(asyncio.TimeoutError, httpx.TimeoutException):
            async with asyncio.timeout(draw.random() * 0.2):
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        pass

    async def _nonsense(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        answer = await client.post(
            "/v1/chat/completions", content=draw.choice(NONSENSE), headers={"content-type": "application/json"}
        )
        if not 400 <= answer.status_code < 500 or "error" not in answer.json():
            self.wrong.append(f"nonsense: {answer.status_code} {answer.text[:100]}")

    def _judge(self, kind: str, found: str, wanted: str) -> None:
        if found != wanted:
            self.wrong.append(f"{kind}: {found!r} instead of {wanted!r}")


def solo(model: Model) -> dict[str, str]:
    """Return what the model says to every question when it is asked alone."""
    found = {}
    for question in QUESTIONS:
        for length in LENGTHS:
            messages = [{"role": "user", "content": question}]
            found[f"{question}/{length}"] = model.chat(messages, max_tokens=length, temperature=0).text
    return found


def main() -> int:
    """Run the test and say what was found; the exit code is 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with gemcutter.load("demo", context=1024, max_num_seqs=8, kernels="reference") as model:
        wanted = solo(model)
        app = create_app(model, ServerOptions(names=("demo",)))
        taken = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, args=([taken],))
        thread.start()
        while not server.started:
            time.sleep(0.02)
        url, rounds, seen, done = f"http://127.0.0.1:{taken.getsockname()[1]}", 3, list[dict[str, int]](), Counter[str]()
        wrong, before = list[str](), held(model)
        for number in range(rounds):
            users = Users(url, wanted, time.monotonic() + asked.minutes * 60 / rounds, asked.seed * rounds + number)
            asyncio.run(users.run())
            wrong += users.wrong
            done += users.done
            for _ in range(500):
                is_idle = not app.state.service.admission.requests and not model.engine.has_work
                if is_idle and held(model)["files"] <= before["files"]:
                    break
                time.sleep(0.02)
            else:
                wrong.append("requests or connections are left that nobody waits for")
            seen.append(held(model))
            print(f"round {number + 1}: {seen[-1]}", flush=True)
        server.should_exit = True
        thread.join()
    first, last = seen[0], seen[-1]
    wrong += [f"{name} grew: {first[name]} to {last[name]}" for name in ("pages", "threads", "files") if last[name] > first[name]]
    wrong += [f"{last['pages']} pages are held by nobody"] if last["pages"] else []
    if last["bytes"] - first["bytes"] > ROOM_BYTES:
        wrong.append(f"resident memory grew from {first['bytes'] / 1e6:.0f} to {last['bytes'] / 1e6:.0f} MB")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
    print(f"{sum(done.values())} requests ({kinds}), {len(wrong)} wrong")
    print(*wrong[:10], sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
