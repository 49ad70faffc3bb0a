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
    row_start = tuple(accumulate((work.rows for work in works), initial=0))
    keep = tuple(start + row for start, work in zip(row_start, works, strict=False) for row in work.kept_rows)
    windows = works[0].table.pool.books
    ids = chain.from_iterable(work.ids for work in works)
    positions = chain.from_iterable(range(work.table.length, work.table.length + work.rows) for work in works)
    slots = ([slot for work in works for slot in work.table.slots(window)] for window in windows)
    ids_N, positions_N, *slots_N = send((ids, positions, *slots), torch.long, decoder.device)
    return Step(
        ids_N=ids_N,
        ple_ids_N=ids_N,
        positions_N=positions_N,
        row_start=row_start,
        spans={window: tuple(work.table.span(window) for work in works) for window in windows},
        slots=dict(zip(windows, slots_N, strict=True)),
        keep=None if len(keep) == row_start[-1] else keep,
        rope=decoder.rope_tables(positions_N),
        adapters=tuple(work.sequence.request.adapter for work in works),
    )
