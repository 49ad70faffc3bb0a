"""One tool call as a model writes it, to a name and the JSON text of its arguments, while it comes.

Owns the grammar `call:NAME{key:value,...}`, the repair of what models get wrong in it, and what of a call is final: the text that
`take` returns is never taken back. Refuses to know token ids: a delimiter `<|"|>` comes as QUOTE, and whoever feeds the text says
when the block ends. Each state is a method that takes the text from a place on and returns the place after what it has read, or
the same place and another state. Read `argument_types.py` for how values get their types, `reply.py` for who finds calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gemcutter.text.argument_types import ArgumentSchema, is_literal, quote
from gemcutter.text.quoted_text import CALL_CLOSE_MARK, QUOTE, SPACE, PlainText, StringTail, shown

LONGEST_HEADER = 256  # characters before the first brace
DEEPEST = 100  # containers in each other; what opens more is text
CLOSERS = "}])"
HEADER = re.compile(r"(call\s*:\s*|:\s*)?([^\s{}()\[\],\"'=<>]+)")
HEADER_END = re.compile(r"[{(]")
BLANK, BLANK_OR_COMMA = re.compile(rf"[{SPACE}]*"), re.compile(rf"[{SPACE},]*")
KEY_END = re.compile(rf"[:=,}}{QUOTE}]")
BARE_END = re.compile(rf"[,{{}}\[\](){QUOTE}]")
PLAIN_ENDS = {mark: re.compile(rf"[\\{mark}{QUOTE}]") for mark in "\"'"}
OPENING = ":[{,"  # before a delimiter that opens a string
BLOCK = "BEGIN_ARG"  # of a foreign grammar that some models fall into; such calls are not guessed at

State = Callable[[str, int], int]


@dataclass(slots=True)
class _Container:
    """An open object or list; `closer` may be ")" for the outermost object."""

    closer: str
    schema: ArgumentSchema
    keys: set[str] = field(default_factory=set)
    is_empty: bool = True


class CallReader:
    """Reads one call. `name` is None until the arguments have begun to make sense; `has_failed` tells that it is no call.

    `rest` holds what was written between arguments and belongs to none, `dropped` the values of keys that were there before,
    and the name space before a declared name.
    `source` is all that was read.
    """

    def __init__(self, schemas: Mapping[str, ArgumentSchema], opener: str) -> None:
        """Begin after `opener`, the call's first marker as it is spelled; `schemas` are those of declared parameters."""
        self.name: str | None = None
        self.is_done = self.has_failed = False
        self.rest, self.dropped = list[str](), list[str]()
        self._schemas, self._source = schemas, [opener]
        self._state: State = self._header
        self._named = ""
        self._buffer, self._last = list[str](), ""
        self._stack = list[_Container]()
        self._schema = ArgumentSchema(None)
        self._out = list[str]()
        self._muted_at: int | None = None  # the depth at which a repeated key's value is passed over
        self._tail = StringTail(self._pour)
        self._plain = PlainText(self._tail.feed)
        self._collected: list[str] | None = None  # a string that becomes another kind when it is whole
        self._key_mark, self._mark, self._slashes = "", "", 0  # `_slashes` end what there is of a quoted key
        self._gap = list[str]()
        self._depth = 0  # of brackets within a bare value
        self._is_sure = False  # a bare value ends at the next comma: no delimiter follows that could belong to it
        self._before = ""  # the character that was fed last

    @property
    def source(self) -> str:
        """Return all that was read, with its markers spelled."""
        return shown("".join(self._source))

    @property
    def is_in_string(self) -> bool:
        """Return whether a marker that comes now is text of a string."""
        return self._state in (self._string, self._plain_string, self._plain_end)

    @property
    def keeps_close(self) -> bool:
        """Return whether `<tool_call|>` is text here: within a string, but not after what looks like the call's end."""
        return self._state == self._string and self._before not in ("}", ")", QUOTE)

    def take(self) -> str:
        """Return the JSON text that became final since the last time."""
        found = "".join(self._out)
        self._out.clear()
        return found

    def feed(self, text: str) -> str:
        """Read a stretch of the block and return what of it stands behind the call's end."""
        if not text:
            return ""
        self._source.append(text)
        self._before = text[-1]
        place = self._read(text)
        return shown(text[place:])

    def end(self, *, is_natural: bool) -> None:
        """End the block: a natural end supplies what is missing, another one leaves a call as it is unless it is balanced."""
        if is_natural and self._state == self._header and not self.has_failed:
            name = self._find_name("".join(self._buffer))
            if name is None:
                self.has_failed = True
                return
            self._open(name, "}")
        if self._state in (self._bare, self._hold):
            self._resolve()
        if is_natural and not self.has_failed and not self.is_done:
            self._complete()

    def _read(self, text: str) -> int:
        """Run the states over a text and return where they ended: before its end only at the call's end or a failure."""
        place = 0
        while place < len(text) and not self.has_failed:
            if self.is_done:
                place = _skip(_AFTER_END, text, place)
                break
            place = self._state(text, place)
        return len(text) if self.has_failed else place

    # ---- the name ----

    def _header(self, text: str, place: int) -> int:
        found = HEADER_END.search(text, place)
        self._buffer.append(text[place : found.start() if found else len(text)])
        if found is None:
            self.has_failed = sum(map(len, self._buffer)) > LONGEST_HEADER
            return len(text)
        name = self._find_name("".join(self._buffer))
        if name is None:
            self.has_failed = True
        else:
            self._open(name, "}" if found[0] == "{" else ")")
        return found.end()

    def _find_name(self, header: str) -> str | None:
        """Return the name in a header, None where there is none; without `call:` only a declared one."""
        found = HEADER.fullmatch(header.replace(QUOTE, "").strip())
        if found is None:
            return None
        space, _, name = found[2].rpartition(":")
        if found[2] in self._schemas:
            return found[2]
        if found[1] and space and name in self._schemas:
            self.dropped.append(space)
            return name
        return found[2] if found[1] else None

    def _open(self, name: str, closer: str) -> None:
        self._named = name
        self._buffer = []
        self._stack.append(_Container(closer, self._schemas.get(name) or ArgumentSchema(None)))
        self._state = self._key

    def _publish(self) -> None:
        if self.name is None:
            self.name = self._named
            self._out.append("{")

    # ---- keys ----

    def _key(self, text: str, place: int) -> int:
        """Wait for a key, or for the end of the object."""
        place = _skip(BLANK_OR_COMMA, text, place)
        if place == len(text):
            return place
        character = text[place]
        if character in CLOSERS:
            self._close(character)
        elif character == "{" and self.name is None:  # an object within the shell: ({...}) or {{...}}
            self._stack[0].closer = "}"
        elif character in ('"', "'", QUOTE):
            self._key_mark, self._slashes, self._state = character, 0, self._quoted_key
        else:
            self._state = self._bare_key
            return place
        return place + 1

    def _bare_key(self, text: str, place: int) -> int:
        found = KEY_END.search(text, place)
        self._buffer.append(text[place : found.start() if found else len(text)])
        if found is None:
            return len(text)
        key = self._take_buffer().strip()
        if found[0] in ":=":
            if key:
                self._begin_pair(key)
            else:
                self._state = self._key
            return found.end()
        self._pass_over(key + (found[0] if found[0] == QUOTE else ""))
        self._state = self._bare_key if found[0] == QUOTE else self._key
        return found.end() if found[0] == QUOTE else found.start()

    def _quoted_key(self, text: str, place: int) -> int:
        end = text.find(self._key_mark, place)
        part = text[place : end if end >= 0 else len(text)]
        self._buffer.append(part)
        body = part.rstrip("\\")
        self._slashes = len(part) - len(body) + (0 if body else self._slashes)
        if end < 0:
            return len(text)
        if self._key_mark == '"' and self._slashes % 2:
            self._buffer.append('"')
            self._slashes = 0
            return end + 1
        self._state = self._key_tail
        return end + 1

    def _key_tail(self, text: str, place: int) -> int:
        """Find the colon after a quoted key; without one the quotes belong to what stands there."""
        place = _skip(BLANK, text, place)
        if place == len(text):
            return place
        if text[place] not in ":=":
            self._buffer = [self._key_mark, *self._buffer, self._key_mark]
            self._state = self._bare_key
            return place
        key = self._take_buffer()
        self._begin_pair(_unescaped(key) if self._key_mark == '"' else key)
        return place + 1

    def _begin_pair(self, key: str) -> None:
        if self.name is None and BLOCK in key:
            self.has_failed = True
            return
        self._publish()
        container, key = self._stack[-1], shown(key)
        if key in container.keys:  # the first one counts, as in the reader that the models were trained beside
            self._muted_at = len(self._stack) if self._muted_at is None else self._muted_at
            self.dropped.append(key)
        else:
            self._emit(("" if container.is_empty else ",") + quote(key) + ":")
            container.is_empty = False
            container.keys.add(key)
        self._schema = container.schema.of_key(key)
        self._state = self._value

    def _pass_over(self, text: str) -> None:
        """Take a stretch that is no pair for content: the whole call if nothing of it is out yet."""
        if self.name is None:
            self.has_failed = True
        elif text:
            self.rest.append(shown(text))

    # ---- values ----

    def _value(self, text: str, place: int) -> int:
        """Wait for a value, or in a list for its end."""
        place = _skip(BLANK, text, place)
        if place == len(text):
            return place
        character, is_list = text[place], self._stack[-1].closer == "]"
        if character == "," and is_list:
            return place + 1
        if character in ":=" and not is_list:
            return place + 1
        if character in ",}]" or (character == ")" and self._stack[-1].closer == ")"):
            self._end_without_value()
            return place
        if character in "{[" and len(self._stack) < DEEPEST:
            self._push(character)
        elif character == QUOTE:
            self._begin_string()
            self._state = self._string
        elif character in "\"'":
            self._begin_string()
            self._mark, self._state = character, self._plain_string
        else:
            self._buffer, self._last, self._depth, self._state = [], "", 0, self._bare
            return place
        return place + 1

    def _end_without_value(self) -> None:
        if self._stack[-1].closer != "]":
            self._emit(self._schema.absent())
            self._end_value()
        else:
            self._state = self._next

    def _begin_item(self) -> None:
        """Separate a list's item from the one before."""
        container = self._stack[-1]
        if container.closer == "]":
            self._emit("" if container.is_empty else ",")
            container.is_empty = False
            self._schema = container.schema.of_item()

    def _push(self, opener: str) -> None:
        self._begin_item()
        self._emit(opener)
        self._stack.append(_Container("}" if opener == "{" else "]", self._schema))
        self._state = self._key if opener == "{" else self._value

    def _end_value(self) -> None:
        if self._muted_at == len(self._stack):
            self._muted_at = None
        self._state = self._next

    def _next(self, text: str, place: int) -> int:
        """Wait for what follows a value. A missing comma is supplied, a stray delimiter is passed over."""
        place = _skip(BLANK, text, place)
        if place == len(text):
            return place
        character = text[place]
        if character in CLOSERS:
            self._close(character)
        elif character not in (",", QUOTE):
            self._state = self._value if self._stack[-1].closer == "]" else self._key
            return place
        elif character == ",":
            self._state = self._value if self._stack[-1].closer == "]" else self._key
        return place + 1

    def _close(self, closer: str) -> None:
        """Close the innermost container that `closer` fits, and those in it whose own end is missing; else pass it over."""
        for place in range(len(self._stack) - 1, -1, -1):
            own = self._stack[place].closer
            if own == closer or (own == ")" and closer == "}"):
                self._close_down_to(place)
                return

    def _close_down_to(self, depth: int) -> None:
        self._publish()
        while len(self._stack) > depth:
            container = self._stack.pop()
            self._emit("]" if container.closer == "]" else "}")
            self._end_value()
        self.is_done = not self._stack

    def _emit(self, text: str) -> None:
        if text:
            (self._out if self._muted_at is None else self.dropped).append(text)

    # ---- strings ----

    def _begin_string(self) -> None:
        self._begin_item()
        self._collected = None if self._schema.takes_strings else []
        if self._collected is None:
            self._emit('"')

    def _pour(self, text: str) -> None:
        """Add text to the open string."""
        text = shown(text)
        if self._collected is None:
            self._emit(quote(text)[1:-1])
        else:
            self._collected.append(text)

    def _end_string(self) -> None:
        self._plain.end()
        self._tail.release()
        self._emit('"' if self._collected is None else self._schema.string("".join(self._collected)))
        self._collected = None
        self._end_value()

    def _string(self, text: str, place: int) -> int:
        end = text.find(QUOTE, place)
        self._tail.feed(text[place : end if end >= 0 else len(text)])
        if end < 0:
            return len(text)
        self._end_string()
        return end + 1

    def _plain_string(self, text: str, place: int) -> int:
        """Read a string in plain quotes, with the escapes of JSON and Python."""
        place, character = self._plain.feed(text, place, PLAIN_ENDS[self._mark])
        if character:
            self._gap, self._last, self._state = [character], character, self._plain_end
        return place

    def _plain_end(self, text: str, place: int) -> int:
        """Decide whether a quote ends its string: it does before a comma, a closing bracket or the call's end."""
        after = _skip(BLANK, text, place)
        self._gap.append(text[place:after])
        if after == len(text):
            return after
        if self._may_end_value(text[after]) or (text[after] == QUOTE and self._last != QUOTE):
            self._end_string()
        else:
            self._tail.feed("".join(self._gap))
            self._state = self._plain_string
        return after

    def _may_end_value(self, character: str) -> bool:
        return character in ",}]" or (character == ")" and self._stack[0].closer == ")")

    # ---- values without delimiters ----

    def _bare(self, text: str, place: int) -> int:
        """Read a value without delimiters up to a comma or closing bracket that may be its end."""
        found = BARE_END.search(text, place)
        self._keep(text[place : found.start() if found else len(text)])
        if found is None:
            return len(text)
        character = found[0]
        if character == QUOTE:
            return self._meet_quote(found.start())
        is_end = not self._depth and self._may_end_value(character)
        if not is_end:
            self._depth += (character in "([{") - (character in ")]}" and self._depth > 0)
            self._keep(character)
            return found.end()
        value = "".join(self._buffer).strip()
        if is_literal(value) or self._is_sure:
            self._end_bare(value)
        else:
            self._state = self._hold
        return found.start()

    def _hold(self, text: str, place: int) -> int:
        """Keep all that follows an undelimited text back until a delimiter, or the call's end, tells how far the text goes."""
        end = text.find(QUOTE, place)
        self._keep(text[place : end if end >= 0 else len(text)])
        return self._meet_quote(end) if end >= 0 else len(text)

    def _keep(self, text: str) -> None:
        self._buffer.append(text)
        self._last = text.rstrip()[-1:] or self._last

    def _meet_quote(self, place: int) -> int:
        """Meet a delimiter in or after a value that had none: it opens another value's string, or it may close this one."""
        if self._state == self._hold and self._last in OPENING:
            self._resolve()
            if self._state != self._bare:
                return place
        self._before_quote, self._state = self._state, self._bare_end
        self._gap = []
        return place + 1

    def _bare_end(self, text: str, place: int) -> int:
        """Decide whether a delimiter closes a value that lacks the opening one: before a comma or a closing bracket it does."""
        after = _skip(BLANK, text, place)
        self._gap.append(text[place:after])
        if after == len(text):
            return after
        if self._may_end_value(text[after]):
            self._end_bare("".join(self._buffer), is_word=True)
        elif text[after] == QUOTE:
            return after + 1
        else:
            self._buffer += self._gap
            self._state = self._before_quote
        return after

    def _end_bare(self, value: str, *, is_word: bool = False) -> None:
        value = value.strip()
        self._buffer, self._last = [], ""
        self._begin_item()
        self._emit(self._schema.literal(value) if is_literal(value) and not is_word else self._schema.string(value))
        self._end_value()

    def _resolve(self) -> None:
        """Read what was kept back, now that no delimiter is to come that could belong to it: values end at commas."""
        text = self._take_buffer()
        self._last, self._depth, self._state, self._is_sure = "", 0, self._bare, True
        self.rest.append(shown(text[self._read(text) :]))
        self._is_sure = False

    # ---- the end of a call that lacks something ----

    def _complete(self) -> None:
        """Supply what is missing at the end of a block."""
        if self._state in (self._bare_key, self._quoted_key, self._key_tail):
            is_quoted = self._state != self._bare_key
            self._pass_over((self._key_mark if is_quoted else "") + self._take_buffer())
        elif self._state == self._value and self._stack[-1].closer != "]":
            self._emit(self._schema.absent())
            self._end_value()
        elif self._state in (self._string, self._plain_string):
            self._tail.cut(self._missing_closers())
            self._end_string()
        elif self._state == self._plain_end:
            self._end_string()
        elif self._state == self._bare_end:
            self._end_bare("".join(self._buffer), is_word=True)
        elif self._state == self._bare:
            text = "".join(self._buffer).rstrip()
            self._end_bare(text if self._depth else StringTail.without(text, self._missing_closers()))
        if not self.has_failed:
            self._close_down_to(0)

    def _missing_closers(self) -> str:
        return "".join(container.closer for container in reversed(self._stack))

    def _take_buffer(self) -> str:
        found = "".join(self._buffer)
        self._buffer = []
        return found


_AFTER_END = re.compile(rf"[{SPACE},}}\]){QUOTE}{CALL_CLOSE_MARK}]*")


def _skip(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place


def _unescaped(key: str) -> str:
    """Return a key in JSON's quotes without its escapes, as it is written where they are wrong."""
    if "\\" not in key:
        return key
    try:
        return str(json.loads(f'"{key}"')).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except ValueError:
        return key
