"""One request as the client saw it: when it was due, sent and answered, chunk by chunk.

Owns the record and the reading of a stream's lines into it. Refuses to know sockets and statistics. Read `client.py` for who
fills it, `metrics.py` for what is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

DATA, DONE = "data:", "[DONE]"
REASONING = ("reasoning_content", "reasoning")  # two names of one field: what a server sends twice is counted once
MOST_ERROR = 300  # characters of an error that are kept


@dataclass(slots=True)
class Reply:
    """What became of one turn. Times are seconds of one clock (`time.perf_counter`).

    `due_s` is when the request was to arrive, `dispatched_s` when the client's own loop came to it, `started_s` when it was sent:
    after it had waited for the limit on concurrency. `choice_times_s` are the arrivals of chunks that carry a choice, of which
    `text_times_s` are those with text or reasoning that is not empty; `ended_s` is the arrival of the last line of any kind.
    """

    due_s: float = 0.0
    dispatched_s: float = 0.0
    started_s: float = 0.0
    ended_s: float = 0.0
    choice_times_s: list[float] = field(default_factory=list)
    text_times_s: list[float] = field(default_factory=list)
    content: str = ""
    text: str = ""  # reasoning and content, in the order in which they came
    usage: Mapping[str, Any] | None = None
    finish_reason: str | None = None
    error: str = ""
    is_done: bool = False
    prompt_len: int | None = None  # of the workload: tokens of the text alone
    wanted_len: int | None = None
    num_images: int = 0
    turn: int = 0

    @property
    def is_success(self) -> bool:
        """Return whether the reply came to its end."""
        return not self.error

    def fail(self, error: str) -> None:
        """Note why the request failed, unless that is known already."""
        self.error = self.error or " ".join(error.split())[:MOST_ERROR] or "failed without a message"

    def usage_detail(self, part: str, name: str) -> int | None:
        """Return a number of `usage`'s details; None where the server told none."""
        details = (self.usage or {}).get(part)
        value = details.get(name) if isinstance(details, dict) else None
        return value if isinstance(value, int) else None

    def usage_count(self, name: str) -> int | None:
        """Return a number of `usage` itself; None where the server told none."""
        value = (self.usage or {}).get(name)
        return value if isinstance(value, int) else None


class LineReader:
    """Cuts the bytes of a body into lines, however they were cut on their way."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> Iterator[str]:
        """Yield the lines that are complete now and not empty."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if text := line.decode("utf-8", errors="replace").strip():
                yield text


def read_line(reply: Reply, line: str, now_s: float) -> None:
    """Take one line of a stream into a record. Comments, which servers send to keep a connection, are no events."""
    if not line.startswith(DATA):
        return
    reply.ended_s = now_s
    payload = line[len(DATA) :].strip()
    if payload == DONE:
        reply.is_done = True
        return
    try:
        event = json.loads(payload)
    except ValueError:
        reply.fail(f"an event is no JSON: {payload}")
        return
    if not isinstance(event, dict) or event.get("error"):
        reply.fail(f"the stream brought an error: {payload}")
        return
    if isinstance(event.get("usage"), dict):
        reply.usage = event["usage"]
    choices = event.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        _read_choice(reply, choices[0], now_s)


def _read_choice(reply: Reply, choice: Mapping[str, Any], now_s: float) -> None:
    reply.choice_times_s.append(now_s)
    reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    delta = choice.get("delta")
    if isinstance(delta, dict):
        reasoning = next((delta[name] for name in REASONING if isinstance(delta.get(name), str)), "")
        content = delta.get("content") or ""
    else:
        reasoning, content = "", choice.get("text") or ""
    if reasoning or content:
        reply.text_times_s.append(now_s)
        reply.text += reasoning + content
        reply.content += content
