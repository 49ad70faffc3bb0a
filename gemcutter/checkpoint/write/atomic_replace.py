"""Puts finished work under its final name, and clears away what a killed run left behind.

Owns the temporary names beside a target, the locks that tell a living run's from a dead one's, and the replacement of what stood
there before. Refuses to know what is written. Read `convert.py` for the user.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemcutter.checkpoint.write.write_safetensors import explained, sync_folder
from gemcutter.errors import CheckpointError

MANIFEST = "gemcutter-manifest.json"
_PARTIAL, _REPLACED = "partial", "replaced"
_HEX = "[0-9a-f]{8}"


@contextmanager
def put_in_place(target: Path, *, is_folder: bool, force: bool) -> Iterator[Path]:
    """Yield a temporary path beside `target`, a folder or a file; it gets that name if the block ends well, else it goes.

    `force` lets it replace a file, or a folder that an earlier run wrote (it holds a manifest) and nothing else. The temporary
    path is locked while the block runs, so a later run knows the leftovers of one that was killed, and removes them.
    Raises CheckpointError if the target exists and may not be replaced, or its folder can't be written.
    """
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
    _check_free(target, is_folder, force)
    partial = target.with_name(f"{target.name}.{_PARTIAL}-{secrets.token_hex(4)}")
    with explained(target):
        if is_folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        lock = _lock(partial)
    try:
        yield partial
        with explained(target):
            _sync(partial)
            _replace(partial, target)
    finally:
        _remove(partial)
        if lock is not None:
            os.close(lock)
    sync_folder(target.parent)


def _check_free(target: Path, is_folder: bool, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_dir() and not target.is_symlink():
        with explained(target):
            found = sorted(os.listdir(target))
        if is_folder and (not found or (force and MANIFEST in found)):
            return
        if is_folder and force:
            raise CheckpointError(
                f"{target} was not written by convert (it holds no {MANIFEST}), so --force does not replace it; "
                "remove it, or choose another name"
            )
        if not is_folder:
            raise CheckpointError(f"{target} is a folder; give the name of a file that ends in .gguf")
    elif force and not is_folder:
        return
    elif is_folder:
        raise CheckpointError(f"{target} is a file; give the name of a folder")
    raise CheckpointError(f"{target} exists; choose another name, or replace it with --force")


def _replace(partial: Path, target: Path) -> None:
    """Rename the new one. A folder that stands there steps aside first, and comes back if the run dies in between."""
    if not (partial.is_dir() and target.is_dir() and os.listdir(target)):
        os.replace(partial, target)
        return
    aside = target.with_name(f"{target.name}.{_REPLACED}-{secrets.token_hex(4)}")
    os.rename(target, aside)
    os.replace(partial, target)
    _remove(aside)


def _clear_leftovers(target: Path) -> None:
    """Remove what killed runs left beside the target, and bring back what one of them had moved aside."""
    pattern = re.compile(rf"{re.escape(target.name)}\.({_PARTIAL}|{_REPLACED})-{_HEX}")
    for name in sorted(os.listdir(target.parent)):
        found = pattern.fullmatch(name)
        path = target.parent / name
        if found is None or path.is_symlink():
            continue
        lock = _lock(path, wait=False)
        if lock is None:
            continue
        try:
            if found[1] == _REPLACED and not os.path.lexists(target):
                os.rename(path, target)
            else:
                _remove(path)
        finally:
            os.close(lock)


def _lock(path: Path, wait: bool = True) -> int | None:
    """Lock a file or folder until the descriptor is closed or the process dies; None where somebody else has or none can."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock

        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):  # a system without such locks: leftovers stay, for the user to remove
        return None
    try:
        flock(descriptor, LOCK_EX if wait else LOCK_EX | LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    """Make contents durable before they get their name."""
    if path.is_dir():
        sync_folder(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with suppress(OSError):  # it has its final name by now, or the first failure is the one to tell
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
