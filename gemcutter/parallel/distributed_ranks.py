"""Ranks on several hosts, or on GPUs: sums by torch.distributed, gloo's or NCCL's.

Owns the group and its limit of time. Refuses to start processes, which `torchrun` does, and to send commands. Read
`shared_ranks.py` for ranks of one host, whose sums are many times faster.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import CFUNCTYPE, c_float, c_int, c_int64, c_void_p
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gemcutter import native
from gemcutter.errors import RankError
from gemcutter.native import RanksView
from gemcutter.shard import Place, Shard

LIMIT = timedelta(seconds=30)  # of one exchange, in which the slowest rank computes as much as the others
GATHERED = 1 << 14  # numbers at most that are gathered by every rank and not summed by gloo: 64 KiB of float32
SUM = CFUNCTYPE(c_int, c_void_p, c_int64)


def join_group(backend: str, init_method: str, number: int, count: int, limit: timedelta = LIMIT) -> None:
    """Join torch's default process group, in which all ranks are. Raises RankError if that can't be done."""
    try:
        dist.init_process_group(backend, init_method=init_method, rank=number, world_size=count, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {number} of {count} can't join the others ({init_method}): {error}") from error


class DistributedRanks:
    """This process among the ranks of its stage, once it has joined the default process group. All ranks make one at a time."""

    def __init__(self, place: Place, limit: timedelta = LIMIT) -> None:
        self._shard = shard = place.shard
        self._call = SUM(self._sum_floats)  # kept alive, as the library keeps its address
        self._view = RanksView(sum=ctypes.cast(self._call, c_void_p), rank=shard.rank, world=shard.world)
        self._is_native = dist.get_backend() == "gloo" and native.missing() is None
        self._group = None
        for first in range(0, place.count, shard.world) if place.pipeline_parallel > 1 else ():
            members = range(first, first + shard.world)
            group = dist.new_group([*members], timeout=limit)  # every rank takes part in the making of every group
            if place.number in members:
                self._group = group

    @property
    def shard(self) -> Shard:
        """Return which rank of how many this is."""
        return self._shard

    @property
    def view(self) -> int | None:
        """Return the address of the library's description, by which it calls back in the middle of a layer; None on GPUs."""
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

        Few numbers are gathered by every rank, which adds them in the order of ranks: gloo's own sum takes as many rounds again,
        each of which waits for the link.
        """
        if x.numel() > GATHERED:
            dist.all_reduce(x, group=self._group)
            return
        parts = [torch.empty_like(x) for _ in range(self._shard.world)]
        dist.all_gather(parts, x, group=self._group)
        x.copy_(parts[0])
        for part in parts[1:]:
            x.add_(part)

    def end(self) -> None:
        """Note that the group has ended; the others find out at their next exchange."""
        self._view.has_ended = 1

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
