"""Parts of conversations that hold media, and media beside raw text: taken out, each with its kind and its place.

Owns the kinds of media and how a part says what it holds. Refuses to know files, towers and ids. Read `media_reader.py` for what
becomes of an item, `api.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemcutter.errors import RequestError

if TYPE_CHECKING:
    from gemcutter.media.decode import ImageSource
    from gemcutter.media.decode_sound import SoundSource
    from gemcutter.media.video import VideoSource

    MediaSource = ImageSource | SoundSource | VideoSource
else:
    MediaSource = object  # checked, not trusted; and a command line starts without numpy

# The option that holds media of a kind beside raw text, how such things are called, and what may be given.
KINDS = {
    "image": ("images", "images", "paths, bytes, PIL images or arrays"),
    "audio": ("audio", "sounds", "paths, bytes, or pairs of an array and its rate"),
    "video": ("videos", "videos", "paths, bytes, or frames as images, alone or in pairs with their rate"),
}
TOWERS = {"image": "vision tower", "audio": "audio tower", "video": "vision tower"}  # that read a kind


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image, sound or video: its kind, where it was found, for messages, and what it is read from."""

    kind: str
    name: str
    source: MediaSource


def take_media(messages: Sequence[Mapping[str, object]]) -> tuple[list[Mapping[str, object]], list[MediaItem]]:
    """Return messages whose parts hold no media any more, and the media, in order.

    A part is {"type": "image", "image": I} or {"type": "image", "path": P}, and alike for "audio" and
    "video". Raises RequestError, with
    every problem, for parts without anything, and for media in messages that are not the user's.
    """
    left, items, problems = list[Mapping[str, object]](), list[MediaItem](), list[str]()
    for index, message in enumerate(messages):
        content: Any = message.get("content")
        parts = list[object]()
        for place, part in enumerate(content if isinstance(content, list | tuple) else ()):
            kind: Any = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(kind, str) or kind not in KINDS:
                parts.append(part)
                continue
            where, source, called = f"messages[{index}].content[{place}]", part.get(kind, part.get("path")), KINDS[kind][1]
            if source is None:
                problems.append(f'{where}: a part of type {kind} without any; write {{"type": "{kind}", "{kind}": ...}}')
            elif message.get("role") != "user":
                problems.append(f"{where}: {called} are read in messages of the user only")
            items.append(MediaItem(kind, where, source))
            parts.append({"type": kind})
        left.append({**message, "content": parts} if isinstance(content, list | tuple) else message)
    if problems:
        raise RequestError("the conversation holds media that can't be read", problems)
    return left, items


def media_beside(given: Mapping[str, object]) -> list[MediaItem]:
    """Return the media that options hold, by the names of the options. Raises RequestError for what is no list."""
    items = list[MediaItem]()
    for kind, (option, _, wanted) in KINDS.items():
        sources = given.get(option)
        if sources is None:
            continue
        if not isinstance(sources, list | tuple):
            raise RequestError(f"{option}: expected a list of {wanted}, found {type(sources).__name__}")
        items += [MediaItem(kind, f"{option}[{index}]", source) for index, source in enumerate(sources)]
    return items
