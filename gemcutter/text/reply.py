"""Token ids to text while they arrive: content and reasoning, whole characters, nothing after a stop string.

Owns the split into channels (`<|channel>` ... `<channel|>`), the buffering of unfinished UTF-8, the `thought` header of a channel
and the search for stop strings. Each lane has its own text: content is the decoding of all content ids, however channels cut it.
Refuses to know tools, sampling and end-of-sequence ids: whoever pushes the ids decides when to finish.
Read `tokenizer.py` for the bytes behind an id.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemcutter.errors import RequestError
from gemcutter.text.tokenizer import Tokenizer

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
TURN_OPEN, TURN_CLOSE = "<|turn>", "<turn|>"
CHANNEL_NAME = "thought"
# What a channel may start with, and what a content may start with where a model has lost the marker; longest first.
CHANNEL_HEADERS = (f"{CHANNEL_NAME}\n", CHANNEL_NAME)
BARE_HEADERS = (f"{CHANNEL_NAME}\n",)
# Ends of prompts after which models may write a bare header: a tool response, an empty channel (at most 16 ids long).
INVITING_END = re.compile(rf"(<tool_response\|>|<\|channel>({CHANNEL_NAME})?\s*<channel\|>)\Z")


@dataclass(frozen=True, slots=True)
class ReplyPiece:
    """A stretch of a reply that is final: no later id can change it.

    Of a tool call, `text` is the next fragment of the arguments' JSON, "" possibly in its first piece; `index` counts the calls
    of the reply, and `name` is set in the first piece of a call only.
    """

    kind: Literal["content", "reasoning", "tool_call"]
    text: str
    index: int = 0
    name: str | None = None


class ReplyParser:
    """Turn the ids of one generated sequence into pieces of text, at constant cost for each id.

    `stopped` is the stop string that ended the content, None while there is none. Of several stop strings, the one that is
    complete first wins, and of those ending together the longest. They are searched for in the content only.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        show_special: bool = False,
        in_reasoning: bool = False,
        bare_header: bool = False,
    ) -> None:
        """Start at the end of a prompt; `ReplyParser.after` derives the last two flags from its ids.

        `in_reasoning`: the prompt ends in an open channel, whose header it has written. `bare_header`: drop a literal `thought`
        line at the start of the content, which models add after some prompts. `show_special`: print all markers but a channel's.
        Raises RequestError for stop strings that are empty or no strings.
        """
        _check_stop(stop)
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._open_id, self._close_id = tokenizer.id_of(CHANNEL_OPEN), tokenizer.id_of(CHANNEL_CLOSE)
        self._hidden_ids = frozenset[int]() if show_special else tokenizer.special_ids
        self._search = _StopSearch(tuple(stop))
        self._content = _Lane(BARE_HEADERS if bare_header else ())
        self._reasoning = _Lane() if in_reasoning else None
        self._is_finished = False
        self._content_parts: list[str] = []
        self._reasoning_parts: list[str] = []

    @classmethod
    def after(
        cls, prompt_ids: Sequence[int], tokenizer: Tokenizer, *, stop: Sequence[str] = (), show_special: bool = False
    ) -> ReplyParser:
        """Start where the prompt of these ids leaves the model: in its content, or in a channel that it opened.

        Raises RequestError for stop strings that are empty or no strings.
        """
        return cls(
            tokenizer,
            stop=stop,
            show_special=show_special,
            in_reasoning=ends_in_reasoning(tokenizer, prompt_ids),
            bare_header=invites_bare_header(tokenizer, prompt_ids),
        )

    @property
    def text(self) -> str:
        """Return all content emitted so far."""
        return "".join(self._content_parts)

    @property
    def reasoning(self) -> str:
        """Return all reasoning emitted so far; channels follow each other without a separator."""
        return "".join(self._reasoning_parts)

    def push(self, id: int) -> list[ReplyPiece]:
        """Take one generated id and return the text that became final; nothing after a stop string or `finish`.

        Raises RequestError for an id outside the vocabulary.
        """
        if self._is_finished:
            return []
        if id == self._open_id:
            pieces = self._leave_channel()
            self._reasoning = _Lane(CHANNEL_HEADERS)
            return pieces
        if id == self._close_id:
            return self._leave_channel()
        if id in self._hidden_ids:
            return []
        data = self._tokenizer.bytes_of(id)
        if self._reasoning is not None:
            return self._emit("reasoning", self._reasoning.feed(data, is_last=False))
        return self._say(data, is_last=False)

    def finish(self) -> list[ReplyPiece]:
        """End the sequence and return what was held back; an unfinished character becomes U+FFFD. Later calls return nothing."""
        if self._is_finished:
            return []
        pieces = self._leave_channel() + self._say(b"", is_last=True)
        self._is_finished = True
        return pieces

    def _say(self, data: bytes, *, is_last: bool) -> list[ReplyPiece]:
        text = self._search.feed(self._content.feed(data, is_last=is_last), is_last=is_last)
        self.stopped = self._search.met
        self._is_finished = self.stopped is not None
        return self._emit("content", text)

    def _leave_channel(self) -> list[ReplyPiece]:
        """End the open channel, if any: a stray `<channel|>` is dropped."""
        if self._reasoning is None:
            return []
        text = self._reasoning.feed(b"", is_last=True)
        self._reasoning = None
        return self._emit("reasoning", text)

    def _emit(self, kind: Literal["content", "reasoning"], text: str) -> list[ReplyPiece]:
        if not text:
            return []
        (self._content_parts if kind == "content" else self._reasoning_parts).append(text)
        return [ReplyPiece(kind, text)]


