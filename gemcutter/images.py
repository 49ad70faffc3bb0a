"""Images in prompts: taken from messages, encoded once, and put where a prompt has their placeholders.

Owns the rows of images that were seen lately, by content, and the order placeholder, marker, rows, marker that the models were
trained on. Refuses to know templates and how text is encoded. Read `media/image.py` for patches, `model/vision.py` for rows,
`engine/media.py` for what the engine is given, `api.py` for who asks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gemcutter.engine.media import MediaSpan
from gemcutter.errors import CheckpointError, RequestError
from gemcutter.media.budgets import BUDGETS, check_budget
from gemcutter.media.decode import ImageSource
from gemcutter.media.image import ImagePatches, PatchShape, cut_image
from gemcutter.model.vision import VisionTower
from gemcutter.text.history import check_messages, in_order
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.tower_plan import UnifiedVisionPlan

PLACEHOLDER, BEGIN, END = "<|image|>", "<|image>", "<image|>"
DEFAULT_BUDGET = 280  # soft tokens an image
CACHE_BYTES = 256 << 20  # of rows that stay for images that come again
SHOWN_BY = ("user", "tool", "function")  # roles whose messages may hold images


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image, where it was found, for messages, and how many soft tokens it may become; None: as many as the request says."""

    name: str
    source: ImageSource
    budget: int | None = None


class ImageReader:
    """Makes rows of images for one model; safe to share between threads, which encode one after the other."""

    def __init__(self, tower: VisionTower, tokenizer: Tokenizer, cache_bytes: int = CACHE_BYTES) -> None:
        """Prepare to read. Raises CheckpointError for a tokenizer without the markers of images."""
        found = {piece: tokenizer.id_of(piece) for piece in (PLACEHOLDER, BEGIN, END)}
        if lacking := [piece for piece, token in found.items() if token is None]:
            raise CheckpointError(f"the tokenizer has no {' and no '.join(lacking)}; take the original's, or load without images")
        self._ids = {piece: token for piece, token in found.items() if token is not None}
        plan = tower.plan
        self._tower, self._shape = tower, PatchShape(plan.patch, plan.pool, isinstance(plan, UnifiedVisionPlan))
        self._budget = plan.soft_tokens if plan.soft_tokens in BUDGETS else DEFAULT_BUDGET
        self._rows: OrderedDict[str, Tensor] = OrderedDict()  # by digest, the longest unused first
        self._capacity, self._size, self._lock = cache_bytes, 0, threading.Lock()
        self.weight_bytes = tower.nbytes

    def place(
        self, ids: Sequence[int], images: Sequence[NamedImage], budget: object = None
    ) -> tuple[list[int], tuple[MediaSpan, ...]]:
        """Return a prompt whose placeholders are markers around as many ids as an image has rows, and these rows.

        `budget` bounds the soft tokens of each image that has no budget of its own; None: what the model was made for. Raises
        RequestError for images that can't be read, and unless there is one placeholder an image.
        """
        most, placeholder = self._budget if budget is None else check_budget(budget), self._ids[PLACEHOLDER]
        count = sum(token == placeholder for token in ids)
        if count != len(images):
            raise RequestError(
                f"images: {len(images)} were given, and the prompt has {count} times {PLACEHOLDER}; it needs one for each image"
            )
        cut = self._cut(images, most)
        rows = self._encode(cut)
        placed, spans, following = list[int](), list[MediaSpan](), iter(zip(cut, rows, strict=True))
        for token in ids:
            if token != placeholder:
                placed.append(token)
                continue
            image, rows_KD = next(following)
            spans.append(MediaSpan(len(placed) + 1, image.digest, rows_KD))
            placed += [self._ids[BEGIN], *[placeholder] * image.soft_tokens, self._ids[END]]
        return placed, tuple(spans)

    def _cut(self, images: Sequence[NamedImage], budget: int) -> list[ImagePatches]:
        """Return the patches of all images. Raises RequestError with every problem."""
        found, problems = list[ImagePatches](), list[str]()
        for image in images:
            try:
                most = budget if image.budget is None else image.budget
                found.append(cut_image(image.source, most, self._shape, image.name))
            except RequestError as error:
                problems += error.problems
        if problems:
            raise RequestError("images can't be read", problems)
        return found

    def _encode(self, images: Sequence[ImagePatches]) -> list[Tensor]:
        """Return the rows of images; those that are not known are encoded together, each once."""
        with self._lock:
            known = {image.digest: self._rows[image.digest] for image in images if image.digest in self._rows}
            new = {image.digest: image for image in images if image.digest not in known}
            known |= zip(new, self._tower.encode(list(new.values())), strict=True)
            for image in images:
                self._keep(image.digest, known[image.digest])
            return [known[image.digest] for image in images]

    def _keep(self, digest: str, rows_KD: Tensor) -> None:
        """Remember an image's rows as the latest, and forget the oldest beyond the capacity."""
        if digest not in self._rows:
            rows_KD = rows_KD.clone()  # not a view of all images that were encoded with it
            self._size += rows_KD.nbytes
        self._rows[digest] = rows_KD
        self._rows.move_to_end(digest)
        while self._size > self._capacity:
            self._size -= self._rows.popitem(last=False)[1].nbytes


def take_images(messages: Sequence[Mapping[str, object]]) -> tuple[list[Mapping[str, object]], list[NamedImage]]:
    """Return messages whose image parts hold no image any more, and the images in the order in which a template prints them.

    A part is {"type": "image", "image": I} or {"type": "image", "path": P}, with a `max_soft_tokens` of its own if need be.
    Raises RequestError, with every problem, for parts without an image, and for images in messages that are neither the user's
    nor a tool's.
    """
    left, images, problems = list[Mapping[str, object]](), list[NamedImage](), list[str]()
    for index, message in enumerate(messages):
        content: Any = message.get("content")
        parts = list[object]()
        for place, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if not isinstance(part, Mapping) or part.get("type") != "image":
                parts.append(part)
                continue
            where, source = f"messages[{index}].content[{place}]", part.get("image", part.get("path"))
            if source is None:
                problems.append(f'{where}: an image part without an image; write {{"type": "image", "image": ...}}')
            elif message.get("role") not in SHOWN_BY:
                problems.append(f"{where}: images are read in messages of the user and of tools only")
            try:
                budget = None if part.get("max_soft_tokens") is None else check_budget(part["max_soft_tokens"])
                images.append(NamedImage(where, source, budget))
            except RequestError as error:
                problems.append(f"{where}.{error.summary}")
            parts.append({"type": "image"})
        left.append({**message, "content": parts} if isinstance(content, list | tuple) else message)
    if problems:
        raise RequestError("the conversation holds images that can't be read", problems)
    return left, _as_printed(left, images)


def _as_printed(messages: Sequence[Mapping[str, Any]], images: list[NamedImage]) -> list[NamedImage]:
    """Return the images of messages in the order of a prompt, where results of tools stand in the order of their calls."""
    if not any(message.get("role") in SHOWN_BY[1:] and isinstance(message.get("content"), list) for message in messages):
        return images
    by_part = dict(zip(_image_parts(messages), images, strict=True))
    ordered = in_order(check_messages(messages), joins_turns=lambda: False)
    printed = [by_part[part] for part in _image_parts(ordered)]
    return printed if len(printed) == len(images) else images  # what was lost is missed where rows take their places


def _image_parts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return which objects the image parts of messages are, in order."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [id(part) for parts in contents for part in parts if isinstance(part, Mapping) and part.get("type") == "image"]
