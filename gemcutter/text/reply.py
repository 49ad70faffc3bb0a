"""Token ids to a reply while they arrive: reasoning, content and tool calls, and nothing after a stop string.

Owns the split into channels (`<|channel>` ... `<channel|>`), the search for calls (`<|tool_call>` ... `<tool_call|>`), and where
a prompt leaves the model. Nothing that a model writes is lost: what can't be read as a call becomes content, with its markers
spelled. Refuses to know sampling and which ids end a reply: whoever pushes the ids decides when to finish.
Read `lanes.py` for how ids become text, `call_reader.py` for one call.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemcutter.errors import RequestError
from gemcutter.text.call_reader import CallReader
from gemcutter.text.lanes import Content, Thoughts
from gemcutter.text.quoted_text import CALL_CLOSE_MARK, QUOTE, SPACE
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tool_calls import ToolCall, argument_schemas

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
TURN_OPEN, TURN_CLOSE = "<|turn>", "<turn|>"
CALL_OPEN, CALL_CLOSE, RESPONSE_OPEN, DELIMITER = "<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>'
ENDS = (TURN_CLOSE, "<eos>", RESPONSE_OPEN)  # of a reply, and of a call without its own end
HEADER = "thought\n"
MOST_CALLS = 64  # of a reply: a model that repeats itself ends here
LONGEST_OPENING = 256  # characters at the start of a content that are held back while they may begin a call
# Ends of prompts after which a turn's text begins (at most 16 ids long).
TURN_START = re.compile(rf"(<tool_response\|>|<channel\|>|<\|turn>model\n)[{SPACE}]*\Z")

Kind = Literal["content", "reasoning", "tool_call"]


@dataclass(frozen=True, slots=True)
class ReplyPiece:
    """A stretch of a reply that is final: no later id can change it.

    Of a tool call, `text` is the next fragment of the arguments' JSON, "" possibly in its first piece; `index` counts the calls
    of the reply, and `name` is set in the first piece of a call only.
    """

    kind: Kind
    text: str
    index: int = 0
    name: str | None = None


class ReplyParser:
    """Turn the ids of one generated sequence into pieces of a reply, at constant cost for each id.

    `stopped` is the stop string that ended the content, None while there is none. Of several stop strings, the one that is
    complete first wins, and of those ending together the longest. They are searched for in the content only. `tool_calls` are
    the calls that are complete, `cut_call` is the source of one that the reply's end left incomplete, `dropped` what stood under
    keys that a call had already. `is_finished` tells that no more ids are wanted. `num_reasoning_tokens` counts the ids in
    channels, `num_unreadable` the blocks that were no calls.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop: Sequence[str] = (),
        show_special: bool = False,
        parallel: bool = True,
        in_reasoning: bool = False,
        with_header: bool = False,
        at_turn_start: bool = False,
    ) -> None:
        """Start at the end of a prompt; `ReplyParser.after` derives the last three flags from its ids.

        `tools` are declarations in OpenAI's layout; without `parallel` the first call ends the reply. `show_special` prints all
        markers but a channel's, and leaves calls in the content as they are written. `in_reasoning`: the prompt ends in an open
        channel; `with_header`: the channel's name is still to come. `at_turn_start`: a literal `thought` line at the start is a
        channel whose marker is lost. Raises RequestError for stop strings that are empty or no strings.
        """
        _check_stop(stop)
        self.num_reasoning_tokens = self.num_unreadable = 0
        self.cut_call: str | None = None
        self.dropped = list[str]()
        self.is_finished = False
        self._calls = list[ToolCall]()
        self._tokenizer, self._parallel, self._show_special = tokenizer, parallel, show_special
        self._schemas = {} if show_special else argument_schemas(tools)
        self._call_starts = tuple(f"call:{name}{opener}" for name in self._schemas for opener in "{(")
        kinds = (CHANNEL_OPEN, CHANNEL_CLOSE, *(() if show_special else (CALL_OPEN, CALL_CLOSE, DELIMITER, *ENDS)))
        self._markers = {id: kind for kind in kinds if (id := tokenizer.id_of(kind)) is not None}
        self._hidden_ids = frozenset[int]() if show_special else tokenizer.special_ids
        self._content, self._thoughts = Content(tuple(stop)), Thoughts()
        self._call: CallReader | None = None
        self._call_utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_unreadable = False  # in the rest of a block that is no call
        self._in_reasoning, self._may_think = in_reasoning, at_turn_start and not in_reasoning
        if in_reasoning:
            self._thoughts.open(with_header=with_header)
        self._opening: str | None = "" if at_turn_start and not in_reasoning else None  # of a content, while undecided
        self._pieces = list[ReplyPiece]()
        self._parts: dict[str, list[str]] = {"content": [], "reasoning": []}
        self._arguments = list[str]()

    @classmethod
    def after(
        cls,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop: Sequence[str] = (),
        show_special: bool = False,
        parallel: bool = True,
    ) -> ReplyParser:
        """Start where the prompt of these ids leaves the model: in its content, or in a channel that it opened.

        Raises RequestError for stop strings that are empty or no strings.
        """
        return cls(
            tokenizer,
            tools=tools,
            stop=stop,
            show_special=show_special,
            parallel=parallel,
            in_reasoning=ends_in_reasoning(tokenizer, prompt_ids),
            with_header=bool(prompt_ids) and prompt_ids[-1] == tokenizer.id_of(CHANNEL_OPEN),
            at_turn_start=ends_at_turn_start(tokenizer, prompt_ids),
        )

    @property
    def text(self) -> str:
        """Return all content emitted so far."""
        return "".join(self._parts["content"])

    @property
    def reasoning(self) -> str:
        """Return all reasoning emitted so far; thoughts have a line break between them."""
        return "".join(self._parts["reasoning"])

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Return the calls that are complete."""
        return tuple(self._calls)

    @property
    def stopped(self) -> str | None:
        """Return the stop string that ended the content, None while there is none."""
        return self._content.stopped

    def push(self, id: int) -> list[ReplyPiece]:
        """Take one generated id and return what became final; nothing after a stop string, a single call or `finish`.

        Raises RequestError for an id outside the vocabulary.
        """
        if self.is_finished:
            return []
        if self._call is not None and (id in self._markers or id in self._hidden_ids):
            self._feed_call(self._call_utf8.decode(b"", final=True))  # which may end the call
        if self._call is not None and self._leaves_call(id):
            self._end_call(is_natural=True)
        self._route(id)
        return self._take_pieces()

    def finish(self, is_natural: bool = True) -> list[ReplyPiece]:
        """End the sequence and return what was held back; later calls return nothing.

        An unfinished character becomes U+FFFD. Where the end is not the model's own, an unbalanced call is left incomplete.
        """
        if self.is_finished:
            return []
        if self._call is not None:
            self._feed_call(self._call_utf8.decode(b"", final=True))
        if self._call is not None:
            self._end_call(is_natural=is_natural)
        if not self.is_finished:
            self._leave_lane()
            self._emit("content", self._content.finish())
        self.is_finished = True
        return self._take_pieces()

    def _route(self, id: int) -> None:
        if self.is_finished:  # by the call that the id has ended
            return
        if self._call is not None:
            self._push_in_call(self._call, id)
        elif id in self._markers:
            self._push_marker(self._markers[id])
        elif id not in self._hidden_ids:
            self._push_text(self._tokenizer.bytes_of(id))

    # ---- outside calls ----

    def _push_marker(self, marker: str) -> None:
        if marker == CHANNEL_OPEN:
            self._leave_lane()
            self._content.cut()
            self._thoughts.open(with_header=True)
            self._in_reasoning, self._is_unreadable = True, False
        elif marker == CHANNEL_CLOSE:
            self._close_channel()
        elif marker == CALL_OPEN:
            self._leave_lane()
            self._is_unreadable = False
            self._begin_call(CALL_OPEN)
        elif self._is_unreadable and marker not in ENDS:
            self._say(marker)
            self._is_unreadable = marker != CALL_CLOSE
        elif marker in ENDS:
            self._is_unreadable = False

    def _close_channel(self) -> None:
        """End the open channel. Without one, a closing marker is dropped, and a bare `thought` before it is a channel's name."""
        if self._opening == HEADER.strip() and self._may_think:
            self._opening = None
        was_open = self._in_reasoning
        self._leave_lane()
        if was_open:
            self._content.cut()
        if not self._is_unreadable:
            self._opening = ""

    def _leave_lane(self) -> None:
        """End the channel or the stretch of content that is open."""
        if self._in_reasoning:
            self._emit("reasoning", self._thoughts.close())
            self._in_reasoning = False
            return
        self._say(self._content.flush_bytes())
        if self._opening is not None:
            self._release_opening()
        self._may_think = False

    def _push_text(self, data: bytes) -> None:
        if self._in_reasoning:
            self.num_reasoning_tokens += 1
            self._emit("reasoning", self._thoughts.feed(data))
        else:
            self._say(self._content.decode(data))

    def _say(self, text: str) -> None:
        """Add content, or keep it back while it may begin a call or a channel without its marker."""
        if self._opening is None:
            self._emit("content", self._content.say(text))
            self.is_finished = self._content.stopped is not None
            return
        opening = self._opening = self._opening + text
        if self._may_think and HEADER.startswith(opening[: len(HEADER)]):
            if len(opening) >= len(HEADER):
                self._think(opening[len(HEADER) :])
            return
        call = opening.lstrip(SPACE)
        if call.startswith(self._call_starts):
            self._opening = None
            self._content.say(opening[: len(opening) - len(call)])
            self._begin_call("")
            self._feed_call(call)
        elif len(opening) > LONGEST_OPENING or not any(each.startswith(call) for each in self._call_starts):
            self._release_opening()

    def _release_opening(self) -> None:
        text, self._opening, self._may_think = self._opening, None, False
        self._say(text or "")

    def _think(self, text: str) -> None:
        """Take a `thought` line at the start of the reply for the name of a channel whose marker is lost."""
        self._opening, self._may_think, self._in_reasoning = None, False, True
        self._thoughts.open(with_header=False)
        self._emit("reasoning", self._thoughts.feed(text.encode()))

    # ---- calls ----

    def _leaves_call(self, id: int) -> bool:
        """Return whether an id ends a call without being its end marker: another call's, or a channel's."""
        is_opener = self._markers.get(id) in (CALL_OPEN, CHANNEL_OPEN)
        return is_opener and self._call is not None and not self._call.is_in_string

    def _begin_call(self, opener: str) -> None:
        self._call = CallReader(self._schemas, opener)
        self._arguments = []

    def _push_in_call(self, call: CallReader, id: int) -> None:
        marker = self._markers.get(id)
        if marker is None and id not in self._hidden_ids:
            self._feed_call(self._call_utf8.decode(self._tokenizer.bytes_of(id)))
        elif marker in ENDS or (marker == CALL_CLOSE and not call.keeps_close):
            self._end_call(is_natural=True, end=CALL_CLOSE if marker == CALL_CLOSE else "")
        elif marker == DELIMITER:
            self._feed_call(QUOTE)
        elif marker == CALL_CLOSE:
            self._feed_call(CALL_CLOSE_MARK)
        elif call.is_in_string:
            self._feed_call(self._tokenizer.piece(id))

    def _feed_call(self, text: str) -> None:
        """Let the open call read on; what follows its end is content again."""
        call = self._call
        assert call is not None
        behind = call.feed(text)
        if call.has_failed:
            self._give_up(call, is_open=True)
        else:
            self._emit_call(call)
            if behind:
                self._end_call(is_natural=True)
                if not self.is_finished:
                    self._say(behind)

    def _emit_call(self, call: CallReader) -> None:
        """Emit what became final of the open call: its name with its first piece."""
        if call.name is None:
            return
        is_first, text = not self._arguments, call.take()
        if is_first:
            self._emit("content", self._content.flush())
            self._content.cut()
        if text:
            self._arguments.append(text)
            self._emit("tool_call", text, call.name if is_first else None)

    def _end_call(self, *, is_natural: bool, end: str = "") -> None:
        """End the open call, with `end` as its marker is spelled."""
        call = self._call
        assert call is not None
        call.end(is_natural=is_natural)
        if call.has_failed:
            self._give_up(call, is_open=False, end=end)
            return
        self._emit_call(call)
        self._call = None
        if not call.is_done or call.name is None:
            self.cut_call = call.source
            return
        self._calls.append(ToolCall(call.name, "".join(self._arguments)))
        self._say("".join(call.rest))
        self.dropped += call.dropped
        self.is_finished = self.is_finished or not self._parallel or len(self._calls) >= MOST_CALLS

    def _give_up(self, call: CallReader, *, is_open: bool, end: str = "") -> None:
        """Make content of a block that is no call."""
        self._call = None
        self.num_unreadable += 1
        self._is_unreadable = is_open
        self._say(call.source + end)

    # ---- what came out ----

    def _emit(self, kind: Kind, text: str, name: str | None = None) -> None:
        if not text:
            return
        index = len(self._calls) if kind == "tool_call" else 0
        if kind != "tool_call":
            self._parts[kind].append(text)
        last = self._pieces[-1] if self._pieces else None
        if last is not None and name is None and (last.kind, last.index) == (kind, index):
            self._pieces[-1] = ReplyPiece(kind, last.text + text, index, last.name)
        else:
            self._pieces.append(ReplyPiece(kind, text, index, name))

    def _take_pieces(self) -> list[ReplyPiece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def ends_in_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Return whether the prompt leaves a channel open: no end of it, no call, response or turn follows the last `<|channel>`."""
    opener = tokenizer.id_of(CHANNEL_OPEN)
    # Turn markers end the search, so that a `<|channel>` which a user typed can't turn the answer into reasoning.
    borders = {tokenizer.id_of(piece) for piece in (CHANNEL_OPEN, CHANNEL_CLOSE, CALL_OPEN, RESPONSE_OPEN, TURN_OPEN)}
    last = next((id for id in reversed(prompt_ids) if id in borders), None)
    return last is not None and last == opener


def ends_at_turn_start(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Return whether the reply begins the text of a turn: after its header, a tool response or a channel."""
    return TURN_START.search(tokenizer.decode(prompt_ids[-16:], special=True)) is not None


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
