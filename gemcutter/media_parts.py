"""Parts of conversations that hold media, and media beside raw text: taken out, each with its kind and its place.

Owns the kinds of media, how a part says what it holds, and the markers of each kind. Refuses to know files and towers. Read
`media_reader.py` for what becomes of an item, `api.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemcutter.errors import CheckpointError, RequestError
from gemcutter.media.budgets import check_budget
from gemcutter.text.history import check_messages, in_order

if TYPE_CHECKING:
    from gemcutter.media.decode import ImageSource
    from gemcutter.media.decode_sound import SoundSource
    from gemcutter.media.video import VideoSource
    from gemcutter.text.tokenizer import Tokenizer

    MediaSource = ImageSource | SoundSource | VideoSource
else:
    MediaSource = object  # checked, not trusted; and a command line starts without numpy

# The option that holds media of a kind beside raw text, how such things are called, and what may be given.
KINDS = {
    "image": ("images", "images", "paths, bytes, PIL images or arrays"),
    "audio": ("audio", "sounds", "paths, bytes, or pairs of an array and its rate"),
    "video": ("videos", "videos", "paths, bytes, or frames as images, alone or in pairs with their rate"),
}
# What stands before the rows of an item, in place of each of them, and after them. A prompt has the second in the item's place.
MARKERS = {
    "image": ("<|image>", "<|image|>", "<image|>"),
    "audio": ("<|audio>", "<|audio|>", "<audio|>"),
    "video": ("<|image>", "<|video|>", "<image|>"),  # of each frame
}
SHOWN_BY = ("user", "tool", "function")  # roles whose messages may hold media
TOWERS = {"image": "vision tower", "audio": "audio tower", "video": "vision tower"}  # that read a kind


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image, sound or video: its kind, where it was found, for messages, and what it is read from.

    `budget` is how many soft tokens an image may become; None: as many as the request says.
    """

    kind: str
    name: str
    source: MediaSource
    budget: int | None = None


def take_media(messages: Sequence[Mapping[str, object]]) -> tuple[list[Mapping[str, object]], list[MediaItem]]:
    """Return messages whose parts hold no media any more, and the media in the order in which a template prints them.

    A part is {"type": "image", "image": I} or {"type": "image", "path": P}, with a `max_soft_tokens` of its own if need be, and
    alike for "audio" and "video". Raises RequestError, with every problem, for parts without anything, and for media in messages
    that are neither the user's nor a tool's.
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
            elif message.get("role") not in SHOWN_BY:
                problems.append(f"{where}: {called} are read in messages of the user and of tools only")
            try:
                budget = None if part.get("max_soft_tokens") is None else check_budget(part["max_soft_tokens"])
                items.append(MediaItem(kind, where, source, budget))
            except RequestError as error:
                problems.append(f"{where}.{error.summary}")
            parts.append({"type": kind})
        left.append({**message, "content": parts} if isinstance(content, list | tuple) else message)
    if problems:
        raise RequestError("the conversation holds media that can't be read", problems)
    return left, _as_printed(left, items)


def _as_printed(messages: Sequence[Mapping[str, Any]], items: list[MediaItem]) -> list[MediaItem]:
    """Return the media of messages in the order of a prompt, where results of tools stand in the order of their calls."""
    if not any(message.get("role") in SHOWN_BY[1:] and isinstance(message.get("content"), list) for message in messages):
        return items
    by_part = dict(zip(_media_parts(messages), items, strict=True))
    ordered = in_order(check_messages(messages), joins_turns=lambda: False)
    printed = [by_part[part] for part in _media_parts(ordered)]
    return printed if len(printed) == len(items) else items  # what was lost is missed where rows take their places


def _media_parts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return which objects the parts of messages are that hold media, in order."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    kinds = [(part, part.get("type")) for parts in contents for part in parts if isinstance(part, Mapping)]
    return [id(part) for part, kind in kinds if isinstance(kind, str) and kind in KINDS]


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


@dataclass(frozen=True, slots=True)
class Markers:
    """The ids of a kind's markers."""

    begin: int
    placeholder: int
    end: int


def find_markers(tokenizer: Tokenizer, sees: bool, hears: bool) -> dict[str, Markers]:
    """Return the markers of every kind that a model reads, which has a vision tower (`sees`) or an audio tower (`hears`).

    Raises CheckpointError for a tokenizer without them; videos are only read where it has theirs.
    """
    readable = {"image": sees, "audio": hears, "video": sees and tokenizer.id_of(MARKERS["video"][1]) is not None}
    return {kind: _find_markers(tokenizer, kind) for kind, can_read in readable.items() if can_read}


def _find_markers(tokenizer: Tokenizer, kind: str) -> Markers:
    """Return the ids of a kind's markers. Raises CheckpointError for a tokenizer without them."""
    found = {piece: tokenizer.id_of(piece) for piece in MARKERS[kind]}
    if lacking := [piece for piece, token in found.items() if token is None]:
        called = KINDS[kind][1]
        raise CheckpointError(f"the tokenizer has no {' and no '.join(lacking)}; take the original's, or load without {called}")
    return Markers(*(token for token in found.values() if token is not None))
