"""The text of a string argument while it comes: what may be the end of an unclosed one is held back, escapes are resolved.

Owns the run of closing brackets at the end of a string, and the escapes of strings in plain quotes. Refuses to know calls.
Read `call_reader.py` for who asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable

SPACE = " \t\r\n"
# Markers within a call: lone surrogates, which no decoded text holds.
QUOTE, CALL_CLOSE_MARK = "\udc52", "\udc49"
RUN = "}])" + SPACE + CALL_CLOSE_MARK  # what may stand behind a string whose closing delimiter is missing
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "/": "/", '"': '"', "'": "'"}
HEX = re.compile(r"[0-9a-fA-F]+")


def shown(text: str) -> str:
    """Return a text with the markers in it spelled."""
    return text.replace(QUOTE, '<|"|>').replace(CALL_CLOSE_MARK, "<tool_call|>")


class StringTail:
    """Passes a string on as it comes, but for closing brackets at its end, which may be those of the call."""

    def __init__(self, pour: Callable[[str], None]) -> None:
        self._pour, self._held = pour, list[str]()

    def feed(self, text: str) -> None:
        """Pass on all that other text follows."""
        body = text.rstrip(RUN)
        tail = text[len(body) :]
        if body:
            self.release()
            self._pour(body)
        if not self._held:
            inner = tail.lstrip(SPACE)
            if len(inner) < len(tail):
                self._pour(tail[: len(tail) - len(inner)])
            tail = inner
        if tail:
            self._held.append(tail)

    def release(self) -> None:
        """Pass on what was held back."""
        if self._held:
            held, self._held = "".join(self._held), []
            self._pour(held)

    def cut(self, closers: str) -> None:
        """Drop the brackets that close `closers`, innermost first, from what is held back, and pass on the rest."""
        self._held = [self.without("".join(self._held), closers)]
        self.release()

    @staticmethod
    def without(text: str, closers: str) -> str:
        """Return a text without the brackets at its end that are the longest beginning of `closers`, with space between or not.

        A `<tool_call|>` at the end goes, too: what was taken for a part of the string was the end of the block.
        """
        short = text.rstrip(SPACE + CALL_CLOSE_MARK)
        if short.endswith(("}", "]", ")")) or CALL_CLOSE_MARK in text[len(short) :]:
            text = short
        for count in range(len(closers), 0, -1):
            left = text
            for closer in reversed(closers[:count]):
                left = left.rstrip(SPACE)
                if not left.endswith(closer):
                    break
                left = left[:-1]
            else:
                return left
        return text


class PlainText:
    """Reads a string in plain quotes and resolves its escapes; those that mean nothing stay as they are written."""

    def __init__(self, pour: Callable[[str], None]) -> None:
        self._pour = pour
        self._escape = ""  # a backslash and what has come of its escape
        self._high = 0  # the first half of a character in two escapes

    def feed(self, text: str, place: int, ends: re.Pattern[str]) -> tuple[int, str]:
        """Read on and return the place behind what was read, and the end that was met there, "" for none.

        `ends` matches the characters that may end the string, and the backslash.
        """
        if self._escape:
            return self._go_on(text, place), ""
        found = ends.search(text, place)
        stop = found.start() if found else len(text)
        self._pass_on(text[place:stop])
        if found is None:
            return stop, ""
        if found[0] != "\\":
            return found.end(), found[0]
        self._escape = "\\"
        return found.end(), ""

    def end(self) -> None:
        """Pass on an escape that was never finished."""
        self._pass_on(self._escape)
        self._escape = ""
        self._pass_high()

    def _go_on(self, text: str, place: int) -> int:
        """Add one character to an escape, and end it where it is complete or wrong."""
        character = text[place]
        if self._escape == "\\" and character != "u":
            self._escape = ""
            self._pass_on(ESCAPES.get(character, f"\\{character}"))
            return place + 1
        if self._escape != "\\" and not HEX.fullmatch(character):
            wrong, self._escape = self._escape, ""
            self._pass_on(wrong)
            return place
        self._escape += character
        if len(self._escape) == 6:
            code, self._escape = int(self._escape[2:], 16), ""
            self._pass_code(code)
        return place + 1

    def _pass_code(self, code: int) -> None:
        if 0xDC00 <= code < 0xE000 and self._high:
            code, self._high = 0x10000 + ((self._high - 0xD800) << 10) + code - 0xDC00, 0
        if 0xD800 <= code < 0xDC00:
            self._pass_high()
            self._high = code
        else:
            self._pass_on("\ufffd" if 0xDC00 <= code < 0xE000 else chr(code))

    def _pass_on(self, text: str) -> None:
        if text:
            self._pass_high()
            self._pour(text)

    def _pass_high(self) -> None:
        if self._high:
            self._high = 0
            self._pour("\ufffd")
