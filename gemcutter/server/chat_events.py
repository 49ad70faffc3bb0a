"""The objects of a chat completion: chunks of a stream, whole messages, usage and log-probabilities.

Owns ids, the order of deltas (one kind in each), the field that reasoning travels in, and why a reply ended. Refuses to know HTTP
and how chunks are made. Read `wire/chat.py` for the request, `routes/chat_completions.py` for who sends them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from gemcutter.completion import Chunk, Completion
from gemcutter.engine.sampling import TokenLogprobs
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.media import NO_MEDIA
from gemcutter.text.tokenizer import Tokenizer

REASONS = {"stop": "stop", "length": "length", "repetition": "repetition", "timeout": "length"}
FIELDS = {"reasoning_content": ("reasoning_content",), "reasoning": ("reasoning",), "both": ("reasoning_content", "reasoning")}


class ChatEvents:
    """Turns the readings of one choice into the `delta`s of a stream."""

    def __init__(self, index: int, options: ServerOptions) -> None:
        self._index, self._options = index, options
        self._calls: dict[int, tuple[str, str]] = {}  # of this reply, by number: id and name

    def role(self) -> dict[str, Any]:
        """Return the choice that opens a stream."""
        return self._choice({"role": "assistant", "content": ""})

    def push(self, chunk: Chunk) -> dict[str, Any] | None:
        """Return the choice for a chunk; None for one that says nothing."""
        if chunk.kind == "tool_call":
            return self._choice({"tool_calls": [self._call(chunk)]})
        if not chunk.text:
            return None
        names = ("content",) if chunk.kind == "content" else FIELDS[self._options.reasoning_field]
        return self._choice(dict.fromkeys(names, chunk.text))

    def finish(self, completion: Completion) -> dict[str, Any]:
        """Return the choice that ends a stream."""
        return self._choice({}, finish_reason(completion))

    def _call(self, chunk: Chunk) -> dict[str, Any]:
        is_first = chunk.index not in self._calls
        if is_first:
            self._calls[chunk.index] = (call_id(), chunk.name or "")
        id, name = self._calls[chunk.index]
        if is_first or self._options.strict_tool_deltas:
            function = {"name": name, "arguments": chunk.text}
            return {"index": chunk.index, "id": id, "type": "function", "function": function}
        return {"index": chunk.index, "function": {"arguments": chunk.text}}

    def _choice(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": reason}


def finish_reason(completion: Completion) -> str:
    """Return why a reply ended, in this API's words: a natural stop with calls is `tool_calls`."""
    if completion.finish_reason == "stop" and completion.tool_calls and completion.stopped is None:
        return "tool_calls"
    return REASONS.get(completion.finish_reason, "error")


def message(completion: Completion, options: ServerOptions) -> dict[str, Any]:
    """Return a reply as a whole message; its content is None where there are calls alone."""
    found: dict[str, Any] = {"role": "assistant", "content": completion.text or (None if completion.tool_calls else "")}
    if completion.reasoning:
        found |= dict.fromkeys(FIELDS[options.reasoning_field], completion.reasoning)
    if completion.tool_calls:
        found["tool_calls"] = [
            {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in completion.tool_calls
        ]
    return found


def usage(completions: Sequence[Completion], media: Mapping[str, int] = NO_MEDIA) -> dict[str, Any]:
    """Return the tokens of all choices; their common prompt counts once. `media` are those of it that are no text."""
    first, replies = completions[0], sum(len(each.tokens) for each in completions)
    return counted(
        len(first.prompt_tokens),
        replies,
        cached=first.metrics.cached_tokens,
        reasoning=sum(each.reasoning_tokens for each in completions),
        drafted=sum(each.metrics.drafted_tokens for each in completions),
        accepted=sum(each.metrics.accepted_tokens for each in completions),
        media=media,
    )


def counted(
    prompt: int,
    reply: int,
    *,
    cached: int = 0,
    reasoning: int = 0,
    drafted: int = 0,
    accepted: int = 0,
    media: Mapping[str, int] = NO_MEDIA,
) -> dict[str, Any]:
    """Return tokens as this API counts them."""
    details = {"reasoning_tokens": reasoning}
    if drafted:
        details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reply,
        "total_tokens": prompt + reply,
        "prompt_tokens_details": {"cached_tokens": cached, **media},
        "completion_tokens_details": details,
    }


def logprobs(found: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return log-probabilities as a choice carries them."""
    content = []
    for each in found:
        top = [_spell(token, value, tokenizer) for token, value in each.top]
        content.append({**_spell(each.token, each.logprob, tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _spell(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.bytes_of(token)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def call_id() -> str:
    """Return an id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


class Envelope:
    """What every object of one response has in common."""

    def __init__(self, model: str, kind: str) -> None:
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self._fixed = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def wrap(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return an object with these choices."""
        return {**self._fixed, "choices": list(choices), **more}
