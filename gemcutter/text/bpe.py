"""Byte-pair encoding in plain Python: ready at once, where the `tokenizers` library takes seconds to take a vocabulary in.

Owns the encoding of Gemma's kind of vocabulary, id for id as the library does it: added tokens are cut out of the text, spaces
become ▁, characters that are no piece become bytes, and neighbours are merged in the order of their rank. Refuses to know files
and prompts. Slower than the library where texts are long, see `tokenizer.py` for who chooses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

from gemcutter.sidecar.tokenizer_json import MARKER, NORMALIZER, PRE_TOKENIZERS
from gemcutter.text.merge_order import MergeOrder

Rank = Any  # numbers or tuples of them, all of one kind; the smallest is merged first
RankOf = Callable[[str, str], Rank | None]

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
MODEL = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "byte_fallback": True, "ignore_merges": False}
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@dataclass(frozen=True, slots=True)
class BpeParts:
    """What an encoder is made of: pieces with ids, merges, and added tokens.

    `merges` are "left right" each, best first, or each piece's score, or the order of merges that are not there themselves.
    `literals` are the added tokens that are plain text, `special` the ids that the vocabulary marks as no text.
    """

    ids: Mapping[str, int]
    merges: Sequence[str] | Mapping[str, float] | MergeOrder
    added: Sequence[str]
    literals: Sequence[str] = ()
    special: frozenset[int] = frozenset()

    def ranker(self) -> RankOf:
        """Return the function that ranks two neighbours, None where they are no merge."""
        if isinstance(self.merges, MergeOrder):
            return self.merges.ranker(self.ids)
        return by_scores(self.merges, self.ids) if isinstance(self.merges, Mapping) else by_merges(self.merges)


class Bpe:
    """An encoder. The added tokens are cut out of a text: all of them, or those that are plain text."""

    def __init__(self, parts: BpeParts) -> None:
        self.ids, self._rank = parts.ids, parts.ranker()
        self._added, self._literals = PieceFinder(parts.added), PieceFinder(parts.literals)

    @property
    def markers(self) -> frozenset[str]:
        """Return the added tokens that are no plain text."""
        return self._added.pieces - self._literals.pieces

    def encode(self, text: str, *, with_markers: bool) -> list[int]:
        """Return the ids of a text; without markers only literals are cut out of it. Raises UnicodeEncodeError for surrogates."""
        found, start = list[int](), 0
        text.encode()
        for place, piece in (self._added if with_markers else self._literals).find(text):
            found += self._encode_run(text[start:place])
            found.append(self.ids[piece])
            start = place + len(piece)
        return found + self._encode_run(text[start:])

    def _encode_run(self, text: str) -> list[int]:
        pieces = list(self._characters(text.replace(" ", "▁")))
        return [self.ids[piece] for piece in self._merged(pieces)]

    def _characters(self, text: str) -> Iterator[str]:
        for character in text:
            if character in self.ids:
                yield character
            else:
                yield from (BYTES[byte] for byte in character.encode())

    def _merged(self, pieces: list[str]) -> list[str]:
        """Merge neighbours, smallest rank first and of those the first in the text.

        A merged piece stands at the place of its left half, "" at that of its right half. An entry of the queue is stale if what
        stands at its place no longer makes up the piece that it was for.
        """
        count = len(pieces)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        queue = list[tuple[Rank, int, str]]()

        def offer(place: int) -> tuple[Rank, int, str] | None:
            left, right = pieces[place], pieces[after[place]]
            rank = self._rank(left, right)
            return None if rank is None else (rank, place, left + right)

        queue = [entry for place in range(count - 1) if (entry := offer(place)) is not None]
        heapify(queue)
        while queue:
            _, place, joint = heappop(queue)
            right = after[place]
            if not pieces[place] or right == count or pieces[place] + pieces[right] != joint or offer(place) is None:
                continue
            pieces[place], pieces[right] = joint, ""
            after[place] = after[right]
            if after[place] < count:
                before[after[place]] = place
            for neighbour in (before[place], place):
                if neighbour >= 0 and after[neighbour] < count and (entry := offer(neighbour)) is not None:
                    heappush(queue, entry)
        return [piece for piece in pieces if piece]


def by_merges(merges: Sequence[str]) -> RankOf:
    """Rank by a list of merges, "left right" each, best first. No piece of a text holds a space."""
    ranks = dict(zip(merges, range(len(merges)), strict=True))
    return lambda left, right: ranks.get(f"{left} {right}")


def by_scores(scores: Mapping[str, float], ids: Mapping[str, int]) -> RankOf:
    """Rank by the joint piece's score, highest first, as `tokenizer.merges_of` would list the merges."""

    def rank(left: str, right: str) -> tuple[float, int, int] | None:
        score = scores.get(left + right)
        if score is None or left not in scores or right not in scores:
            return None
        return -score, ids[left + right], -len(left)

    return rank


