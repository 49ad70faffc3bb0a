"""Media in prompts: cut, encoded once by content, and put where a prompt has their placeholders.

Owns the rows of images, frames and sounds that were seen lately, what became of files that were read lately, and the order
marker, rows, marker that the models were trained on; before each frame of a video stands its time. Refuses to know templates and
how text is encoded. Read `media_parts.py` for where items come from, `media/` for how they are cut, `model/vision.py` and
`model/audio.py` for their rows, `engine/media.py` for what the engine is given.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gemcutter.engine.media import MediaSpan
from gemcutter.errors import RequestError
from gemcutter.media import decode, decode_sound, decode_video
from gemcutter.media.audio import SoundFrames, SoundShape, cut_sound
from gemcutter.media.budgets import BUDGETS, check_budget
from gemcutter.media.image import ImagePatches, PatchShape, cut_image
from gemcutter.media.source_bytes import read_bytes
from gemcutter.media.video import cut_video
from gemcutter.media_parts import KINDS, MARKERS, MediaItem, find_markers
from gemcutter.model.audio import AudioTower
from gemcutter.model.tower import TowerBody
from gemcutter.model.vision import VisionTower
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.tower_plan import UnifiedAudioPlan, UnifiedVisionPlan

DEFAULT_BUDGET = 280  # soft tokens an image
CACHE_BYTES = 256 << 20  # of rows that stay for media that come again
MOST_FILES = 1024  # of which it is known what became of them
MAX_FILE_BYTES = {
    "image": decode.MAX_FILE_BYTES,
    "audio": decode_sound.MAX_FILE_BYTES,
    "video": decode_video.MAX_FILE_BYTES,
}

Content = ImagePatches | SoundFrames  # what a tower makes rows of
Bodies = Mapping[type[Content], TowerBody]  # what makes the rows of one prompt's media


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is encoded as one, and the ids that stand before its markers: of a frame its time.

    Where the rows are known already, there is no content.
    """

    digest: str
    soft_tokens: int
    content: Content | None
    before: tuple[int, ...] = ()
    rows_KD: Tensor | None = None


