"""Ranks on one host: sums over memory that the processes share, computed by the native library.

Owns the segment and its description. It is memory of a file without a name, which goes with the last process that holds it,
however that ends. Refuses to start processes. Read `csrc/cpu/ranks.h` for the protocol.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from gemcutter import native
from gemcutter.errors import KernelError, RankError
from gemcutter.native import RanksView
from gemcutter.shard import Shard

SLOT_FLOATS = 1 << 20  # of one rank's part of one exchange: 64 rows of a wide model, or the logits of several
LINE_BYTES = 64  # of each rank's part of the segment's header, csrc/cpu/ranks.cpp
BEATS_AT = 16  # byte of a rank's line at which its process counts
_WORD = struct.Struct("<I")
ENDED_AT = 4  # byte of the segment at which a word says that the group has ended, csrc/cpu/ranks.cpp


def segment_bytes(world: int) -> int:
    """Return the size of the segment of so many ranks."""
    library = native.load_library()
    assert library is not None
    library.gc_ranks_bytes.restype = c_int64
    return int(library.gc_ranks_bytes(c_int64(world), c_int64(SLOT_FLOATS)))


def new_segment(world: int) -> int:
    """Make the shared memory; return its file descriptor. Raises KernelError where the system has no such memory."""
    if not hasattr(os, "memfd_create"):
        raise KernelError("tensor parallelism over shared memory needs Linux")
    file = os.memfd_create("gemcutter-ranks")
    os.ftruncate(file, segment_bytes(world))
    return file


class SharedRanks:
    """One of the ranks that share a segment, which `new_segment` made."""

    def __init__(self, file: int, shard: Shard) -> None:
        self._shard = shard
        self._memory = mmap.mmap(file, segment_bytes(shard.world))
        self._tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._sum = _entry("gc_sum_over_ranks", c_void_p, c_int64)
        self._join = _entry("gc_join_ranks", c_void_p, c_int64, c_void_p, c_void_p)
        self._view = RanksView(segment=self._tensor.data_ptr(), slot=SLOT_FLOATS, rank=shard.rank, world=shard.world)

    @property
    def shard(self) -> Shard:
        """Return which rank of how many this is."""
        return self._shard

    @property
    def view(self) -> int | None:
        """Return the address of the library's description."""
        return ctypes.addressof(self._view)

    @property
    def has_ended(self) -> bool:
        """Return whether somebody has ended the group."""
        return self._memory[ENDED_AT] != 0

    def end(self) -> None:
        """Let every wait of every rank end, now and later, with an error."""
        self._memory[ENDED_AT] = 1

    def beat(self) -> None:
        """Count, so that others see that this process runs."""
        at = self._shard.rank * LINE_BYTES + BEATS_AT
        (count,) = _WORD.unpack_from(self._memory, at)
        _WORD.pack_into(self._memory, at, (count + 1) & 0xFFFFFFFF)

    def beats(self) -> list[int]:
        """Return how often each rank has said so."""
        return [_WORD.unpack_from(self._memory, rank * LINE_BYTES + BEATS_AT)[0] for rank in range(self._shard.world)]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x, in float32 and then in x's dtype. Raises RankError if a rank is gone."""
        found = x.to(torch.float32, copy=True).contiguous()
        _check(self._sum(self.view, found.data_ptr(), found.numel()))
        return found.to(x.dtype)

    def join(self, x_RV: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the rows of all ranks side by side, float32. Raises RankError if a rank is gone."""
        x, all_widths = x_RV.to(torch.float32).contiguous(), torch.tensor(widths)
        out = torch.empty(x.shape[0], sum(widths))
        _check(self._join(self.view, x.data_ptr(), x.shape[0], all_widths.data_ptr(), out.data_ptr()))
        return out


def _entry(name: str, *arguments: Any) -> Callable[..., int]:
    """Return an entry point of the library, which takes this rank's description first."""
    function = getattr(native.load_library(), name)
    function.argtypes, function.restype = (c_void_p, *arguments), c_int
    found: Callable[..., int] = function
    return found


def _check(code: int) -> None:
    """Raise RankError for what an entry point returns where a rank is gone."""
    if code:
        raise RankError("a rank is gone: the steps of the whole group end with it")