def read_bpe(raw: Mapping[str, Any], markers: Iterable[str] = ()) -> BpeParts | None:
    """Take a tokenizer.json for its encoding; None unless all of it is as Gemma has it.

    `markers` are added tokens that are no text, whatever their flag in the file says.
    """
    model, added = raw.get("model"), raw.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return None
    ids, merges = model.get("vocab"), model.get("merges")
    is_usual = (
        raw.get("normalizer") == NORMALIZER
        and raw.get("pre_tokenizer") in PRE_TOKENIZERS
        and all(model.get(key) == value for key, value in MODEL.items())
        and not any(model.get(key) for key in AFFIXES)
        and all(token.get(key) is value for token in added for key, value in ADDED.items())
    )
    if not is_usual or not isinstance(ids, dict) or not isinstance(merges, list) or not set(BYTES) <= ids.keys():
        return None
    spelled = [" ".join(merge) if isinstance(merge, list) and len(merge) == 2 else merge for merge in merges]
    contents = {token.get("content"): token.get("id") for token in added}
    if not fits(ids, spelled) or any(not piece or ids.get(piece, id) != id for piece, id in contents.items()):
        return None
    if new := {piece: id for piece, id in contents.items() if piece not in ids}:  # a vocabulary that was extended
        if set(new.values()) & set(ids.values()) or len(set(new.values())) < len(new):
            return None
        ids = {**ids, **new}
    special = frozenset(token["id"] for token in added if token.get("special"))
    known = {*markers, *(token["content"] for token in added if token.get("special"))}
    literals = [piece for piece in contents if piece not in known and not MARKER.fullmatch(piece)]
    return BpeParts(ids, spelled, list(contents), literals, special)


def fits(ids: Mapping[str, Any], merges: Sequence[Any]) -> bool:
    """Return whether ids are numbers and merges spell pieces, "left right" each, all of them in the vocabulary."""
    try:
        return set(map(type, ids.values())) <= {int} and all(
            left in ids and right in ids and left + right in ids for left, right in (merge.split(" ") for merge in merges)
        )
    except (AttributeError, ValueError):
        return False


class PieceFinder:
    """Finds pieces in a text, of those that begin at one place the longest.

    A pattern of all 6,500 added tokens would do the same, but takes longer to compile than all else here takes to get ready.
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces = frozenset(piece for piece in pieces if piece)
        lengths: dict[str, set[int]] = {}
        for piece in self.pieces:
            lengths.setdefault(piece[0], set()).add(len(piece))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{''.join(map(re.escape, self._lengths))}]") if lengths else None

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Return the places and pieces, none of which overlap, in order."""
        at = 0
        while self._first is not None and (match := self._first.search(text, at)):
            at = match.start()
            piece = next((text[at : at + n] for n in self._lengths[match[0]] if text[at : at + n] in self.pieces), None)
            if piece is not None:
                yield at, piece
            at += len(piece or match[0])
