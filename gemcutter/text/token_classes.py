"""What the ids of a vocabulary stand for, seen from afar: white space, data, words.

Owns the sorting of a whole vocabulary, which takes a fraction of a second: keep what comes back. Refuses to know what it is for.
Read `tokenizer.py` for the bytes behind an id, `engine/watchdog.py` for who needs to tell a table from a loop.
"""

from __future__ import annotations

from gemcutter.text.tokenizer import Tokenizer


def blank_and_data_ids(tokenizer: Tokenizer) -> tuple[frozenset[int], frozenset[int]]:
    """Return the ids that are white space alone, and those of ASCII without letters: numbers, punctuation, white space.

    Markers and parts of characters are neither.
    """
    blank, data = set[int](), set[int]()
    for token in range(tokenizer.num_ids):
        found = b"" if token in tokenizer.special_ids else tokenizer.bytes_of(token)
        if found and not found.strip():
            blank.add(token)
        if found.isascii() and found and not any(map(str.isalpha, found.decode("ascii"))):
            data.add(token)
    return frozenset(blank), frozenset(data)