def ends_in_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Return whether the prompt leaves a channel open: in its last turn, no `<channel|>` follows the last `<|channel>`."""
    opener = tokenizer.id_of(CHANNEL_OPEN)
    # A turn marker ends the search, so that a `<|channel>` which a user typed can't turn the answer into reasoning.
    borders = {tokenizer.id_of(piece) for piece in (CHANNEL_OPEN, CHANNEL_CLOSE, TURN_OPEN, TURN_CLOSE)}
    last = next((id for id in reversed(prompt_ids) if id in borders), None)
    return last is not None and last == opener


def invites_bare_header(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Return whether the prompt ends in a tool response or empty channel, after which models may write a bare `thought` line."""
    return INVITING_END.search(tokenizer.decode(prompt_ids[-16:], special=True)) is not None


class _Lane:
    """Bytes to whole characters for one text, without the header at its start; held back until it is decided."""

    def __init__(self, headers: tuple[str, ...] = ()) -> None:
        """Swallow one of `headers`, the longest first, if the text starts with it."""
        self._headers = headers
        self._held: str | None = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes, *, is_last: bool) -> str:
        text = self._utf8.decode(data, final=is_last)
        if self._held is None:
            return text
        held = self._held = self._held + text
        if not is_last and any(header.startswith(held) for header in self._headers):
            return ""
        self._held = None
        header = next((header for header in self._headers if held.startswith(header)), "")
        return held.removeprefix(header)


class _StopSearch:
    """Hold back what may be the start of a stop string and cut the text at the first one that is complete."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.met: str | None = None
        self._stops = stops
        self._held = ""

    def feed(self, text: str, *, is_last: bool) -> str:
        """Return the text that is known to lie before any stop string; nothing more is to come after `met` is set."""
        buffer = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if found:
            _, start, self.met = min(found)
            return buffer[:start]
        cut = len(buffer) if is_last else min((_partial_start(buffer, stop) for stop in self._stops), default=len(buffer))
        self._held = buffer[cut:]
        return buffer[:cut]


def _partial_start(text: str, stop: str) -> int:
    """Return where the longest end of `text` that `stop` may continue begins; len(text) when there is none."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, str):
        raise RequestError(f"stop is the string {stop!r}, expected a list of strings: write [{stop!r}]")
    problems = [
        f"stop[{i}] is {item!r}, expected a non-empty string"
        for i, item in enumerate(stop)
        if not isinstance(item, str) or not item
    ]
    if problems:
        raise RequestError("stop strings can't be used", problems)
