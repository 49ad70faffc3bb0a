"""Ranks 1, 2 ... of a model: a loop that does what the leader does, over other slices.

Owns the meaning of commands on this side. A rank that meets an error of its own ends: the leader notices. Refuses to know how the
decoder was loaded. Read `leader.py` for the commands.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.model.drafter import Drafter
from gemcutter.model.text import Decoder
from gemcutter.ops.types import AdapterDeltas
from gemcutter.parallel.messages import receive, step_of
from gemcutter.plan import GroupId

AdapterReader = Callable[[str, str, Sequence[str]], AdapterDeltas]  # of a name, a path and patterns to pass over


class Follower:
    """One rank's decoder and caches; `read_adapter` reads its share of an adapter."""

    def __init__(self, decoder: Decoder, drafter: Drafter | None, read_adapter: AdapterReader) -> None:
        self.decoder, self.drafter, self._read_adapter = decoder, drafter, read_adapter
        self.pools: dict[int, PagedKVCache] = {}

    @torch.inference_mode()
    def serve(self, connection: socket.socket) -> None:
        """Do what the leader tells until it closes the connection. Raises what a command raises."""
        while (found := receive(connection)) is not None:
            command, content = found
            getattr(self, f"do_{command}")(**content)

    def do_pool(self, number: int, counts: dict[str, list[int]], dtype: str) -> None:
        """Make a cache."""
        sizes = {GroupId(group): PoolSize(*size) for group, size in counts.items()}
        self.pools[number] = PagedKVCache(self.decoder.plan, sizes, getattr(torch, dtype), self.decoder.device)

    def do_drop(self, number: int) -> None:
        """Let go of a cache."""
        del self.pools[number]

    def do_copy_page(self, number: int, group: str, source: int, target: int) -> None:
        """Copy a page."""
        self.pools[number].copy_page(GroupId(group), source, target)

    def do_forward(self, number: int, step: dict[str, Any]) -> None:
        """Run a step, as far as it goes without what other stages make of it."""
        plain, decoder = step_of(step), self.decoder
        prepared = decoder.prepare(replace(plain, rope=decoder.rope_tables(plain.positions_N)))
        if decoder.pipeline is None:
            decoder.forward(prepared, self.pools[number])
        elif decoder.plan.has_ends:
            decoder.begin(prepared, self.pools[number])
        else:
            decoder.pipeline.pass_on(decoder, prepared, self.pools[number])

    def do_finish(self) -> None:
        """Complete the oldest step that was begun."""
        assert self.decoder.pipeline is not None
        self.decoder.pipeline.finish_oldest(self.decoder)

    def do_draft(self, number: int, ids: torch.Tensor, states: torch.Tensor, step: dict[str, Any], count: int | None) -> None:
        """Draft."""
        drafter, plain = self.drafter, step_of(step)
        assert drafter is not None
        rope = drafter.decoder.rope_tables(drafter.turned(plain.positions_N))
        started, cache = drafter.start(replace(plain, rope=rope)), self.pools[number]
        if count is None:
            drafter.draft(ids, states, started, cache)
        else:
            drafter.draft_likeliest(ids, states, started, cache, count)

    def do_load_adapter(self, name: str, path: str, ignore: list[str]) -> None:
        """Let steps ask for an adapter."""
        self.decoder.adapted = self.decoder.with_adapter(name, self._read_adapter(name, path, ignore))

    def do_unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self.decoder.adapted = self.decoder.without_adapter(name)

    def do_logits(self, states: torch.Tensor) -> None:
        """Run the head."""
        self.decoder.logits(states)
