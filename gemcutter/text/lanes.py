"""The two lanes of text in a reply: bytes to whole characters, the space around them trimmed, stop strings found.

Owns the buffering of unfinished UTF-8, the `thought` header of a channel, the trimming of space beside channels and calls, and
the search for stop strings. Refuses to know ids and calls. Read `reply.py` for who decides which lane a token belongs to.
"""

from __future__ import annotations

import codecs

from gemcutter.text.quoted_text import SPACE

CHANNEL_NAME = "thought"


class Content:
    """The visible text: nothing after a stop string, and no space beside channels and calls."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Search for `stops`, the one that is complete first."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._search = _StopSearch(stops)
        self._gap = list[str]()  # space that stays if text follows it
        self._is_trimmed = False

    @property
    def stopped(self) -> str | None:
        """Return the stop string that was met, None while there is none."""
        return self._search.met

    def decode(self, data: bytes) -> str:
        """Return the characters that the bytes complete."""
        return self._utf8.decode(data)

    def flush_bytes(self) -> str:
        """Return U+FFFD for a character that was begun, if there is one."""
        return self._utf8.decode(b"", final=True)

    def say(self, text: str) -> str:
        """Add text and return what became final."""
        if self._is_trimmed:
            text = text.lstrip(SPACE)
            self._is_trimmed = not text
        return self._pass_gap(self._search.feed(text, is_last=False))

    def flush(self) -> str:
        """Return what was held back because it may have begun a stop string: a call follows."""
        return self._pass_gap(self._search.feed("", is_last=True))

    def cut(self) -> None:
        """Drop the space at the end, and that which follows: a channel or a call stands here."""
        self._gap = []
        self._is_trimmed = True

    def finish(self) -> str:
        """Return what was held back, the space at the end included."""
        return self.flush() + self._take_gap()

    def _pass_gap(self, text: str) -> str:
        body = text.rstrip(SPACE)
        if body and self.stopped is None:
            text, rest = self._take_gap() + body, text[len(body) :]
            self._gap = [rest] if rest else []
            return text
        if text:
            self._gap.append(text)
        return "" if self.stopped is None else self._take_gap()

    def _take_gap(self) -> str:
        gap, self._gap = "".join(self._gap), []
        return gap


class Thoughts:
    """The reasoning of all channels: each thought trimmed, a line break between them, empty ones left out."""

    def __init__(self) -> None:
        self._header: str | None = None  # what there is of it, None where it is decided
        self._gap = list[str]()
        self._has_begun = self._is_empty = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def open(self, *, with_header: bool) -> None:
        """Begin a thought; `with_header`, its channel's name is still to come."""
        self._header = "" if with_header else None
        self._gap, self._is_empty = [], True

    def feed(self, data: bytes) -> str:
        """Add bytes and return what became final."""
        return self._add(self._utf8.decode(data))

    def close(self) -> str:
        """End the thought and return what was held back."""
        text = self._add(self._utf8.decode(b"", final=True))
        header, self._header = self._header, None
        return text + ("" if header is None or header == CHANNEL_NAME else self._add(header))

    def _add(self, text: str) -> str:
        if self._header is not None:
            self._header += text
            line = f"{CHANNEL_NAME}\n"
            if line.startswith(self._header[: len(line)]) and len(self._header) < len(line):
                return ""
            text, self._header = self._header.removeprefix(line), None
        if self._is_empty:
            text = text.lstrip(SPACE)
            if not text:
                return ""
        body = text.rstrip(SPACE)
        if not body:
            self._gap.append(text)
            return ""
        start = "\n" if self._is_empty and self._has_begun else "".join(self._gap)
        self._gap, self._is_empty, self._has_begun = [text[len(body) :]], False, True
        return start + body


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
            self._held = ""
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
