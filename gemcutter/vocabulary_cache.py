"""Vocabularies on disk: what one load has read of a checkpoint's tokenizer, the next takes as it is.

Half a million merges take longer to read and check than kept weights to be mapped. Owns one small file a checkpoint, beside its
repacked weights: pieces, markers, and the order of the merges in place of the merges themselves. Nothing depends on it: it names
the files that it was made of as they were, and one that is damaged, of another version or of older files counts as none. Refuses
to keep a vocabulary that is small, or whose merges have no such order. Read `text_assets.py` for who asks,
`checkpoint/load/packed_weight_files.py` for the folder.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import gguf
from gemcutter.checkpoint.load.packed_weight_files import (
    VOCABULARY_SUFFIX,
    Abandoned,
    check_running,
    file_identity,
    kept_path,
    mark_used,
    pack_header,
    read_header,
    write_kept,
)
from gemcutter.text.bpe import BpeParts
from gemcutter.text.merge_order import MergeOrder, find_order
from gemcutter.text.tokenizer_parts import TOKENIZER, TOKENIZER_CONFIG, TokenizerParts

if TYPE_CHECKING:  # the library is imported where it is needed
    import tokenizers

VERSION = 1  # of what the file holds and of how it was read
LEAST_MERGES = 100_000  # of a vocabulary that is kept: smaller ones are read in no time
_PAUSE_S = 1e-5  # lets other threads have Python's lock


@dataclass(frozen=True, slots=True)
class VocabularyCache:
    """Where a checkpoint's vocabulary is kept, and what identifies it."""

    path: Path
    key: Mapping[str, Any]
    is_asked: bool = False  # by the user

    @classmethod
    def of(cls, source: Source, folder: Path | None = None, is_asked: bool = False) -> VocabularyCache | None:
        """Return where a checkpoint's vocabulary belongs, in `folder` or in the user's cache; None where it has no files."""
        files = [source.files[0]] if gguf.sniff(source) else []  # which may have no vocabulary: then the others count
        files += [path for name in (TOKENIZER, TOKENIZER_CONFIG) if os.path.lexists(path := source.folder / name)]
        try:
            there = [list(file_identity(path)) for path in files]
        except OSError:
            return None
        if not there:
            return None
        key = {"version": VERSION, "quant": None, "files": there}
        return cls(kept_path(source.path, VOCABULARY_SUFFIX, folder), key, is_asked)

    def read(self, backend: Callable[[], tokenizers.Tokenizer]) -> TokenizerParts | None:
        """Return what is kept, and `backend` with it; None where nothing is, or not of the files as they are now."""
        try:
            with open(self.path, "rb") as file:
                content = read_header(file)
            if content["key"] != self.key:
                return None
            parts = _parts(content, backend)
        except (OSError, struct.error, ValueError, KeyError, TypeError):  # whatever it is, it is not ours
            return None
        mark_used(self.path)
        return parts

    def write(self, parts: TokenizerParts) -> threading.Thread | None:
        """Keep a vocabulary for later loads, in a thread of its own; a program waits for it when it ends if it was asked for.

        Returns None where it is not worth it.
        """
        bpe = parts.bpe
        if bpe is None or not isinstance(bpe.merges, list) or len(bpe.merges) < LEAST_MERGES:
            return None
        thread = threading.Thread(target=self._write, args=(parts, bpe, bpe.merges), name="vocabulary cache")
        thread.start()
        return thread

    def _write(self, parts: TokenizerParts, bpe: BpeParts, merges: list[str]) -> None:
        def pause() -> None:
            time.sleep(_PAUSE_S)
            if not self.is_asked:
                check_running()

        try:
            order = find_order(bpe.ids, merges, pause)
        except Abandoned:
            return
        if order is not None:
            content = pack_header(json.dumps({"key": self.key} | _content(parts, bpe, order), ensure_ascii=False).encode())
            write_kept("the vocabulary is", self.path, len(content), iter([memoryview(content)]), self.is_asked)


def _content(parts: TokenizerParts, bpe: BpeParts, order: MergeOrder) -> dict[str, Any]:
    pieces: list[str | None] = [None] * (max(bpe.ids.values()) + 1)
    for piece, id in bpe.ids.items():
        pieces[id] = piece
    return {
        "pieces": pieces,
        "irregular": sorted(order.irregular),
        "keys": [[*pair, *key] for pair, key in order.keys.items()],
        "added": bpe.added,
        "texts": bpe.literals,
        "special": sorted(bpe.special),
        "special_tokens": parts.special_tokens,
        "origin": parts.origin,
        "literals": parts.literals,
        "unused": parts.unused,
        "notes": parts.notes,
    }


def _parts(content: Mapping[str, Any], backend: Callable[[], tokenizers.Tokenizer]) -> TokenizerParts:
    pieces = content["pieces"]
    ids = dict(zip(pieces, range(len(pieces)), strict=True))
    ids.pop(None, None)
    keys = {(left, right): (a, b, c) for left, right, a, b, c in content["keys"]}
    order = MergeOrder(frozenset(content["irregular"]), keys)
    bpe = BpeParts(ids, order, content["added"], content["texts"], frozenset(content["special"]))
    return TokenizerParts(
        backend,
        content["special_tokens"],
        content["origin"],
        bpe,
        content["literals"],
        content["unused"],
        content["notes"],
    )
