"""The folder of repacked weights: which files lie in it, what they were made of, and how they are removed.

Owns the folder, its bounds, the names and the head of its files; imports no torch, so that they are listed at once. Refuses to
know weights: `packed_weight_cache.py` writes and maps these files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX, UNFINISHED = ".packed", ".unfinished"
HEAD = struct.Struct("<8s32sQ")  # magic, digest of the header, its length
MAGIC = b"GCPACKED"
_MAX_HEADER_BYTES = 1 << 26
LEAST_FREE = 0.1  # of the disk, which stays free
MOST_SHARE = 0.1  # of the disk, which the folder may take


def user_folder() -> Path:
    """Return the folder for repacked weights, which may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemcutter" / "packed-weights"


def read_header(file: BinaryIO) -> Any:
    """Return what the header of an open file says. Raises OSError, struct.error or ValueError for a file that is not ours."""
    magic, digest, length = HEAD.unpack(file.read(HEAD.size))
    header = file.read(length) if magic == MAGIC and length <= _MAX_HEADER_BYTES else b""
    if hashlib.sha256(header).digest() != digest:
        raise ValueError("not a file of repacked weights, or a damaged one")
    return json.loads(header)


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file of repacked weights: its size, and the checkpoint that it was made of (no files: it is unfinished or damaged)."""

    path: Path
    nbytes: int
    files: tuple[str, ...] = ()
    quant: str | None = None
    is_current: bool = False  # the checkpoint's files are still what they were


def packed_files(folder: Path | None = None) -> Iterator[PackedFile]:
    """Yield the files of repacked weights in `folder`, or in the user's; none where there is no such folder."""
    place = folder or user_folder()
    paths = sorted([*place.glob(f"*{SUFFIX}"), *place.glob(f"*{UNFINISHED}")])
    for path in paths:
        try:
            yield _describe(path)
        except FileNotFoundError:
            continue  # somebody else was quicker


def _describe(path: Path) -> PackedFile:
    nbytes = path.stat().st_size
    try:
        with open(path, "rb") as file:
            key = read_header(file)["key"]
        identities = [tuple(each) for each in key["files"]]
        return PackedFile(path, nbytes, tuple(name for name, *_ in identities), key["quant"], all(map(_is_there, identities)))
    except (struct.error, ValueError, KeyError, TypeError, PermissionError):
        return PackedFile(path, nbytes)


def _is_there(identity: tuple[Any, ...]) -> bool:
    """Return whether a checkpoint's file is the one that was repacked."""
    try:
        return identity == file_identity(Path(identity[0]))
    except OSError:
        return False


def file_identity(path: Path) -> tuple[Any, ...]:
    """Return what tells a checkpoint's file from a later one of the same name. Raises OSError if it is gone."""
    found = os.stat(path)
    return (str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino)


def make_room(folder: Path, nbytes: int, own: Path) -> bool:
    """Remove what was used longest ago from `folder` until `nbytes` fit there in the place of `own`.

    Files that no checkpoint of this machine can use any more go first.

    The folder is bounded by MOST_SHARE of its disk, of which LEAST_FREE stays free. Returns False, with nothing removed, where
    even an empty folder would have no room. Raises OSError where the disk can't be looked at.
    """
    disk = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists()))
    others = [file for file in packed_files(folder) if file.path != own and file.path.suffix == SUFFIX]  # whole ones
    others.sort(key=lambda file: (file.is_current, _used(file.path)))
    own_bytes = own.stat().st_size if own.exists() else 0
    held = sum(file.nbytes for file in others)
    room = min(disk.free + own_bytes + held - LEAST_FREE * disk.total, MOST_SHARE * disk.total)
    if nbytes > room:
        return False
    for file in others:
        if nbytes + held <= room:
            break
        with suppress(OSError):  # of somebody else, or gone by now: the next one, then
            remove(file)
            held -= file.nbytes
    return nbytes + held <= room


def mark_used(path: Path) -> None:
    """Note that a file was used just now."""
    with suppress(OSError):
        os.utime(path)


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def remove(file: PackedFile) -> None:
    """Remove a file; one that is gone already is no error. Raises OSError."""
    file.path.unlink(missing_ok=True)
