"""What a model makes of a prompt: rows of every layer, and the states from which logits come.

Owns how this engine is driven for a certificate: in chunks as a long prompt would be, the last tokens one at a time as in
decoding, no row left out, in a cache that holds NaN wherever nothing was written. A trace keeps the rows and the head alone.
Refuses to judge. Read `oracle.py` for the other engine, `compare.py` for what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.checkpoint.load.load_params import Progress
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.model.text import Decoder

CHUNK_ROWS = 128  # rows of one step
SINGLE_ROWS = 16  # tokens at the end that run alone, through the kernels for single rows
LAYER_ROWS = 256  # rows kept of every layer: 330 MB in float32 for the largest model


@dataclass(frozen=True, slots=True)
class Trace:
    """One side's rows: K of every layer's output [K, D], all N final-normed states [N, D], and the head that reads them.

    Of layers that are in other stages of a pipeline there is no output, but that of the last one before this stage.
    """

    layers: tuple[Tensor | None, ...]
    states_ND: Tensor
    head: Callable[[Tensor], Tensor]

    def logits(self, start: int, stop: int) -> Tensor:
        """Return the logits [R, V] of rows start to stop - 1, in float32 on the CPU."""
        return self.head(self.states_ND[start:stop]).float().cpu()


def kept_positions(tokens: int) -> Tensor:
    """Choose the positions whose layer rows are kept, [K]: all, or evenly spread ones with the first and the last."""
    return torch.linspace(0, tokens - 1, min(tokens, LAYER_ROWS)).round().long()


@torch.inference_mode()
def trace(decoder: Decoder, ids: Sequence[int], kept_K: Tensor, progress: Progress) -> Trace:
    """Run ids through a decoder; `progress` is told the tokens done and all tokens. Raises CapacityError without memory."""
    counts = page_counts(decoder.plan, len(ids), CHUNK_ROWS)
    pool = PagedKVCache(decoder.plan, counts, decoder.dtype, decoder.device)
    for storage in (*pool.keys.values(), *pool.values.values()):
        storage.fill_(torch.nan)
    sequence = SequenceState(0, Request(tuple(ids), hidden_states=True))  # every row passes every layer
    sequence.table = table = BlockTable(pool)
    layers, states = [list[Tensor]() for _ in decoder.plan.layers], list[Tensor]()
    for rows in _chunks(len(ids)):
        start = table.length
        here = kept_K[(kept_K >= start) & (kept_K < start + rows)].to(decoder.device) - start
        table.reserve(rows)
        step = build_step(decoder, [ScheduledChunk.of(sequence, table, rows)])
        states.append(decoder.forward(step, pool, _collect(layers, here)))
        table.commit(rows)
        progress(table.length, len(ids))
    return Trace(tuple(torch.cat(rows) if rows else None for rows in layers), torch.cat(states), decoder.logits)


def _chunks(tokens: int) -> Iterator[int]:
    """Yield the rows of each step."""
    whole, single = max(tokens - SINGLE_ROWS, 0), min(tokens, SINGLE_ROWS)
    for start in range(0, whole, CHUNK_ROWS):
        yield min(CHUNK_ROWS, whole - start)
    yield from [1] * single


def _collect(layers: list[list[Tensor]], here_K: Tensor) -> Callable[[int, Tensor], None]:
    return lambda index, x_ND: layers[index].append(x_ND[here_K].float().cpu())
