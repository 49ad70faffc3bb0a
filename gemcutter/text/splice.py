"""The ids of replies that this process generated, for prompts that hold them again.

A model may spell a text with other pieces than the encoder does. When its reply comes back as history, encoding it anew would
give other ids, and nothing computed for the reply could be used. Owns a bounded store of conversations as ids, and finds the
longest whose text, markers included, is how a prompt begins. Where a template changed the text (a thought dropped, white space
trimmed), nothing fits and the turn is encoded anew. Refuses to know templates. Read `chat.py` for who asks.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from gemcutter.text.tokenizer import Tokenizer

CAPACITY = 16 << 20  # bytes
ENTRY = 256  # bytes of an entry beside its ids, about
MARK = b"\xff"  # begins a marker; no byte of a text in UTF-8


class ReplyStore:
    """Conversations with this process's own replies, the least used forgotten first; safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, capacity_bytes: int = CAPACITY) -> None:
        self._tokenizer, self._capacity, self._size = tokenizer, capacity_bytes, 0
        self._markers = frozenset(id for piece in tokenizer.markers if (id := tokenizer.id_of(piece)) is not None)
        self._entries: OrderedDict[tuple[int, bytes], array[int]] = OrderedDict()  # by length and digest of the text's form
        self._lengths: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def remember(self, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> None:
        """Keep a conversation and the reply to it. Raises RequestError for ids outside the vocabulary."""
        ids = array("i", [*prompt_ids, *reply_ids])
        pieces = [self._form(id) for id in ids]
        if any(id not in self._markers and MARK in piece for id, piece in zip(ids, pieces, strict=True)):
            return  # bytes that are no text, and could pass for a marker
        form = b"".join(pieces)
        key, cost = (len(form), _digest(form)), ids.itemsize * len(ids) + ENTRY
        if cost > self._capacity or not reply_ids:
            return
        with self._lock:
            self._drop(key)
            self._entries[key] = ids
            self._lengths[key[0]] += 1
            self._size += cost
            while self._size > self._capacity:
                self._drop(next(iter(self._entries)))

    def splice(self, parts: Sequence[int | str]) -> tuple[list[int], list[int | str]]:
        """Return the ids of the longest kept conversation with which a prompt begins, and the parts of the prompt after it.

        Parts are markers and texts, as `Tokenizer.split_markers` gives them.
        """
        pieces = [self._form(part) if isinstance(part, int) else part.encode("utf-8", "surrogatepass") for part in parts]
        form = b"".join(pieces)
        with self._lock:
            lengths = sorted(length for length in self._lengths if length <= len(form))
        running, done, keys = blake2b(digest_size=16), 0, list[tuple[int, bytes]]()
        for length in lengths:
            running.update(form[done:length])
            done = length
            keys.append((length, running.copy().digest()))
        for key in reversed(keys):
            with self._lock:
                ids = self._entries.get(key)
                if ids is not None:
                    self._entries.move_to_end(key)
            if ids is not None and (rest := _after(parts, pieces, key[0])) is not None:
                return list(ids), rest
        return [], list(parts)

    def _form(self, id: int) -> bytes:
        return MARK + id.to_bytes(4, "little") if id in self._markers else self._tokenizer.bytes_of(id)

    def _drop(self, key: tuple[int, bytes]) -> None:
        ids = self._entries.pop(key, None)
        if ids is None:
            return
        self._size -= ids.itemsize * len(ids) + ENTRY
        self._lengths[key[0]] -= 1
        if not self._lengths[key[0]]:
            del self._lengths[key[0]]


def _digest(form: bytes) -> bytes:
    return blake2b(form, digest_size=16).digest()


def _after(parts: Sequence[int | str], pieces: Sequence[bytes], length: int) -> list[int | str] | None:
    """Return what follows the first bytes of parts; None where these end within a character."""
    for place, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
        if length < len(piece):
            try:
                rest = piece[length:].decode("utf-8", "surrogatepass") if length and isinstance(part, str) else part
            except UnicodeDecodeError:
                return None
            return [rest, *parts[place + 1 :]]
        length -= len(piece)
    return []
