"""Ranks 1, 2 ... of a model: a loop that does what the leader does, over other slices.

Owns the meaning of commands on this side. A rank that meets an error of its own ends: the leader notices. Refuses to know how the
decoder was loaded. Read `leader.py` for the commands.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.model.drafter import Drafter
from gemcutter.model.text import Decoder
from gemcutter.ops.types import AdapterDeltas, StaticShape
from gemcutter.parallel.messages import receive, step_of
from gemcutter.plan import GroupId

AdapterReader = Callable[[str, str, Sequence[str]], AdapterDeltas]  # of a name, a path and patterns to pass over
PoolMaker = Callable[[Decoder, dict[GroupId, PoolSize], torch.dtype], PagedKVCache]


class StaticSteps(Protocol):
    """Steps over memory that never moves, of one cache."""

    def capture(self, shape: StaticShape) -> None:
        """Capture a step as a graph, where there is a GPU."""

    def repeat(self, shape: StaticShape, numbers: Tensor) -> None:
        """Run a step over these numbers, bytes."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What a rank makes as the leader's engine does: a cache, and static steps over one for contexts of some tokens."""

    pool: PoolMaker
    static_steps: Callable[[Decoder, PagedKVCache, int], StaticSteps]


class Follower:
    """One rank's decoder and caches; `read_adapter` reads its share of an adapter."""

    def __init__(self, decoder: Decoder, drafter: Drafter | None, parts: EngineParts, read_adapter: AdapterReader) -> None:
        self.decoder, self.drafter, self._parts, self._read_adapter = decoder, drafter, parts, read_adapter
        self.pools: dict[int, PagedKVCache] = {}
        self._static_steps: dict[int, StaticSteps] = {}  # by the number of their cache

    @torch.inference_mode()
    def serve(self, connection: socket.socket) -> None:
        """Do what the leader tells until it closes the connection. Raises what a command raises."""
        while (found := receive(connection)) is not None:
            command, content = found
            getattr(self, f"do_{command}")(**content)

    def do_pool(self, number: int, counts: dict[str, list[int]], dtype: str) -> None:
        """Make a cache."""
        sizes = {GroupId(group): PoolSize(*size) for group, size in counts.items()}
        self.pools[number] = self._parts.pool(self.decoder, sizes, getattr(torch, dtype))

    def do_drop(self, number: int) -> None:
        """Let go of a cache."""
        del self.pools[number]
        self._static_steps.pop(number, None)

    def do_copy_page(self, number: int, group: str, source: int, target: int) -> None:
        """Copy a page."""
        self.pools[number].copy_page(GroupId(group), source, target)

    def do_forward(self, number: int, step: dict[str, Any]) -> None:
        """Run a step, as far as it goes without what other stages make of it."""
        decoder = self.decoder
        plain = step_of(step, decoder.device)
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

    def do_draft(self, number: int, ids: Tensor, states: Tensor, step: dict[str, Any], count: int | None) -> None:
        """Draft."""
        drafter, device = self.drafter, self.decoder.device
        assert drafter is not None
        plain, ids, states = step_of(step, device), ids.to(device), states.to(device)
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

    def do_logits(self, states: Tensor) -> None:
        """Run the head."""
        self.decoder.logits(states.to(self.decoder.device))

    def do_capture(self, number: int, shape: dict[str, Any]) -> None:
        """Capture a static step."""
        found = StaticShape(**shape)
        self._static(number, found.context).capture(found)

    def do_static_step(self, number: int, shape: dict[str, Any], numbers: Tensor) -> None:
        """Run a static step."""
        found = StaticShape(**shape)
        self._static(number, found.context).repeat(found, numbers)

    def _static(self, number: int, context: int) -> StaticSteps:
        """Return the static steps over a cache, which are made when first needed."""
        if number not in self._static_steps:
            self._static_steps[number] = self._parts.static_steps(self.decoder, self.pools[number], context)
        return self._static_steps[number]