class MediaReader:
    """Makes rows of images, videos and sounds for one model; safe to share between threads, which encode one after the other."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionTower | None = None,
        audio: AudioTower | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Prepare to read what the towers do. Raises CheckpointError for a tokenizer without the markers of such media."""
        self._tokenizer = tokenizer
        self._markers = find_markers(tokenizer, vision is not None, audio is not None)
        self._towers: dict[type[Content], VisionTower | AudioTower] = {}
        self._budget, self._patches, self._frames = DEFAULT_BUDGET, PatchShape(), SoundShape()
        if vision is not None:
            plan = vision.plan
            self._towers[ImagePatches] = vision
            self._patches = PatchShape(plan.patch, plan.pool, isinstance(plan, UnifiedVisionPlan))
            self._budget = plan.soft_tokens if plan.soft_tokens in BUDGETS else DEFAULT_BUDGET
        if audio is not None:
            self._towers[SoundFrames] = audio
            self._frames = SoundShape(audio.plan.hidden if isinstance(audio.plan, UnifiedAudioPlan) else None)
        self._rows: OrderedDict[str, Tensor] = OrderedDict()  # by digest, the longest unused first
        self._files: OrderedDict[str, tuple[_Piece, ...]] = OrderedDict()  # by digest of the bytes, without contents
        self._capacity, self._size = cache_bytes, 0
        self.queries = self.hits = 0  # pieces whose rows were asked for, and those that were known
        self._lock, self._encoding = threading.Lock(), threading.Lock()  # of what is known; of the towers
        self.weight_bytes = sum(tower.nbytes for tower in (vision, audio) if tower is not None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds that can be read, as parts of messages name them."""
        return tuple(self._markers)

    def place(
        self, ids: Sequence[int], items: Sequence[MediaItem], budget: object = None, adapter: object = None
    ) -> tuple[list[int], tuple[MediaSpan, ...]]:
        """Return a prompt whose placeholders are markers around as many ids as an item has rows, and these rows.

        Items of a kind take the placeholders of this kind in order. A sound of less than a frame has no row: only its markers
        stand in the prompt, as the official processor has it. `budget` bounds the soft tokens of each image that has none of its
        own; None: what the model was made for. `adapter` is the one that the request asks for. Raises RequestError for items
        that can't be read, and unless there is one placeholder an item.
        """
        bodies = {kind: tower.bodies.of(adapter) for kind, tower in self._towers.items()}
        most = self._budget if budget is None else check_budget(budget)
        self._check_counts(ids, items)
        cut = self._cut(items, most, bodies)
        rows = self._encode([piece for pieces in cut for piece in pieces], bodies)
        following = {kind: iter(_of_kind(kind, items, cut)) for kind in self._markers}
        kind_of = {markers.placeholder: kind for kind, markers in self._markers.items()}
        placed, spans = list[int](), list[MediaSpan]()
        for token in ids:
            if (kind := kind_of.get(token)) is None:
                placed.append(token)
                continue
            markers = self._markers[kind]
            for piece in next(following[kind]):
                placed += [*piece.before, markers.begin]
                if piece.soft_tokens:
                    spans.append(MediaSpan(len(placed), piece.digest, rows[piece.digest], is_block=kind != "audio"))
                placed += [*[markers.placeholder] * piece.soft_tokens, markers.end]
        return placed, tuple(spans)

    def _check_counts(self, ids: Sequence[int], items: Sequence[MediaItem]) -> None:
        """Raise RequestError, with every problem, unless every kind has as many items as placeholders."""
        problems = list[str]()
        for kind, markers in self._markers.items():
            given, count = sum(item.kind == kind for item in items), sum(token == markers.placeholder for token in ids)
            if count != given:
                called, piece = KINDS[kind][1], MARKERS[kind][1]
                problems.append(
                    f"{called}: {given} were given, and the prompt has {count} times {piece}; it needs one for each of them"
                )
        if problems:
            raise RequestError(problems[0] if len(problems) == 1 else "media and their places do not match", problems)

    def _cut(self, items: Iterable[MediaItem], budget: int, bodies: Bodies) -> list[Sequence[_Piece]]:
        """Return what a tower reads of every item. Raises RequestError with every problem."""
        found, problems, kinds = list[Sequence[_Piece]](), list[str](), dict[str, None]()
        for item in items:
            try:
                found.append(self._pieces(item, budget, bodies))
            except RequestError as error:
                problems += error.problems
                kinds[KINDS[item.kind][1]] = None
        if problems:
            raise RequestError(f"{' and '.join(kinds)} can't be read", problems)
        return found

    def _pieces(self, item: MediaItem, budget: int, bodies: Bodies) -> Sequence[_Piece]:
        """Return what a tower reads of one item: one piece, or the frames of a video. Raises RequestError.

        A file that comes again, as in the next turn of a conversation, is not decoded again while its rows are kept.
        """
        most = budget if item.budget is None else item.budget
        if not isinstance(item.source, bytes | bytearray | memoryview | str | Path):
            return self._read(item, most, bodies)
        data = read_bytes(item.source, item.name, "", MAX_FILE_BYTES[item.kind])
        changes = bodies[SoundFrames if item.kind == "audio" else ImagePatches].digest
        file = f"{item.kind} {most} {hashlib.sha256(data).hexdigest()} {changes}"
        if (known := self._recall(file)) is not None:
            return known
        found = self._read(replace(item, source=data), most, bodies)
        with self._lock:
            self._files[file] = tuple(replace(piece, content=None) for piece in found)
            while len(self._files) > MOST_FILES:
                self._files.popitem(last=False)
        return found

    def _recall(self, file: str) -> Sequence[_Piece] | None:
        """Return the pieces of a file with their rows; None unless all are known."""
        with self._lock:
            pieces = self._files.get(file)
            if pieces is None or not all(piece.digest in self._rows for piece in pieces):
                return None
            self._files.move_to_end(file)
            return [replace(piece, rows_KD=self._rows[piece.digest]) for piece in pieces]

    def _read(self, item: MediaItem, budget: int, bodies: Bodies) -> list[_Piece]:
        """Decode one item and cut it for its tower. Raises RequestError."""
        source: Any = item.source
        if item.kind == "video":
            frames = cut_video(source, self._patches, item.name)
            # Text around a time never joins its tokens: a digit is a token of its own, and markers are before and after.
            times = [f"{' ' if index else ''}{frame.time} " for index, frame in enumerate(frames)]
            before = [tuple(self._tokenizer.encode(time, bos=False)) for time in times]
            pairs: list[tuple[Content, tuple[int, ...]]] = [(frame.image, ids) for frame, ids in zip(frames, before, strict=True)]
        elif item.kind == "audio":
            pairs = [(cut_sound(source, self._frames, item.name), ())]
        else:
            pairs = [(cut_image(source, budget, self._patches, item.name), ())]
        digests = [_digest(content, bodies[type(content)]) for content, _ in pairs]
        return [_Piece(digest, content.soft_tokens, content, ids) for digest, (content, ids) in zip(digests, pairs, strict=True)]

    def _encode(self, pieces: Sequence[_Piece], bodies: Bodies) -> Mapping[str, Tensor]:
        """Return the rows of pieces by digest; those that are not known are encoded together, each once."""
        known = self._known(pieces)
        with self._lock:
            self.queries += len(pieces)
            self.hits += sum(piece.digest in known for piece in pieces)
        if any(piece.digest not in known for piece in pieces):
            with self._encoding:  # who needs nothing new does not wait
                known = self._known(pieces)  # another thread may have made them meanwhile
                new = {each.digest: each.content for each in pieces if each.digest not in known}
                for kind, tower in self._towers.items():
                    alike: dict[str, Any] = {digest: content for digest, content in new.items() if isinstance(content, kind)}
                    known |= zip(alike, tower.encode(list(alike.values()), bodies[kind]) if alike else (), strict=True)
                with self._lock:
                    for digest in new:
                        self._keep(digest, known[digest])
        with self._lock:
            for piece in pieces:
                self._keep(piece.digest, known[piece.digest])
        return known

    def _known(self, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
        """Return the rows of those pieces that are known."""
        with self._lock:
            known = {each.digest: each.rows_KD for each in pieces if each.rows_KD is not None}
            return known | {each.digest: self._rows[each.digest] for each in pieces if each.digest in self._rows}

    def _keep(self, digest: str, rows_KD: Tensor) -> None:
        """Remember an item's rows as the latest, and forget the oldest beyond the capacity."""
        if digest not in self._rows:
            self._rows[digest] = rows_KD.clone()  # not a view of all items that were encoded with it
            self._size += rows_KD.nbytes
        self._rows.move_to_end(digest)
        while self._size > self._capacity:
            self._size -= self._rows.popitem(last=False)[1].nbytes


def _digest(content: Content, body: TowerBody) -> str:
    """Return what tells rows apart: the content's digest, and that of an adapter's changes where the rows have any."""
    return hashlib.sha256(f"{content.digest} {body.digest}".encode()).hexdigest() if body.digest else content.digest


def _of_kind(kind: str, items: Sequence[MediaItem], cut: Sequence[Sequence[_Piece]]) -> Iterator[Sequence[_Piece]]:
    """Yield the pieces of each item of one kind, in order."""
    for item, pieces in zip(items, cut, strict=True):
        if item.kind == kind:
            yield pieces
