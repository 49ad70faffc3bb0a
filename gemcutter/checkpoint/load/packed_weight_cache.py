"""Packed weights on disk: what one load has packed for the CPU kernels, the next maps.

Owns one file a checkpoint in the user's cache folder: a header that names the checkpoint's files as they were (paths, sizes,
times, a digest of their headers), how they were read, and sums of every block, then the weights. Nothing depends on it. A file
that is damaged, foreign, of another version or of an older checkpoint counts as none and is replaced; it is written under
another name and renamed when whole, so that readers and several writers never meet. A cache that was asked for keeps all it can,
and where the disk is full or the folder is not to be written to, one warning is all; one that was not asked for keeps only what
is worth it and has room, gives up when the program ends, and never says a word. Read `load_params.py` for who asks,
`packed_weight_files.py` for the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcutter import native
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.checkpoint.load.packed_weight_files import (
    HEAD,
    MAGIC,
    SUFFIX,
    UNFINISHED,
    file_identity,
    make_room,
    mark_used,
    read_header,
    user_folder,
)
from gemcutter.quant.cpu_layout import PANEL, PackedLayout
from gemcutter.quant.cpu_packed import CpuPackedWeight

VERSION = 4  # of this file's layout and of csrc/cpu/layout.h
SUM_BYTES = 16 << 20  # of one sum
STALE_S = 24 * 3600  # after which an unfinished file has no writer any more
LEAST_BYTES = 256 << 20  # that are kept without being asked for: less is repacked in no time

_PAGE_BYTES = 4096  # weights begin on one
_ALIGN_BYTES = 64
_WRITE_BYTES = 16 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ: map all pages at once instead of one fault for each few


@dataclass(frozen=True, slots=True)
class PackedWeightCache:
    """Where the packed weights of one checkpoint are kept, and what identifies them."""

    path: Path
    key: Mapping[str, Any]
    is_asked: bool = True  # by the user

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, quant: str | None = None, folder: Path | None = None, is_asked: bool = True
    ) -> PackedWeightCache:
        """Return where a checkpoint's packed weights belong: in `folder`, or in the user's cache.

        Raises OSError if its files are gone.
        """
        source = checkpoint.source
        tensors = [(each.name, each.dtype, each.shape, each.offset, each.file.name) for each in source.tensors.values()]
        key = {
            "version": VERSION,
            "quant": quant,
            "rank": None if checkpoint.plan.rank is None else [*asdict(checkpoint.plan.rank).values(), checkpoint.plan.mlp_unit],
            "stage": None if checkpoint.plan.stage is None else [*asdict(checkpoint.plan.stage).values()],
            "config": hashlib.sha256(repr(checkpoint.config).encode()).hexdigest(),  # which says how weights are read
            "level": native.level(),
            "files": [list(file_identity(path)) for path in source.files],
            "tensors": hashlib.sha256(json.dumps(tensors).encode()).hexdigest(),
        }
        place = hashlib.sha256(f"{source.path.resolve()} {quant}{_rank_name(checkpoint)}".encode()).hexdigest()[:24]
        return cls((folder or user_folder()) / f"{source.path.stem}-{place}{SUFFIX}", key, is_asked)

    def read(self) -> dict[str, CpuPackedWeight]:
        """Map the weights that are kept, by name; none where there is no such file, or not of this checkpoint as it is now."""
        try:
            with open(self.path, "rb") as file:
                content = read_header(file)
                if content["key"] != self.key or content["bytes"] != os.fstat(file.fileno()).st_size:
                    return {}
                memory = _map(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            found = {name: _weight(memory, entry) for name, entry in content["weights"].items()}
            is_whole = all(sums_of(found[name].data) == entry["sums"] for name, entry in content["weights"].items())
            if not is_whole:
                return {}
            mark_used(self.path)
            return found
        except (OSError, struct.error, ValueError, KeyError, TypeError, RuntimeError):  # whatever it is, it is not ours
            return {}

    def write(self, weights: Mapping[str, CpuPackedWeight]) -> threading.Thread | None:
        """Keep weights for later loads, in a thread of its own; a program waits for it when it ends if it was asked for.

        Returns None where so few bytes are not kept without being asked for.
        """
        nbytes = sum(each.nbytes for each in weights.values())
        if not self.is_asked and nbytes < LEAST_BYTES:
            return None
        thread = threading.Thread(target=self._write, args=(dict(weights), nbytes), name="packed weight cache")
        thread.start()
        return thread

    def _write(self, weights: Mapping[str, CpuPackedWeight], nbytes: int) -> None:
        try:
            if not make_room(self.path.parent, nbytes, self.path) and not self.is_asked:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.path.parent)
            file, name = tempfile.mkstemp(UNFINISHED, self.path.stem, self.path.parent)
            try:
                with os.fdopen(file, "wb", buffering=0) as target:
                    _write_in_blocks(target.fileno(), _pieces(self.key, weights), self._check_wanted)
                    os.fsync(target.fileno())
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
        except _Abandoned:
            return
        except OSError as error:
            if self.is_asked:
                warnings.warn(f"repacked weights are not kept in {self.path.parent}: {error.strerror or error}", stacklevel=2)

    def _check_wanted(self) -> None:
        """Raise _Abandoned where the program is about to end: it waits for what was asked for only."""
        if not self.is_asked and not threading.main_thread().is_alive():
            raise _Abandoned


class _Abandoned(Exception):
    """A file that nobody waits for is not finished."""


def _rank_name(checkpoint: Checkpoint) -> str:
    """Return what tells apart the files of ranks and stages, each of which keeps its own slices and layers."""
    rank, stage = checkpoint.plan.rank, checkpoint.plan.stage
    layers = "" if stage is None else f" layers {stage.first} to {stage.stop}"
    return layers if rank is None else f" {rank.rank} of {rank.world}{layers}"


def sums_of(data: Tensor) -> list[int]:
    """Return a sum of the words of every SUM_BYTES bytes: it costs no more than reading them, and shows lost and changed ones."""
    flat = data.contiguous().flatten().view(torch.uint8)
    words, rest = flat[: len(flat) // 8 * 8].view(torch.long), flat[len(flat) // 8 * 8 :]
    return [int(part.sum()) for part in torch.split(words, SUM_BYTES // 8)] + rest.tolist()


def _map(mapping: mmap.mmap) -> Tensor:
    if hasattr(mmap, "MADV_RANDOM"):  # a system with madvise; older kernels refuse this advice
        with contextlib.suppress(OSError):
            mapping.madvise(_POPULATE_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _weight(memory: Tensor, entry: Mapping[str, Any]) -> CpuPackedWeight:
    *experts, rows, columns = entry["shape"]
    layout = PackedLayout(**entry["layout"] | {"levels": tuple(entry["layout"]["levels"])})
    shape = (*experts, -(-rows // PANEL), layout.stride(columns))
    data = memory[entry["offset"] : entry["offset"] + torch.Size(shape).numel()].view(shape)
    return CpuPackedWeight(data, rows, columns, layout, entry["origin"])


def _pieces(key: Mapping[str, Any], weights: Mapping[str, CpuPackedWeight]) -> Iterator[memoryview]:
    """Format the whole file, piece by piece."""
    entries, end = dict[str, Any](), 0
    for name, each in weights.items():
        layout = asdict(each.layout)
        sums = sums_of(each.data)
        entries[name] = {"shape": each.shape, "layout": layout, "origin": each.origin, "offset": end, "sums": sums}
        end += -(-each.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    header = _header(key, entries, end)
    yield memoryview(header)
    for each in weights.values():
        yield memoryview(each.data.contiguous().flatten().numpy().data)
        yield memoryview(bytes(-each.nbytes % _ALIGN_BYTES))


def _header(key: Mapping[str, Any], entries: Mapping[str, dict[str, Any]], nbytes: int) -> bytes:
    """Format the header with offsets in the file, which depend on its own length: room for them is found by a first try."""
    start = 0
    while True:
        placed = {name: entry | {"offset": start + entry["offset"]} for name, entry in entries.items()}
        header = json.dumps({"key": key, "bytes": start + nbytes, "weights": placed}).encode()
        if HEAD.size + len(header) <= start:
            digest = hashlib.sha256(header).digest()
            return (HEAD.pack(MAGIC, digest, len(header)) + header).ljust(start, b"\0")
        start = -(-(HEAD.size + len(header)) // _PAGE_BYTES) * _PAGE_BYTES + _PAGE_BYTES


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
