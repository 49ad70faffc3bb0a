"""Text to token ids and back, for the vocabulary that a checkpoint brings.

Owns the single BOS, what is a marker and what is text, and the bytes that each id stands for. Refuses to know files
(`tokenizer_parts.py`), and special ids by number: a marker is looked up by its piece, because small
models number them differently.
Decoding is done here rather than by the `tokenizers` library, so that one text and its stream are the same: the library turns a
whole run of byte pieces into U+FFFD when one of them is wrong, which nobody can do before the run has ended.
Read `reply.py` next (ids to text while they arrive), or `chat.py` (conversations to prompts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gemcutter.errors import CheckpointError, RequestError
from gemcutter.sidecar.tokenizer_json import MARKER
from gemcutter.text.bpe import Bpe, PieceFinder
from gemcutter.text.tokenizer_parts import BOS, TokenizerParts, added_tokens, read_parts

if TYPE_CHECKING:  # the library is imported where it is needed
    import tokenizers

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A Gemma tokenizer gives these back unchanged: leading spaces, a capital, an accent, an emoji (bytes, in small vocabularies).
PROBE = "  Probe é🙂\n"
LONG_TEXT = 1 << 16  # characters from which on the library is worth the seconds that it takes to be made


class Tokenizer:
    """Encode and decode text with one vocabulary; safe to share between threads.

    `special_tokens` maps the attribute names of tokenizer_config.json (`bos_token`, `eot_token`, ...) to pieces; `special_ids`
    holds every id that is a marker and not text.
    """

    def __init__(self, parts: TokenizerParts, num_ids: int = 0) -> None:
        """Take over parts; a library's tokenizer loses its truncation and padding.

        `num_ids` is how many ids the model has: those without a piece add no text. Raises CheckpointError, naming the parts'
        origin, when the vocabulary has no BOS or is not of Gemma's kind.
        """
        self._make, self._literals = parts.backend, parts.literals
        self.special_tokens: dict[str, str] = {"bos_token": BOS, **parts.special_tokens}
        self._bpe: Bpe | None = None if parts.bpe is None else Bpe(parts.bpe)
        flagged = self._library.special_ids if parts.bpe is None else parts.bpe.special
        self._ids: Mapping[str, int] = self._library.backend.get_vocab() if self._bpe is None else self._bpe.ids
        self._pieces = {id: piece for piece, id in self._ids.items()}
        named = (self.id_of(piece) for piece in self.special_tokens.values())
        self.special_ids: frozenset[int] = flagged | {id for id in named if id is not None} | frozenset(parts.unused)
        self.markers: frozenset[str] = self._library.markers if self._bpe is None else self._bpe.markers
        self._marker_finder = PieceFinder(self.markers)
        self.vocab_size: int = len(self._ids)
        self.num_ids: int = max(num_ids, max(self._pieces, default=-1) + 1)
        self.notes: tuple[str, ...] = tuple(parts.notes)
        self.bos_id: int = self._find_bos(parts.origin)
        self._check_round_trip(parts.origin)

    @cached_property
    def _library(self) -> _Library:
        return _Library(self._make() if callable(self._make) else self._make, self._literals, self.special_tokens.values())

    @classmethod
    def load(cls, folder: Path, num_ids: int = 0) -> Tokenizer:
        """Read the tokenizer of a checkpoint's folder. Raises CheckpointError, as `read_parts` and a tokenizer do."""
        return cls(read_parts(folder), num_ids)

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
        self.markerless.add_tokens(added_tokens(own, special=False))
