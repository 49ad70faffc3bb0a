"""Ranks on several hosts, or on GPUs: sums by torch.distributed, gloo's or NCCL's.

Owns the group and its limit of time. Refuses to start processes, which `torchrun` does, and to send commands. Read
`shared_ranks.py` for ranks of one host, whose sums are many times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gemcutter.errors import RankError
from gemcutter.shard import Shard

LIMIT = timedelta(seconds=60)  # of one exchange, in which the slowest rank computes as much as the others


class DistributedRanks:
    """This process as a rank of torch's default process group. Raises RankError if the group can't be joined."""

    def __init__(self, backend: str, init_method: str, shard: Shard, limit: timedelta = LIMIT) -> None:
        self._shard = shard
        try:
            dist.init_process_group(backend, init_method=init_method, rank=shard.rank, world_size=shard.world, timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise RankError(f"rank {shard.rank} of {shard.world} can't join the others ({init_method}): {error}") from error

    @property
    def shard(self) -> Shard:
        """Return which rank of how many this is."""
        return self._shard

    @property
    def view(self) -> int | None:
        """Return None: the library knows nothing of this group."""
        return None

    def end(self) -> None:
        """Leave the group; the others find out at their next exchange."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x, in x's dtype. Raises RankError if a rank is gone."""
        found = x.clone(memory_format=torch.contiguous_format)
        try:
            dist.all_reduce(found)
        except RuntimeError as error:
            raise RankError(f"a tensor-parallel rank is gone: {error}") from error
        return found

    def join(self, x_RV: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the rows of all ranks side by side. Raises RankError if a rank is gone."""
        most = max(widths)
        padded = torch.nn.functional.pad(x_RV, (0, most - x_RV.shape[1])).contiguous()
        found = [torch.empty_like(padded) for _ in widths]
        try:
            dist.all_gather(found, padded)
        except RuntimeError as error:
            raise RankError(f"a tensor-parallel rank is gone: {error}") from error
        return torch.cat([part[:, :width] for part, width in zip(found, widths, strict=True)], dim=1)
