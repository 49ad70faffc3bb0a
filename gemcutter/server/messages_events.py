"""The events of one reply of /v1/messages, and the message made of the very blocks that were streamed.

Owns ids, the order of events (one open block at a time), stop reasons and usage. Refuses to know HTTP and how chunks are made; a
chunk is read by its fields `kind`, `text`, `index`, `name` and `completion`. Read `wire/messages.py` for the request.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

from gemcutter.completion import Chunk, Completion
from gemcutter.server.wire.fields import seal

Event = tuple[str, dict[str, Any]]  # the name and the data, which has the name as its type
PING: Event = ("ping", {"type": "ping"})
BLOCKS: dict[str, tuple[str, str, str]] = {  # by a chunk's kind: the block's type, its delta's type, the field of both
    "content": ("text", "text_delta", "text"),
    "reasoning": ("thinking", "thinking_delta", "thinking"),
    "tool_call": ("tool_use", "input_json_delta", "partial_json"),
}


class MessageEvents:
    """Turns chunks into events; `message` is the reply as it stands, whole once `finish` was called.

    Events come in the order that clients demand: `start`, `push` for every chunk, then `finish` or `error`.
    """

    def __init__(self, model: str, prompt_tokens: int, *, shows_thinking: bool = True) -> None:
        """Begin a reply; thoughts that are not shown travel in their block's signature."""
        self.message: dict[str, Any] = {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**_input_usage(prompt_tokens, 0), "output_tokens": 0},
        }
        self._shows_thinking = shows_thinking
        self._kind: str | None = None  # of the chunks that the open block takes
        self._parts = list[str]()
        self._blocks, self._calls = 0, set[int]()  # how many, and which calls of the reply, were begun

    def start(self) -> list[Event]:
        """Return the event before the first token."""
        return [("message_start", {"type": "message_start", "message": json.loads(json.dumps(self.message))})]

    def push(self, chunk: Chunk) -> list[Event]:
        """Return the events of a chunk; none for one without text that begins nothing."""
        begins_call = chunk.kind == "tool_call" and chunk.index not in self._calls
        if not chunk.text and not begins_call:
            return []
        events = list[Event]()
        if begins_call or self._kind != chunk.kind:
            events = [*self._close(), self._begin(chunk)]
        if chunk.text:
            self._parts.append(chunk.text)
            _, delta, field = BLOCKS[chunk.kind]
            if chunk.kind != "reasoning" or self._shows_thinking:
                events.append(self._delta({"type": delta, field: chunk.text}))
        return events

    def finish(self, completion: Completion) -> list[Event]:
        """Return the last events; the message holds all blocks, the usage and how it ended.

        A call that a limit cut is a streamed block, but no block of the message: its arguments are no object.
        """
        events = self._close()
        reason, sequence = stop_reason(completion)
        usage = _input_usage(len(completion.prompt_tokens), completion.metrics.cached_tokens)
        usage["output_tokens"] = len(completion.tokens)
        self.message |= {"stop_reason": reason, "stop_sequence": sequence, "usage": usage}
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        events.append(("message_delta", {"type": "message_delta", "delta": delta, "usage": usage}))
        return [*events, ("message_stop", {"type": "message_stop"})]

    def _begin(self, chunk: Chunk) -> Event:
        kind, _, field = BLOCKS[chunk.kind]
        block: dict[str, Any] = {"type": kind, field: ""}
        if chunk.kind == "tool_call":
            block = {"type": kind, "id": new_id("toolu"), "name": chunk.name or "", "input": {}}
            self._calls.add(chunk.index)
        elif chunk.kind == "reasoning":
            block["signature"] = ""
        self._kind, self._parts, self._block = chunk.kind, [], block
        self._blocks += 1
        return ("content_block_start", {"type": "content_block_start", "index": self._blocks - 1, "content_block": dict(block)})

    def _close(self) -> list[Event]:
        """End the open block, if there is one, and put it into the message."""
        if self._kind is None:
            return []
        events, text, block = list[Event](), "".join(self._parts), self._block
        if self._kind == "tool_call":
            block["input"] = _arguments(text)
        elif self._kind == "content":
            block["text"] = text
        else:
            block["signature"] = self._signature(text)
            block["thinking"] = text if self._shows_thinking else ""
            events.append(self._delta({"type": "signature_delta", "signature": block["signature"]}))
        if self._kind != "tool_call" or block["input"] is not None:
            self.message["content"].append(block)
        self._kind = None
        return [*events, ("content_block_stop", {"type": "content_block_stop", "index": self._blocks - 1})]

    def _signature(self, thought: str) -> str:
        """Return what stands for a thought: any text will do, but a hidden thought must come back with it."""
        return hashlib.sha256(thought.encode()).hexdigest() if self._shows_thinking else seal(thought)

    def _delta(self, delta: dict[str, Any]) -> Event:
        return ("content_block_delta", {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta})


def stop_reason(completion: Completion) -> tuple[str, str | None]:
    """Return why a reply ended in the words of this API, and the stop sequence if one ended it.

    It has no word for a loop that was cut: to a client it is a limit.
    """
    if completion.finish_reason != "stop":
        return "max_tokens", None
    if completion.stopped is not None:
        return "stop_sequence", completion.stopped
    return ("tool_use" if completion.tool_calls else "end_turn"), None


def new_id(prefix: str) -> str:
    """Return an id that no other object has."""
    return f"{prefix}_{uuid.uuid4().hex}"


def _arguments(text: str) -> dict[str, Any] | None:
    """Return a call's arguments, None where they are no whole object."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _input_usage(prompt_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Return the tokens of the prompt: what was found in the cache is not counted twice."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
    }
