"""Builds the flat rows of one step from scheduled work.

Owns the order of rows and the translation of block tables to slots and spans; refuses to know why the work was chosen. Read
`ops/step.py` for the type.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch

from gemcutter.engine.scheduler import Work
from gemcutter.engine.threads import one_thread
from gemcutter.model.text import Decoder
from gemcutter.ops.step import Step, send


@one_thread()
def build_step(decoder: Decoder, works: Sequence[Work]) -> Step:
    """Lay the works' rows out one after the other, in order."""
    query_start = tuple(accumulate((work.rows for work in works), initial=0))
    logit_rows = tuple(start + row for start, work in zip(query_start, works, strict=False) for row in work.kept_rows)
    groups = works[0].table.cache.allocators
    ids = chain.from_iterable(work.ids for work in works)
    positions = chain.from_iterable(range(work.table.length, work.table.length + work.rows) for work in works)
    slots = ([slot for work in works for slot in work.table.slot_mapping(group)] for group in groups)
    ids_N, positions_N, *slots_N = send((ids, positions, *slots), torch.long, decoder.device)
    step = Step(
        ids_N=ids_N,
        ple_ids_N=ids_N,
        positions_N=positions_N,
        query_start=query_start,
        kv_ranges={group: tuple(work.table.kv_range(group) for work in works) for group in groups},
        slot_mapping=dict(zip(groups, slots_N, strict=True)),
        logit_rows=None if len(logit_rows) == query_start[-1] else logit_rows,
        rope=decoder.rope_tables(positions_N),
        adapters=tuple(work.sequence.request.adapter for work in works),
    )
    return decoder.prepare(step)
