"""Builds the flat rows of one step from scheduled chunks.

Owns the order of rows and the translation of block tables to slots and KV ranges; refuses to know why the chunks were chosen.
Read `ops/step.py` for the type.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch

from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.threads import one_thread
from gemcutter.model.text import Decoder
from gemcutter.ops.step import Step, send
from gemcutter.plan import GroupId


@one_thread()
def build_step(decoder: Decoder, chunks: Sequence[ScheduledChunk]) -> Step:
    """Lay the chunks' rows out one after the other, in order."""
    query_start = tuple(accumulate((chunk.rows for chunk in chunks), initial=0))
    logit_rows = tuple(start + row for start, chunk in zip(query_start, chunks, strict=False) for row in chunk.logit_rows)
    groups = chunks[0].table.cache.allocators
    ids = chain.from_iterable(chunk.ids for chunk in chunks)
    positions = chain.from_iterable(range(chunk.start, chunk.start + chunk.rows) for chunk in chunks)
    slots = ([slot for chunk in chunks for slot in slots_of(chunk, group)] for group in groups)
    ids_N, positions_N, *slots_N = send((ids, positions, *slots), torch.long, decoder.device)
    step = Step(
        ids_N=ids_N,
        ple_ids_N=ids_N,
        positions_N=positions_N,
        query_start=query_start,
        kv_ranges={group: tuple(chunk.table.kv_range(group) for chunk in chunks) for group in groups},
        slot_mapping=dict(zip(groups, slots_N, strict=True)),
        logit_rows=None if len(logit_rows) == query_start[-1] else logit_rows,
        rope=decoder.rope_tables(positions_N),
        adapters=tuple(chunk.sequence.request.adapter for chunk in chunks),
    )
    return decoder.prepare(step)


def slots_of(chunk: ScheduledChunk, group: GroupId) -> list[int]:
    """Return the slot of each of a chunk's rows, which may follow rows of a step whose tokens are not known yet."""
    first = chunk.start - chunk.table.length
    return chunk.table.slot_mapping(group)[first : first + chunk.rows]
