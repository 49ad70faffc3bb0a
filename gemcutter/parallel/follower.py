"""Ranks 1, 2 ... of a model: a loop that does what the leader does, over other slices.

Owns the meaning of commands on this side. A rank that meets an error of its own ends: the leader notices. Refuses to know how the
decoder was loaded. Read `leader.py` for the commands.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import torch

from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.errors import RankError
from gemcutter.model.text import Decoder
from gemcutter.parallel.messages import receive, step_of
from gemcutter.plan import GroupId


class Follower:
    """One rank's decoder and cache."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._pool: PagedKVCache | None = None

    @property
    def pool(self) -> PagedKVCache:
        """Return the cache. Raises RankError if the leader has not said how large it is."""
        if self._pool is None:
            raise RankError("the leader began a step before it told the size of the cache")
        return self._pool

    @torch.inference_mode()
    def serve(self, connection: socket.socket) -> None:
        """Do what the leader tells until it closes the connection. Raises what a command raises."""
        while (found := receive(connection)) is not None:
            command, content = found
            getattr(self, f"do_{command}")(**content)

    def do_pool(self, counts: dict[str, list[int]], dtype: str) -> None:
        """Make the cache."""
        sizes = {GroupId(group): PoolSize(*size) for group, size in counts.items()}
        self._pool = PagedKVCache(self.decoder.plan, sizes, getattr(torch, dtype), self.decoder.device)

    def do_copy_page(self, group: str, source: int, target: int) -> None:
        """Copy a page."""
        self.pool.copy_page(GroupId(group), source, target)

    def do_forward(self, step: dict[str, Any]) -> None:
        """Run a step."""
        plain = step_of(step)
        self.decoder.forward(self.decoder.prepare(replace(plain, rope=self.decoder.rope_tables(plain.positions_N))), self.pool)

    def do_logits(self, states: torch.Tensor) -> None:
        """Run the head."""
        self.decoder.logits(states)
