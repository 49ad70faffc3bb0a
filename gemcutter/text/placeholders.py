"""Characters that stand for those with which markers begin, while texts of strangers go through a chat template.

A template's output is one text, and what a user wrote in it must never become a control token. So each character with which some
marker begins is replaced by a private-use character before the template runs, wherever the text is not the template's own, and
put back when the template's markers have been found. No cutting and joining of texts can then make a marker.
Owns the choice of the characters, which must occur in nothing that is rendered. Refuses to know messages. Read `chat.py` for who
asks, `tokenizer.py` for the markers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from gemcutter.errors import RequestError

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # code points
MAX_DEPTH = 200  # of lists and objects in each other


class Placeholders:
    """Hides the first characters of markers in values, and puts them back; `end` is one more character that occurs nowhere."""

    def __init__(self, markers: Iterable[str], *values: Any) -> None:
        """Choose characters that occur in none of the values. Raises RequestError where there are none, or for deep nesting."""
        used = set(chain.from_iterable(_texts(values)))
        free = (character for code in chain(*PRIVATE_USE) if (character := chr(code)) not in used)
        firsts = sorted({marker[0] for marker in markers})
        chosen = [character for _, character in zip(range(len(firsts) + 1), free, strict=False)]
        if len(chosen) <= len(firsts):
            raise RequestError("the conversation holds every private-use character of Unicode; leave some out")
        self.end = chosen.pop()
        self._hidden = str.maketrans(dict(zip(firsts, chosen, strict=True)))
        self._shown = str.maketrans(dict(zip(chosen, firsts, strict=True)))

    def hide(self, value: Any) -> Any:
        """Return a copy of texts, and of lists and objects of them, in which no marker is spelled."""
        if isinstance(value, str):
            return str(value).translate(self._hidden)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        """Return a text as it was before it was hidden."""
        return text.translate(self._shown)


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise RequestError(f"the conversation holds lists or objects nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(key, depth + 1)
            yield from _texts(each, depth + 1)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each, depth + 1)
