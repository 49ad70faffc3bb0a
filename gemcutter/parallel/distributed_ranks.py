"""Ranks on several hosts, or on GPUs: sums by torch.distributed, gloo's on CPUs and NCCL's on GPUs.

Owns the group, its limit of time and its end. Sums of a GPU's rows are launched on its stream, and may be captured in graphs.
Refuses to start processes and to send commands. Read `shared_ranks.py` for ranks on the CPUs of one host, whose sums are many
times faster.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from ctypes import CFUNCTYPE, c_float, c_int, c_int64, c_void_p
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from gemcutter import native
from gemcutter.errors import RankError
from gemcutter.native import RanksView
from gemcutter.shard import Place, Shard

LIMIT = timedelta(seconds=30)  # of one exchange, in which the slowest rank computes as much as the others
GATHERED = 1 << 14  # numbers at most that are gathered by every rank and not summed by gloo: 64 KiB of float32
SUM = CFUNCTYPE(c_int, c_void_p, c_int64)
GLOO, NCCL, BOTH = "gloo", "nccl", "cpu:gloo,cuda:nccl"
HOST = "127.0.0.1"  # on which ranks of one host meet


def open_store(count: int) -> TCPStore:
    """Open the place at which `count` ranks of this host meet, on a free port."""
    return TCPStore(HOST, 0, count, is_master=True, timeout=LIMIT, wait_for_workers=False)


def come_to_store(port: int, number: int, count: int) -> TCPStore:
    """Let whoever opened a store in another process know that a rank is there. Raises RankError if it is not."""
    try:
        found = TCPStore(HOST, port, count, is_master=False, timeout=LIMIT)
        found.set(_presence(number), "")
    except RuntimeError as error:
        raise RankError(f"the leader of {count} ranks is not there: {error}") from error
    return found


def has_come(store: TCPStore, number: int) -> bool:
    """Return whether a rank is at a store, too."""
    return bool(store.check([_presence(number)]))


def _presence(number: int) -> str:
    return f"rank {number}"


def join_group(backend: str, number: int, count: int, store: TCPStore | None = None, limit: timedelta = LIMIT) -> None:
    """Join torch's default process group, in which all ranks are; they meet at a store, or where torchrun says (None).

    Raises RankError if that can't be done.
    """
    # Whoever watches the ranks ends a group in which one is gone. NCCL's own watch would end this process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    try:
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {number} of {count} can't join the others: {error}") from error


def is_joined() -> bool:
    """Return whether this process is in torch's default process group, which it can be in once at a time."""
    return dist.is_initialized()


def leave_group() -> None:
    """Leave torch's default process group: this process may join another one."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


class DistributedRanks:
    """This process among the ranks of its stage, once it has joined the default process group. All ranks make one at a time."""

    def __init__(self, place: Place, limit: timedelta = LIMIT) -> None:
        self._shard = shard = place.shard
        self._call = SUM(self._sum_floats)  # kept alive, as the library keeps its address
        self._view = RanksView(sum=ctypes.cast(self._call, c_void_p), rank=shard.rank, world=shard.world)
        self._is_native = GLOO in dist.get_backend_config() and native.missing() is None
        self._group = None
        for first in range(0, place.count, shard.world) if place.pipeline_parallel > 1 else ():
            members = range(first, first + shard.world)
            group = dist.new_group([*members], timeout=limit)  # every rank takes part in the making of every group
            if place.number in members:
                self._group = group
        group = self._group or dist.group.WORLD
        self._abort = group.abort if group is not None and NCCL in dist.get_backend_config() else None

    @property
    def shard(self) -> Shard:
        """Return which rank of how many this is."""
        return self._shard

    @property
    def view(self) -> int | None:
        """Return the address of the library's description, by which it calls back in the middle of a layer on CPUs."""
        return ctypes.addressof(self._view) if self._is_native else None

    def _sum_floats(self, address: int, count: int) -> int:
        """Sum where the library left its rows; return 1 if a rank is gone, since no error passes through the library."""
        found = torch.frombuffer((c_float * count).from_address(address), dtype=torch.float32)
        try:
            self._add(found)
        except RuntimeError:
            return 1
        return 0

    def _add(self, x: Tensor) -> None:
        """Make x the sum of all ranks' x. Raises RuntimeError if a rank is gone.

        On CPUs few numbers are gathered by every rank, which adds them in the order of ranks: gloo's own sum takes as many rounds
        again, each of which waits for the link.
        """
        if x.is_cuda or x.numel() > GATHERED:
            dist.all_reduce(x, group=self._group)
            return
        parts = [torch.empty_like(x) for _ in range(self._shard.world)]
        dist.all_gather(parts, x, group=self._group)
        x.copy_(parts[0])
        for part in parts[1:]:
            x.add_(part)

    def end(self) -> None:
        """End the group; others find out at their next exchange. What is under way on a GPU stops: nobody may use its result."""
        self._view.has_ended = 1
        abort, self._abort = self._abort, None
        if abort is not None:
            with suppress(RuntimeError):
                abort()

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x, in x's dtype. Raises RankError if a rank is gone."""
        found = x.clone(memory_format=torch.contiguous_format)
        try:
            self._add(found)
        except RuntimeError as error:
            raise RankError(f"a rank is gone: {error}") from error
        return found

    def join(self, x_RV: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the rows of all ranks side by side. Raises RankError if a rank is gone."""
        most = max(widths)
        padded = torch.nn.functional.pad(x_RV, (0, most - x_RV.shape[1])).contiguous()
        found = [torch.empty_like(padded) for _ in widths]
        try:
            dist.all_gather(found, padded, group=self._group)
        except RuntimeError as error:
            raise RankError(f"a rank is gone: {error}") from error
        return torch.cat([part[:, :width] for part, width in zip(found, widths, strict=True)], dim=1)
