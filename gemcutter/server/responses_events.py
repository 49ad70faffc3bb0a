"""The events of one response of /v1/responses, and the response object made of the very items that were streamed.

Owns ids, sequence numbers, the order of events and the final object. Refuses to know HTTP and how chunks are made; a chunk is
read by its fields `kind`, `text`, `index`, `name` and `completion`. Read `wire/responses.py` for the request.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemcutter.completion import Chunk, Completion
from gemcutter.server.wire.fields import seal
from gemcutter.server.wire.media import NO_MEDIA
from gemcutter.server.wire.responses import CUSTOM_INPUT, ResponsesRequest

Event = tuple[str, dict[str, Any]]  # the name and the data, which has the name as its type
INCOMPLETE = {"length": "max_output_tokens", "repetition": "repetition"}  # why a reply ended before its end


class ResponseEvents:
    """Turns chunks into events; `response` is the object as it stands, whole once `finish` was called.

    Events come in the order that clients demand: `start`, `push` for every chunk, then `finish` or `fail`.
    """

    def __init__(
        self, request: ResponsesRequest, model: str, *, is_stored: bool = False, media: Mapping[str, int] = NO_MEDIA
    ) -> None:
        """Begin a response; `media` are the tokens of its prompt that are no text, as usage names them."""
        self._media = media
        self.response = _new_response(request, model, is_stored)
        self._custom, self._is_encrypted = request.custom_tools, request.wants_encrypted
        self._number = 0
        self._open: _Item | None = None
        self._kind = ""  # of the chunks that the open item takes
        self._calls = set[int]()  # numbers of the calls that were begun

    def start(self) -> list[Event]:
        """Return the events before the first token."""
        return [self._of_response("response.created"), self._of_response("response.in_progress")]

    def push(self, chunk: Chunk) -> list[Event]:
        """Return the events of a chunk; none for one without text that begins nothing."""
        begins_call = chunk.kind == "tool_call" and chunk.index not in self._calls
        if not chunk.text and not begins_call:
            return []
        events = list[Event]()
        if self._open is None or begins_call or self._kind != chunk.kind:
            events += self._close() + self._begin(chunk)
        assert self._open is not None
        return events + self._numbered(self._open.push(chunk.text))

    def finish(self, completion: Completion) -> list[Event]:
        """Return the last events, whose response holds all items, the usage and how it ended."""
        reason = INCOMPLETE.get(completion.finish_reason)
        if completion.finish_reason == "cancelled":
            return self.fail("server_error", "the request was cancelled before its end", completion)
        is_whole = self._kind == "tool_call" and len(self._calls) <= len(completion.tool_calls)
        events = self._close("completed" if reason is None or is_whole else "incomplete")
        self.response["usage"] = _usage(completion, self._media)
        if reason is None:
            self.response |= {"status": "completed", "completed_at": int(time.time())}
            return [*events, self._of_response("response.completed")]
        self.response |= {"status": "incomplete", "incomplete_details": {"reason": reason}}
        return [*events, self._of_response("response.incomplete")]

    def fail(self, code: str, message: str, completion: Completion | None = None) -> list[Event]:
        """Return the last events of a response that an error ended."""
        events = self._close("incomplete")
        self.response |= {"status": "failed", "error": {"code": code, "message": message}}
        if completion is not None:
            self.response["usage"] = _usage(completion, self._media)
        return [*events, self._of_response("response.failed")]

    def _begin(self, chunk: Chunk) -> list[Event]:
        """Open an item at the end of the output."""
        place = len(self.response["output"])
        if chunk.kind == "tool_call":
            self._calls.add(chunk.index)
            name = chunk.name or ""
            kind = "custom_tool_call" if name in self._custom else "function_call"
            self._open = _Item(kind, place, {"call_id": new_id("call"), "name": name})
        elif chunk.kind == "reasoning":
            self._open = _Item("reasoning", place, {"summary": []}, is_encrypted=self._is_encrypted)
        else:
            self._open = _Item("message", place, {"role": "assistant"})
        self._kind = chunk.kind
        self.response["output"].append(self._open.item)
        return self._numbered(self._open.begin())

    def _close(self, status: str = "completed") -> list[Event]:
        """Complete the open item, if there is one."""
        if self._open is None:
            return []
        found, self._open = self._open, None
        return self._numbered(found.end(status))

    def _of_response(self, name: str) -> Event:
        """Return an event that shows the response; later changes do not reach it."""
        return self._numbered([(name, {"response": _copy(self.response)})])[0]

    def _numbered(self, events: Iterable[Event]) -> list[Event]:
        found = list[Event]()
        for name, data in events:
            found.append((name, {"type": name, "sequence_number": self._number, **data}))
            self._number += 1
        return found


@dataclass(frozen=True, slots=True)
class _Layout:
    """How items of one kind are spelled: the stem of their events, the field with their text, and the part that holds it."""

    prefix: str
    stem: str
    field: str = "text"
    part: str | None = None


LAYOUTS: Mapping[str, _Layout] = {
    "reasoning": _Layout("rs", "reasoning_text", part="reasoning_text"),
    "message": _Layout("msg", "output_text", part="output_text"),
    "function_call": _Layout("fc", "function_call_arguments", "arguments"),
    "custom_tool_call": _Layout("ctc", "custom_tool_call_input", "input"),
}


class _Item:
    """An item of the output while it is written: what it is, and the events that begin, extend and end it.

    `item` is the object that stands in the response; it gets its text at its end.
    """

    def __init__(self, kind: str, place: int, fields: Mapping[str, Any], *, is_encrypted: bool = False) -> None:
        """Begin an item of a type; `kind` is that of the chunks it takes, which `ResponseEvents` knows."""
        self._layout, self._place, self._is_encrypted = LAYOUTS[kind], place, is_encrypted
        holder: dict[str, Any] = {"content": []} if self._layout.part else {self._layout.field: ""}
        self.item: dict[str, Any] = {"id": new_id(self._layout.prefix), "type": kind, "status": "in_progress", **fields, **holder}
        self._parts = list[str]()
        self._free_text = FreeText() if kind == "custom_tool_call" else None

    def begin(self) -> list[Event]:
        """Return the events that add the item."""
        events: list[Event] = [("response.output_item.added", {"output_index": self._place, "item": _copy(self.item)})]
        if self._layout.part:
            events.append(("response.content_part.added", {**self._where(), "part": self._part("")}))
        return events

    def push(self, text: str) -> list[Event]:
        """Return the event of more text; none where nothing can be shown yet."""
        if self._free_text is not None:
            text = self._free_text.push(text)
        if not text:
            return []
        self._parts.append(text)
        return [(f"response.{self._layout.stem}.delta", {**self._where(), **self._logprobs(), "delta": text})]

    def end(self, status: str) -> list[Event]:
        """Fill the item with its text and return the events that complete it."""
        events = list[Event]()
        if self._free_text is not None and (rest := self._free_text.finish()):
            self._parts.append(rest)
            events.append((f"response.{self._layout.stem}.delta", {**self._where(), "delta": rest}))
        text = "".join(self._parts)
        named = {"name": self.item["name"]} if self.item["type"] == "function_call" else {}
        done = {**self._where(), **named, **self._logprobs(), self._layout.field: text}
        events.append((f"response.{self._layout.stem}.done", done))
        if self._layout.part:
            self.item["content"] = [self._part(text)]
            events.append(("response.content_part.done", {**self._where(), "part": self._part(text)}))
        else:
            self.item[self._layout.field] = text
        if self._is_encrypted:
            self.item["encrypted_content"] = seal(text)
        self.item["status"] = status
        return [*events, ("response.output_item.done", {"output_index": self._place, "item": _copy(self.item)})]

    def _where(self) -> dict[str, Any]:
        where = {"item_id": self.item["id"], "output_index": self._place}
        return {**where, "content_index": 0} if self._layout.part else where

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._layout.part == "output_text" else {}

    def _part(self, text: str) -> dict[str, Any]:
        more: dict[str, Any] = {"annotations": [], "logprobs": []} if self._layout.part == "output_text" else {}
        return {"type": self._layout.part, "text": text, **more}


class FreeText:
    """The one string in the arguments of a custom tool's call, decoded while their JSON text grows.

    Arguments of another form are given whole, at the end.
    """

    HEAD = re.compile(rf'\s*\{{\s*"{CUSTOM_INPUT}"\s*:\s*"')
    WHOLE = re.compile(r'(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*')  # characters that no later one can change
    HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")  # the first half of a character
    LONGEST_HEAD = 64

    def __init__(self) -> None:
        self._head = ""  # what came before the string began
        self._raw = list[str]()  # all of it, as long as the string has not begun
        self._held = ""
        self._is_inside = self._is_done = False

    def push(self, fragment: str) -> str:
        """Return the text that became certain."""
        if self._is_done:
            return ""
        if not self._is_inside:
            self._raw.append(fragment)
            if len(self._head) > self.LONGEST_HEAD:
                return ""
            self._head += fragment
            found = self.HEAD.match(self._head)
            if found is None:
                return ""
            self._is_inside, fragment = True, self._head[found.end() :]
        return self._decode(self._held + fragment)

    def finish(self) -> str:
        """Return what is left: the arguments themselves where they are not of the expected form."""
        if self._is_inside:
            return ""
        raw = "".join(self._raw)
        try:
            text = json.loads(raw).get(CUSTOM_INPUT)
        except (ValueError, AttributeError, RecursionError):
            return raw
        return text if isinstance(text, str) else raw

    def _decode(self, text: str) -> str:
        whole = self.WHOLE.match(text)
        assert whole is not None  # it matches an empty text, too
        end = whole.end()
        self._is_done = text[end : end + 1] == '"'
        half = self.HALF.search(text, max(end - 6, 0), end)
        if half is not None and not self._is_done and not text[: half.start()].endswith("\\"):
            end = half.start()
        self._held = text[end:]
        return str(json.loads(f'"{text[:end]}"', strict=False))


def new_id(prefix: str) -> str:
    """Return an id that no other object has."""
    return f"{prefix}_{uuid.uuid4().hex}"


def _copy(value: Any) -> Any:
    """Return a JSON value that does not change with the given one."""
    return json.loads(json.dumps(value))


def _usage(completion: Completion, media: Mapping[str, int]) -> dict[str, Any]:
    given, written = len(completion.prompt_tokens), len(completion.tokens)
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": completion.metrics.cached_tokens, "cache_write_tokens": 0, **media},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": completion.reasoning_tokens},
        "total_tokens": given + written,
    }


def _new_response(request: ResponsesRequest, model: str, is_stored: bool) -> dict[str, Any]:
    """Return the object before anything was written; fields that the request gave are shown as they came."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": (request.reasoning or {}).get("effort"), "summary": None},
        "store": is_stored,
        "temperature": request.temperature,
        "text": {"format": (request.text or {}).get("format") or {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": [
            {"parameters": None, "strict": None, **tool} if tool["type"] == "function" else tool for tool in request.tools or ()
        ],
        "top_logprobs": 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
    }
