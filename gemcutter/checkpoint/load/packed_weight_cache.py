"""Packed weights on disk: what one load has packed for the CPU kernels, the next maps.

Owns one file a checkpoint in the user's cache folder: a header that names the checkpoint's files as they were (paths, sizes,
times, a digest of their headers), how they were read, and sums of every block, then the weights. Nothing depends on it. A file
that is damaged, foreign, of another version or of an older checkpoint counts as none and is replaced. What was not asked for is
kept only where it is worth it. Read `load_params.py` for who asks, `packed_weight_files.py` for the folder and for how files
are written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcutter import native
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.checkpoint.load.packed_weight_files import (
    HEAD,
    SUFFIX,
    file_identity,
    kept_path,
    mark_used,
    pack_header,
    read_header,
    write_kept,
)
from gemcutter.quant.cpu_layout import PANEL, PackedLayout
from gemcutter.quant.cpu_packed import CpuPackedWeight

VERSION = 4  # of this file's layout and of csrc/cpu/layout.h
SUM_BYTES = 16 << 20  # of one sum
LEAST_BYTES = 256 << 20  # that are kept without being asked for: less is repacked in no time

_PAGE_BYTES = 4096  # weights begin on one
_ALIGN_BYTES = 64
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
        return cls(kept_path(source.path, SUFFIX, folder, f" {quant}{_rank_name(checkpoint)}"), key, is_asked)

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
        pieces = _pieces(self.key, dict(weights))
        file = ("repacked weights are", self.path, nbytes, pieces, self.is_asked)
        thread = threading.Thread(target=write_kept, args=file, name="packed weight cache")
        thread.start()
        return thread


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
            return pack_header(header).ljust(start, b"\0")
        start = -(-(HEAD.size + len(header)) // _PAGE_BYTES) * _PAGE_BYTES + _PAGE_BYTES
