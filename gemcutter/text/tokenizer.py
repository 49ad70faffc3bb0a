"""Text to token ids and back, for the vocabulary that a checkpoint brings.

Owns the reading of `tokenizer.json` and `tokenizer_config.json`, tokenizers made of a vocabulary's parts, the single BOS, and
the bytes that each id stands for. Refuses to know special ids by number: a marker is looked up by its piece, because small
models number them differently.
Decoding is done here rather than by the `tokenizers` library, so that one text and its stream are the same: the library turns a
whole run of byte pieces into U+FFFD when one of them is wrong, which nobody can do before the run has ended.
Read `reply.py` next (ids to text while they arrive), or `chat.py` (conversations to prompts).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcutter.errors import CheckpointError, RequestError
from gemcutter.sidecar.small_file import read_object, shown
from gemcutter.sidecar.tokenizer_json import MARKER, add_config_tokens, check_kind
from gemcutter.text.bpe import BYTES, Bpe, PieceFinder, by_merges, by_scores, fits, read_bpe

if TYPE_CHECKING:  # the library is imported where it is needed
    import tokenizers

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
BOS = "<bos>"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A Gemma tokenizer gives these back unchanged: leading spaces, a capital, an accent, an emoji (bytes, in small vocabularies).
PROBE = "  Probe é🙂\n"
LONG_TEXT = 1 << 16  # characters from which on the library is worth the seconds that it takes to be made


class Tokenizer:
    """Encode and decode text with one vocabulary; safe to share between threads.

    `special_tokens` maps the attribute names of tokenizer_config.json (`bos_token`, `eot_token`, ...) to pieces; `special_ids`
    holds every id that is a marker and not text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | Callable[[], tokenizers.Tokenizer],
        special_tokens: Mapping[str, str],
        *,
        origin: str = "tokenizer.json",
        literals: Sequence[str] | None = None,
        unused: Iterable[int] = (),
        quick: tuple[Bpe, frozenset[int]] | None = None,
        num_ids: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        """Take over `backend`; its truncation and padding are switched off. `literals` are the added tokens that are
        text (None: those that nothing marks as more), `unused` the ids of pieces that stand for nothing.

        With `quick`, an encoder of the same vocabulary and its special ids, `backend` may be a function and is called when a text
        is long. `num_ids` is how many ids the model has: those without a piece add no text. `notes` say what the files disagree
        on. Raises CheckpointError, naming `origin`, when the vocabulary has no BOS or is not of Gemma's kind.
        """
        self._make, self._literals = backend, literals
        self.special_tokens: dict[str, str] = {"bos_token": BOS, **special_tokens}
        self._bpe: Bpe | None = None if quick is None else quick[0]
        flagged = self._library.special_ids if quick is None else quick[1]
        self._ids: Mapping[str, int] = self._library.backend.get_vocab() if self._bpe is None else self._bpe.ids
        self._pieces = {id: piece for piece, id in self._ids.items()}
        named = (self.id_of(piece) for piece in self.special_tokens.values())
        self.special_ids: frozenset[int] = flagged | {id for id in named if id is not None} | frozenset(unused)
        self.markers: frozenset[str] = self._library.markers if self._bpe is None else self._bpe.markers
        self._marker_finder = PieceFinder(self.markers)
        self.vocab_size: int = len(self._ids)
        self.num_ids: int = max(num_ids, max(self._pieces, default=-1) + 1)
        self.notes: tuple[str, ...] = tuple(notes)
        self.bos_id: int = self._find_bos(origin)
        self._check_round_trip(origin)

    @cached_property
    def _library(self) -> _Library:
        return _Library(self._make() if callable(self._make) else self._make, self._literals, self.special_tokens.values())

    @classmethod
    def load(cls, folder: Path, num_ids: int = 0) -> Tokenizer:
        """Read tokenizer.json, and tokenizer_config.json if there is one, from a checkpoint's folder.

        Tokens that only tokenizer_config.json lists are added, as transformers does. Raises CheckpointError, naming the file and
        the remedy, when a file is missing, damaged or of another kind.
        """
        path = folder / TOKENIZER
        options = read_object(folder, TOKENIZER_CONFIG) or {}

        def read() -> tuple[dict[str, Any], list[str]]:
            raw = read_object(folder, TOKENIZER)
            if raw is None:
                raise CheckpointError(f"{path} is missing: copy tokenizer.json from the original checkpoint into this folder")
            check_kind(raw, str(path))
            return add_config_tokens(raw, options)

        def backend() -> tokenizers.Tokenizer:
            import tokenizers

            raw, _ = read()
            for setting in ("truncation", "padding", "post_processor", "decoder"):  # which are this module's business
                raw[setting] = None
            try:
                made = tokenizers.Tokenizer.from_str(json.dumps(raw))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # hostile files make the library panic, and its panic is no Exception
                raise CheckpointError(f"{path} can't be read ({error}): download the file again") from error
            moved = [token["content"] for token in raw["added_tokens"] if made.token_to_id(token["content"]) != token["id"]]
            if moved:
                raise CheckpointError(f"{path}: {shown(moved)} can't have the ids that the files give them; download them again")
            return made

        raw, notes = read()
        named = special_tokens_of(options)
        quick = read_bpe(raw, [BOS, *named.values()])
        del raw
        return cls(backend if quick else backend(), named, origin=str(path), quick=quick, num_ids=num_ids, notes=notes)

    @classmethod
    def build(
        cls,
        pieces: Sequence[str],
        merges: Sequence[str] | Mapping[str, float],
        *,
        markers: Iterable[int],
        literals: Iterable[int] = (),
        unused: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "vocabulary",
        num_ids: int = 0,
    ) -> Tokenizer:
        """Make a tokenizer of Gemma's kind from its parts: pieces by id, and merges in the order of their rank.

        Merges are spelled "left right"; a vocabulary that has none gives the scores of its plain pieces. `markers` are ids that
        stand for no text; `literals` are found whole in a text before anything is merged; `unused` and `num_ids` are those of a
        tokenizer. Raises CheckpointError, naming `origin`, for parts that make no tokenizer.
        """
        vocabulary = dict(zip(pieces, range(len(pieces)), strict=True))
        if len(vocabulary) != len(pieces):
            raise CheckpointError(f"{origin}: {len(pieces) - len(vocabulary)} pieces of the vocabulary are there twice")
        texts, special = [pieces[id] for id in literals], [pieces[id] for id in markers]

        def backend() -> tokenizers.Tokenizer:
            import tokenizers
            from tokenizers import models, normalizers

            pairs = merges_of(merges) if isinstance(merges, Mapping) else [_pair(merge) for merge in merges]
            try:
                model = models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
                made = tokenizers.Tokenizer(model)
                made.normalizer = normalizers.Replace(" ", "▁")
                made.add_tokens(_added(texts, special=False))
                made.add_special_tokens(_added(special, special=True))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic, as in `load`
                raise CheckpointError(f"{origin} makes no tokenizer ({error}): download the file again") from error
            return made

        quick = None
        if set(BYTES) <= vocabulary.keys() and (isinstance(merges, Mapping) or fits(vocabulary, merges)):
            rank = by_scores(merges, vocabulary) if isinstance(merges, Mapping) else by_merges(merges)
            quick = Bpe(vocabulary, rank, [*texts, *special], texts), frozenset(vocabulary[piece] for piece in special)
        made = backend if quick else backend()
        named = special_tokens or {}
        return cls(made, named, origin=origin, literals=texts, unused=unused, quick=quick, num_ids=num_ids)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the ids of `text`; markers in it (`<|turn>`) become their ids, as prompts from a template need.

        With `bos` the result starts with exactly one BOS, also when the text brings it along; without it none is added.
        Raises RequestError for text that is not valid Unicode.
        """
        ids = self._encode(text, with_markers=True)
        return ids if not bos or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of untrusted `text`: what looks like a marker stays text, and no BOS is added.

        Raises RequestError for text that is not valid Unicode.
        """
        return self._encode(text, with_markers=False)

    def split_markers(self, text: str) -> list[int | str]:
        """Return the ids of the markers in `text` and the text between them, in order; joined they spell the text again."""
        parts, start = list[int | str](), 0
        for place, piece in self._marker_finder.find(text):
            parts += [text[start:place]] if start < place else []
            parts.append(self._ids[piece])
            start = place + len(piece)
        return [*parts, text[start:]] if start < len(text) else parts

    def encode_parts(self, parts: Sequence[int | str]) -> list[int]:
        """Return the ids of markers and of the texts between them; what looks like a marker in a text stays text.

        Of a text that `split_markers` has split, these are the ids that `encode` gives. Raises RequestError for text that is not
        valid Unicode.
        """
        is_long = sum(len(part) for part in parts if isinstance(part, str)) >= LONG_TEXT
        ids = list[int]()
        for part in parts:
            ids += self._encode(part, with_markers=False, is_long=is_long) if isinstance(part, str) else [part]
        return ids

    def _encode(self, text: str, *, with_markers: bool, is_long: bool = False) -> list[int]:
        try:
            if self._bpe is not None and len(text) < LONG_TEXT and not is_long:
                return self._bpe.encode(text, with_markers=with_markers)
            backend = self._library.backend if with_markers else self._library.markerless
            return backend.encode(text, add_special_tokens=False).ids
        except (TypeError, AttributeError, UnicodeEncodeError) as error:  # how a lone surrogate is refused, and what is no text
            raise RequestError(
                "the text can't be encoded: expected a string of valid Unicode, without lone surrogates"
            ) from error

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of `ids`, with the markers printed or, without `special`, left out; bad UTF-8 becomes U+FFFD.

        Raises RequestError for ids outside the vocabulary.
        """
        shown = (id for id in ids if special or id not in self.special_ids)
        return b"".join(map(self.bytes_of, shown)).decode("utf-8", errors="replace")

    def piece(self, id: int) -> str:
        """Return the vocabulary's own spelling of `id`: `▁` for a space, `<0xNN>` for a byte, nothing for an id without a piece.

        Raises RequestError for an id outside the vocabulary.
        """
        piece = self._pieces.get(id) if type(id) is int else None
        if piece is not None:
            return piece
        if type(id) is int and 0 <= id < self.num_ids:  # a row that pads the embeddings to a round number
            return ""
        raise RequestError(f"token id {id!r} is not in the vocabulary: expected an integer from 0 to {self.num_ids - 1}")

    def bytes_of(self, id: int) -> bytes:
        """Return the UTF-8 bytes that `id` adds to a text; a byte piece adds one, maybe a part of a character.

        Raises RequestError for an id outside the vocabulary.
        """
        piece = self.piece(id)
        byte = BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    def id_of(self, piece: str) -> int | None:
        """Return the id of `piece`, or None when the vocabulary has no such piece."""
        return self._ids.get(piece)

    def to_json(self) -> str:
        """Return the tokenizer as a tokenizer.json holds it."""
        return str(self._library.backend.to_str())

    def _find_bos(self, origin: str) -> int:
        piece = self.special_tokens["bos_token"]
        bos_id = self.id_of(piece)
        if bos_id is None:
            raise CheckpointError(
                f"{origin} has no BOS token: expected the piece {piece!r}; use the tokenizer.json of a Gemma 4 checkpoint"
            )
        return bos_id

    def _check_round_trip(self, origin: str) -> None:
        """Refuse tokenizers of another kind (byte-level, lower-casing, without byte fallback) before they garble a text."""
        try:
            found = self.decode(self.encode(PROBE, bos=False), special=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic, as in `load`
            raise CheckpointError(f"{origin} can't encode a test text ({error}): download the file again") from error
        if found != PROBE:
            raise CheckpointError(
                f"{origin} is not a tokenizer of Gemma's kind: the test text {PROBE!r} came back as {found!r}; "
                "use the tokenizer.json of a Gemma 4 checkpoint"
            )


def special_tokens_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a tokenizer_config.json names, by attribute.

    A token is a string or a serialised object with its text in `content`; named extra tokens count as attributes too.
    """
    extra = options.get("extra_special_tokens")
    entries = {**(extra if isinstance(extra, dict) else {}), **options}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Derive the merges of a vocabulary that has a score for each piece instead, best first.

    Of two neighbours, those are merged whose joint piece has the highest score: every way to put a piece together of two others
    is a merge of that piece's rank. Source: SentencePiece's BPE.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _added(pieces: Iterable[str], *, special: bool) -> list[tokenizers.AddedToken]:
    import tokenizers

    return [tokenizers.AddedToken(piece, normalized=False, special=special) for piece in pieces]


class _Library:
    """The library's tokenizer, and one over the same vocabulary (shared, not copied) that finds no added tokens but literals."""

    def __init__(self, backend: tokenizers.Tokenizer, literals: Sequence[str] | None, markers: Iterable[str]) -> None:
        import tokenizers

        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.markerless = tokenizers.Tokenizer(backend.model)
        self.markerless.normalizer = backend.normalizer
        self.markerless.pre_tokenizer = backend.pre_tokenizer
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        if literals is None:
            known = {*markers, *(token.content for token in added.values() if token.special)}
            contents = [token.content for token in added.values()]
            literals = [piece for piece in contents if piece not in known and not MARKER.fullmatch(piece)]
        self.markers = frozenset(token.content for token in added.values()) - frozenset(literals)
        own = [piece for piece in literals if backend.model.token_to_id(piece) is not None]  # a new piece would get another id
        self.markerless.add_tokens(_added(own, special=False))


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
