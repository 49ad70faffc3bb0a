"""Bursts of drafts over memory that never moves: filled anew for every burst, captured once as a CUDA graph and replayed.

Owns `BurstBuffers`, the static rows of one burst, and `CapturedBursts`, which keeps one for each bucket of sequences, number of
drafts and width of block tables. A drafter's layers are so small that launching them one by one takes longer than the target's
whole step. Only the likeliest tokens are drafted here. Without a GPU the same code runs uncaptured, to be tested. Refuses to know
who is drafted for, and why. Read `engine/cuda_graphs.py` for the target's steps, `assistant.py` for who asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.engine.cuda_graphs import BUCKETS, WARM_UPS
from gemcutter.model.drafter import Drafter
from gemcutter.ops.step import KVCache, Step
from gemcutter.ops.types import Drafts
from gemcutter.plan import GroupId

Widths = tuple[tuple[GroupId, int], ...]  # of block tables, in pages, by group


class BurstBuffers:
    """The static step of a bucket of sequences that get `count` drafts each, a row a sequence; padding stands at position -1."""

    def __init__(self, drafter: Drafter, page_tokens: Mapping[GroupId, int], sequences: int, count: int, widths: Widths) -> None:
        self.drafter, self.sequences, self.count, self.widths = drafter, sequences, count, dict(widths)
        decoder, device = drafter.decoder, drafter.decoder.device
        self.ids_S = torch.zeros(sequences, dtype=torch.long, device=device)
        self.states_ST = torch.zeros(sequences, drafter.target.plan.hidden, dtype=drafter.target.precision.rows, device=device)
        self.positions_S = torch.zeros(sequences, dtype=torch.long, device=device)  # that queries are turned to
        self.rows_at_S = torch.full((sequences,), -1, dtype=torch.int32, device=device)  # the last key that each sees
        self.pages = {group: torch.zeros(sequences, width, dtype=torch.int32, device=device) for group, width in widths}
        self.firsts = {group: torch.zeros(sequences, dtype=torch.int32, device=device) for group, _ in widths}
        edges = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        metadata = {
            group: decoder.backend.static_metadata(
                positions_N=self.rows_at_S,
                row_sequence_N=edges[:-1],
                query_start_S1=edges,
                pages_SP=self.pages[group],
                first_S=self.firsts[group],
                page_tokens=page_tokens[group],
                slot_mapping_N=None,
                max_rows=1,
            )
            for group, _ in widths
        }
        self.step = Step(
            ids_N=self.ids_S,
            ple_ids_N=self.ids_S,
            positions_N=self.positions_S,
            query_start=tuple(range(sequences + 1)),
            kv_ranges={},
            slot_mapping={},
            logit_rows=None,
            rope={},
            attn_metadata=metadata,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: Drafts | None = None

    def fill(self, ids_S: Tensor, states_ST: Tensor, step: Step, tables: Sequence[BlockTable], turned: Sequence[int]) -> None:
        """Write the numbers of some sequences: `step` has their rows, `turned` says where their queries stand."""
        count = len(tables)
        self.ids_S[:count], self.states_ST[:count] = ids_S, states_ST
        self.rows_at_S.fill_(-1)
        self.rows_at_S[:count] = step.positions_N.to(torch.int32)
        self.positions_S[:count] = torch.tensor(turned)
        for group, width in self.widths.items():
            found = [table.pages(group) for table in tables]
            rows = [[*pages, *[0] * (width - len(pages))] for _, pages in found]
            self.pages[group][:count] = torch.tensor(rows, dtype=torch.int32)
            self.firsts[group][:count] = torch.tensor([first for first, _ in found], dtype=torch.int32)

    def run(self, cache: KVCache, is_captured: bool, memory: Any) -> Drafts:
        """Return the drafts, in memory that the next burst overwrites."""
        if not is_captured:
            self._compute(cache)
        elif self._graph is None:
            self._capture(cache, memory)
        if self._graph is not None:
            self._graph.replay()
        assert self._found is not None
        return self._found

    def _capture(self, cache: KVCache, memory: Any) -> None:
        side: Any = torch.cuda.Stream(self.drafter.decoder.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._compute(cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            self._compute(cache)
        self._graph = graph

    def _compute(self, cache: KVCache) -> None:
        self.step.rope.update(self.drafter.decoder.rope_tables(self.positions_S))
        self._found = self.drafter.draft_likeliest(self.ids_S, self.states_ST, self.step, cache, self.count)


class CapturedBursts:
    """The static bursts of a drafter, made when they are needed again: to capture one takes as long as many bursts."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.is_captured = drafter.decoder.device.type == "cuda"
        self._buffers: dict[_Key, BurstBuffers] = {}
        self._seen = set[_Key]()
        self._memory = torch.cuda.graph_pool_handle() if self.is_captured else None

    def accepts(self, tables: Sequence[BlockTable], count: int) -> bool:
        """Return whether there is, or should be, a static burst of so many drafts for sequences with these tables."""
        if len(tables) > BUCKETS[-1]:
            return False
        key = _key(tables, count)
        is_known = key in self._seen
        self._seen.add(key)
        return is_known

    def draft(
        self, ids_S: Tensor, states_ST: Tensor, step: Step, tables: Sequence[BlockTable], turned: Sequence[int], count: int
    ) -> Drafts:
        """Return `count` drafts in a row for each of some sequences, as `Drafter.draft_likeliest` does."""
        cache, key = tables[0].cache, _key(tables, count)
        if key not in self._buffers:
            tokens = {group: cache.allocators[group].tokens for group, _ in key.widths}
            self._buffers[key] = BurstBuffers(self.drafter, tokens, key.sequences, key.drafts, key.widths)
        buffers = self._buffers[key]
        with self.drafter.decoder.on_device():
            buffers.fill(ids_S, states_ST, step, tables, turned)
            found = buffers.run(cache, self.is_captured, self._memory)
        some = slice(len(tables))
        return Drafts(found.tokens_KS[:, some], found.chances_KS[:, some], found.states_ST[some])


@dataclass(frozen=True, slots=True)
class _Key:
    """What a static burst is for."""

    sequences: int
    drafts: int
    widths: Widths


def _key(tables: Sequence[BlockTable], count: int) -> _Key:
    most = {group: max(len(table.pages(group)[1]) for table in tables) for group in tables[0].cache.allocators}
    widths = tuple((group, 1 << max(pages - 1, 0).bit_length()) for group, pages in most.items())
    return _Key(BUCKETS[bisect_left(BUCKETS, len(tables))], count, widths)
