"""Builds the flat rows of one step from scheduled chunks.

Owns the order of rows and the translation of block tables to slots and spans; refuses to know why the chunks were chosen. Read
`ops/step.py` for the type.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch

from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.threads import one_thread
from gemcutter.model.text import Decoder
from gemcutter.ops.step import Step, send


@one_thread()
def build_step(decoder: Decoder, chunks: Sequence[ScheduledChunk]) -> Step:
    """Lay the chunks' rows out one after the other, in order."""
    row_start = tuple(accumulate((chunk.rows for chunk in chunks), initial=0))
    keep = tuple(start + row for start, chunk in zip(row_start, chunks, strict=False) for row in chunk.logit_rows)
    windows = chunks[0].table.pool.books
    ids = chain.from_iterable(chunk.ids for chunk in chunks)
    positions = chain.from_iterable(range(chunk.start, chunk.start + chunk.rows) for chunk in chunks)
    slots = ([slot for chunk in chunks for slot in slots_of(chunk, window)] for window in windows)
    ids_N, positions_N, *slots_N = send((ids, positions, *slots), torch.long, decoder.device)
    return Step(
        ids_N=ids_N,
        ple_ids_N=ids_N,
        positions_N=positions_N,
        row_start=row_start,
        spans={window: tuple(chunk.table.span(window) for chunk in chunks) for window in windows},
        slots=dict(zip(windows, slots_N, strict=True)),
        keep=None if len(keep) == row_start[-1] else keep,
        rope=decoder.rope_tables(positions_N),
        adapters=tuple(chunk.sequence.request.adapter for chunk in chunks),
    )


def slots_of(chunk: ScheduledChunk, window: int | None) -> list[int]:
    """Return the slot of each of a chunk's rows, which may follow rows of a step whose tokens are not known yet."""
    first = chunk.start - chunk.table.length
    return chunk.table.slots(window)[first : first + chunk.rows]
