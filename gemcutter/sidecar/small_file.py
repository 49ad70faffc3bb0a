"""Small files and headers: bytes that are read whole, JSON above all.

Owns the limits on what is read and parsed (bytes, and marks of JSON structure, before any of it is parsed), the strict reading
of a JSON object (each key once, no nesting bombs), and the form in which a message may show a stranger's words. Refuses to know
what the objects mean. Read `checkpoint/container/source.py` for files beside weights, `text/tokenizer.py` for a tokenizer's.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcutter.errors import CheckpointError

SMALL_BYTES = 100_000_000  # the safetensors library's own limit for headers; the largest real one is a few MB
MOST_MARKS = 4_000_000  # commas and brackets of a header: twelve a tensor, so some 300,000 tensors


@dataclass(frozen=True, slots=True)
class Limits:
    """The most bytes of a file, and the most commas and opening brackets in it: each may become an object of 60 bytes or more."""

    size: int = SMALL_BYTES
    marks: int = MOST_MARKS


SETTINGS = Limits(16 << 20, 1_000_000)  # of configs and the like; real ones have at most some 100 KB
LIMITS: Mapping[str, Limits] = {
    "tokenizer.json": Limits(64 << 20, 8_000_000),  # the released one has 32 MB
    "model.safetensors.index.json": Limits(),
    "chat_template.jinja": Limits(4 << 20),
}


def limits_of(name: str) -> Limits:
    """Return the limits of a file that lies beside weights."""
    return LIMITS.get(name, SETTINGS)


# Hostile headers hold megabytes where a word belongs, and control characters: messages show a clipped, escaped form.
_clipped = reprlib.Repr()
_clipped.maxstring = _clipped.maxlong = 120


def shown(value: object) -> str:
    """Return `value` as a message may show it: clipped, and with unprintable characters escaped."""
    return _clipped.repr(value)


def insist_on_file(file: Path) -> None:
    """Raise ValueError for what is no regular file."""
    if not os.path.isfile(file):  # opening a pipe would wait forever
        raise ValueError("is not a file, or is a link to nothing")


def read_small(file: Path) -> bytes:
    """Return a file's bytes. Raises ValueError, saying what is wrong with the file, also where it can't be read."""
    most = limits_of(file.name).size
    try:
        insist_on_file(file)
        if os.path.getsize(file) > most:
            raise ValueError(f"takes {os.path.getsize(file):,} bytes, above {most:,}")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}") from error


def read_beside(folder: Path, name: str) -> bytes | None:
    """Return the bytes of a small file in a folder, None where there is no such file; a link to nothing is not none.

    Raises ValueError, saying what is wrong.
    """
    return read_small(folder / name) if os.path.lexists(folder / name) else None


def parse_object(raw: bytes, what: str, limits: Limits | None = None) -> dict[str, Any]:
    """Return the JSON object in `raw`. Raises ValueError whatever the bytes are; `what` names them in its message."""
    repeated: list[str] = []
    most = (limits or Limits()).marks
    if len(raw) > most and (marks := sum(map(raw.count, (b",", b"[", b"{")))) > most:
        raise ValueError(f"{what} has {marks:,} commas and brackets, above {most:,}: too many for what it should hold")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            repeated.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return members

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{what} is not valid UTF-8 at line {line} (byte {error.start:,})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{what} nests too deeply to be a checkpoint's") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{what} is not acceptable JSON: {error}") from None
    if repeated:
        raise ValueError(f"{what} repeats the key{'s' if len(repeated) > 1 else ''} {shown(repeated)}")
    if not isinstance(parsed, dict):
        raise ValueError(f"{what} holds {shown(parsed)} at line 1, not a JSON object")
    return parsed


def read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the JSON object in a file of a folder, None where there is no such file.

    Raises CheckpointError, naming the file, when it can't be read or holds anything but an object.
    """
    try:
        raw = read_beside(folder, name)
        return None if raw is None else parse_object(raw, "the file", limits_of(name))
    except ValueError as error:
        raise CheckpointError(f"{folder / name} can't be read ({error}): download the file again") from error
