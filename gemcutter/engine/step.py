"""Builds the flat rows of one step from scheduled chunks.

Owns the order of rows and the translation of block tables to slots and KV ranges; refuses to know why the chunks were chosen.
Read `ops/step.py` for the type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from gemcutter.engine.media import MediaSpan
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.threads import one_thread
from gemcutter.model.text import Decoder
from gemcutter.ops.step import MediaRows, Step, send
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
    spans = list(_media(chunks, query_start))
    blocks = [each for each in spans if each.span.is_block] if decoder.plan.bidirectional else []
    ahead = (_last_visible(chunks, blocks),) if blocks else ()
    ids_N, positions_N, *rest = send((ids, positions, *ahead, *slots), torch.long, decoder.device)
    windowed = [group for group, window in chunks[0].table.cache.windows.items() if window is not None]
    last_visible = dict.fromkeys(windowed, rest.pop(0)) if ahead else {}
    slots_N, media = rest, _media_rows(spans, decoder.device)
    step = Step(
        ids_N=ids_N,
        ple_ids_N=ids_N if media is None else ids_N.index_fill(0, media.rows_K, decoder.plan.pad_id),
        positions_N=positions_N,
        query_start=query_start,
        kv_ranges={group: tuple(chunk.table.kv_range(group) for chunk in chunks) for group in groups},
        slot_mapping=dict(zip(groups, slots_N, strict=True)),
        logit_rows=None if len(logit_rows) == query_start[-1] else logit_rows,
        rope=decoder.rope_tables(positions_N),
        last_visible=last_visible,
        media=media,
        adapters=tuple(chunk.sequence.request.adapter for chunk in chunks),
    )
    return decoder.prepare(step)


@dataclass(frozen=True, slots=True)
class _SpanRows:
    """The part of a span that is in a step: the row where it begins, and which rows of the span it has."""

    span: MediaSpan
    row: int
    first: int
    stop: int


def _media(chunks: Sequence[ScheduledChunk], query_start: Sequence[int]) -> Iterator[_SpanRows]:
    """Yield the parts of media spans that are among the chunks' rows."""
    for chunk, row in zip(chunks, query_start, strict=False):
        for span in chunk.sequence.request.media:
            low, high = max(span.start, chunk.start), min(span.stop, chunk.start + chunk.rows)
            if low < high:
                yield _SpanRows(span, row + low - chunk.start, low - span.start, high - span.start)


def _media_rows(spans: Sequence[_SpanRows], device: torch.device) -> MediaRows | None:
    """Return what enters the layers in place of tokens; None where nothing does."""
    if not spans:
        return None
    rows = chain.from_iterable(range(each.row, each.row + each.stop - each.first) for each in spans)
    (rows_K,) = send((rows,), torch.long, device)
    return MediaRows(rows_K, torch.cat([each.span.embeds_KD[each.first : each.stop].to(device) for each in spans]))


def _last_visible(chunks: Sequence[ScheduledChunk], blocks: Sequence[_SpanRows]) -> list[int]:
    """Return the last position that each row sees: a block's last, else its own."""
    found = [position for chunk in chunks for position in range(chunk.start, chunk.start + chunk.rows)]
    for each in blocks:
        rows = each.stop - each.first
        found[each.row : each.row + rows] = [each.span.stop - 1] * rows
    return found


def slots_of(chunk: ScheduledChunk, group: GroupId) -> list[int]:
    """Return the slot of each of a chunk's rows, which may follow rows of a step whose tokens are not known yet."""
    first = chunk.start - chunk.table.length
    return chunk.table.slot_mapping(group)[first : first + chunk.rows]
