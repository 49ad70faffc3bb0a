"""The folder of what loads keep, repacked weights and vocabularies: which files lie in it, how they are written and removed.

Owns the folder, its bounds, the names and the head of its files; imports no torch, so that they are listed at once. A file is
written under another name and renamed when whole, so that readers and several writers never meet. What was asked for is kept
wherever it can be, and where the disk is full or the folder is not to be written to, one warning is all; what was not asked for
is kept only where there is room, is given up when the program ends, and never says a word. Refuses to know what is kept:
`packed_weight_cache.py` maps weights, `gemcutter/vocabulary_cache.py` reads vocabularies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX, VOCABULARY_SUFFIX, UNFINISHED = ".packed", ".vocabulary", ".unfinished"
HEAD = struct.Struct("<8s32sQ")  # magic, digest of the header, its length
MAGIC = b"GCPACKED"
_MAX_HEADER_BYTES = 1 << 26
LEAST_FREE = 0.1  # of the disk, which stays free
MOST_SHARE = 0.1  # of the disk, which the folder may take
STALE_S = 24 * 3600  # after which an unfinished file has no writer any more
_WRITE_BYTES = 16 << 20


def user_folder() -> Path:
    """Return the folder for what is kept, which may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemcutter" / "packed-weights"


def kept_path(source: Path, suffix: str, folder: Path | None = None, how: str = "") -> Path:
    """Return where something of a checkpoint is kept, in `folder` or in the user's; `how` tells apart what it was made into."""
    place = hashlib.sha256(f"{source.resolve()}{how}".encode()).hexdigest()[:24]
    return (folder or user_folder()) / f"{source.stem}-{place}{suffix}"


def read_header(file: BinaryIO) -> Any:
    """Return what the header of an open file says. Raises OSError, struct.error or ValueError for a file that is not ours."""
    magic, digest, length = HEAD.unpack(file.read(HEAD.size))
    header = file.read(length) if magic == MAGIC and length <= _MAX_HEADER_BYTES else b""
    if hashlib.sha256(header).digest() != digest:
        raise ValueError("not a file of this folder, or a damaged one")
    return json.loads(header)


def pack_header(header: bytes) -> bytes:
    """Format the head of a file and its header."""
    return HEAD.pack(MAGIC, hashlib.sha256(header).digest(), len(header)) + header


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A kept file: its size, and the checkpoint that it was made of (no files: it is unfinished or damaged)."""

    path: Path
    nbytes: int
    files: tuple[str, ...] = ()
    quant: str | None = None
    is_current: bool = False  # the checkpoint's files are still what they were

    @property
    def is_vocabulary(self) -> bool:
        """Return whether this is a vocabulary, and not weights."""
        return self.path.suffix == VOCABULARY_SUFFIX


def packed_files(folder: Path | None = None) -> Iterator[PackedFile]:
    """Yield the kept files in `folder`, or in the user's; none where there is no such folder."""
    place = folder or user_folder()
    paths = sorted(path for suffix in (SUFFIX, VOCABULARY_SUFFIX, UNFINISHED) for path in place.glob(f"*{suffix}"))
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
    """Return whether a checkpoint's file is the one that something was made of."""
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
    others = [file for file in packed_files(folder) if file.path != own and file.path.suffix != UNFINISHED]
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


def write_kept(what: str, path: Path, nbytes: int, pieces: Iterator[memoryview], is_asked: bool) -> None:
    """Write a file of `nbytes`, or give it up as this module's first lines say: it raises nothing. `what` is in it."""
    try:
        if not make_room(path.parent, nbytes, path) and not is_asked:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        file, name = tempfile.mkstemp(UNFINISHED, path.stem, path.parent)
        try:
            with os.fdopen(file, "wb", buffering=0) as target:
                _write_in_blocks(target.fileno(), pieces, _go_on if is_asked else check_running)
                os.fsync(target.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except Abandoned:
        return
    except OSError as error:
        if is_asked:
            warnings.warn(f"{what} not kept in {path.parent}: {error.strerror or error}", stacklevel=2)


class Abandoned(Exception):
    """A file that nobody waits for is not finished."""


def check_running() -> None:
    """Raise Abandoned where the program is about to end."""
    if not threading.main_thread().is_alive():
        raise Abandoned


def _go_on() -> None:
    """Go on, whatever the program does."""


def _write_in_blocks(file: int, pieces: Iterator[memoryview], check: Callable[[], None]) -> None:
    """Write in large blocks at multiples of their size: some file systems then keep, and map, them in huge pages.

    `check` is called before each, and may raise.
    """
    block, used = memoryview(bytearray(_WRITE_BYTES)), 0
    for piece in pieces:
        while piece:
            count = min(len(piece), _WRITE_BYTES - used)
            block[used : used + count] = piece[:count]
            used, piece = used + count, piece[count:]
            if used == _WRITE_BYTES:
                check()
                _write_all(file, block)
                used = 0
    check()
    _write_all(file, block[:used])


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[_write(file, data) :]


_write = os.write  # which may write less than it is given, and fails where the disk is full


def _remove_stale(folder: Path) -> None:
    """Remove what writers have left that were killed."""
    for path in folder.glob(f"*{UNFINISHED}"):
        try:
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
        except OSError:
            continue  # somebody else was quicker
