"""Decode steps over memory that never moves: filled anew for every token, captured once as a CUDA graph and replayed.

Owns `GraphBuffers`, the static rows of a decode step with the sampling of its tokens, `CapturedSteps`, which keeps one for each
bucket of sequences and number of rows that each brings, and `CapturedStep`, a launched one. The host waits for nothing but the
tokens, and the step after may be launched before they come: its ids are already where the graph reads them. Without a GPU the
same code runs step by step, uncaptured. Steps with an adapter are never captured, and the ops of all others know no adapter: a
graph holds no address of a factor, so adapters may come and go without it. Refuses to know queues and page accounting. Read
`runner.py` for all other steps and for who launches ahead, `ops/triton/attn_metadata.py` for what kernels read.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.memory import most_pages
from gemcutter.engine.runner import (
    ChunkResult,
    PendingStep,
    StepResult,
    asks_of_last_row,
    rows_for_logits,
    sample_chunks,
    sampler_for,
)
from gemcutter.engine.sampler import SampledToken, SamplingRow
from gemcutter.engine.sampler_device import FLOATS, SamplingTensors, is_batchable, numbers_of, sample_batch
from gemcutter.engine.sampling import not_finite
from gemcutter.engine.scheduler import ON_DEVICE, ScheduledChunk
from gemcutter.engine.step import slots_of
from gemcutter.model.text import Decoder
from gemcutter.ops.step import ALIGNMENT, Step
from gemcutter.ops.types import StaticShape
from gemcutter.plan import GroupId

# Sequences of a captured step; fewer are padded. Close together, because a row of padding costs: it chooses experts as others do.
BUCKETS = (*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8))
MOST_ROWS = 8  # that a sequence brings: one to decode, and drafts or the short end of a prompt
WARM_UPS = 2  # runs before a capture: kernels are compiled and library handles made


class TokenSource(Enum):
    """What makes a step's tokens."""

    GREEDY = "greedy"  # the graph, each the arg max
    SAMPLED = "sampled"  # the graph, by `sample_batch`
    SAMPLER = "sampler"  # the engine's sampler, from the graph's logits, after the graph


@dataclass(frozen=True, slots=True)
class Place:
    """Where some numbers are in a buffer of bytes."""

    start: int
    dtype: torch.dtype
    size: int

    @property
    def end(self) -> int:
        """Return the first byte behind them."""
        return self.start + self.size * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        """Return them as a view of a buffer."""
        return buffer[self.start : self.end].view(self.dtype)


class PinnedBuffers:
    """Pinned memory of the host with the layout of a graph's numbers, and where its tokens come back."""

    def __init__(self, places: Mapping[Any, Place], nbytes: int, is_cuda: bool) -> None:
        self.numbers = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=is_cuda)
        self.put = {name: place.of(self.numbers).numpy() for name, place in places.items()}
        # Each row's token, and the bits of its largest logit as a double.
        self.found_2N = torch.zeros(2, places["ids"].size, dtype=torch.long, pin_memory=is_cuda)
        self.arrived: Any = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]


def _places(rows: int, sequences: int, widths: Mapping[GroupId, int]) -> dict[Any, Place]:
    """Lay out the numbers of a static step: ids first, each at a multiple of ALIGNMENT bytes."""
    wanted: list[tuple[Any, torch.dtype, int]] = [(name, torch.long, rows) for name in ("ids", "positions", "top_k")]
    wanted += [(("slots", group), torch.long, rows) for group in widths]
    wanted += [(name, torch.float64, rows) for name in FLOATS]
    wanted += [("rows at", torch.int32, rows)]
    for group, width in widths.items():
        wanted += [(("first", group), torch.int32, sequences), (("pages", group), torch.int32, sequences * width)]
    found, end = dict[Any, Place](), 0
    for name, dtype, size in wanted:
        found[name] = Place(-(-end // ALIGNMENT) * ALIGNMENT, dtype, size)
        end = found[name].end
    return found


class GraphBuffers:
    """The static step of a bucket of sequences with up to `each` rows, `each` apart.

    All of its numbers are in one buffer, ids first, so that one copy fills them. Every row gets the token after it.
    """

    def __init__(self, decoder: Decoder, pool: PagedKVCache, sequences: int, each: int, widths: Mapping[GroupId, int]) -> None:
        self.decoder, self.pool, self.sequences, self.each, self.widths = decoder, pool, sequences, each, widths
        self._places = _places(sequences * each, sequences, widths)
        nbytes, is_cuda = max(place.end for place in self._places.values()), decoder.device.type == "cuda"
        self._numbers = torch.zeros(nbytes, dtype=torch.uint8, device=decoder.device)
        # Two, because one may still be read while the next is written.
        self._pinned = [PinnedBuffers(self._places, nbytes, is_cuda) for _ in range(2)]
        self._sampling = SamplingTensors(**{name: self._at(name) for name in (*FLOATS, "top_k")})
        self.step = self._lay_out()
        self.found_2N = torch.zeros(2, len(self._at("ids")), dtype=torch.long, device=decoder.device)
        self._graphs: dict[TokenSource, torch.cuda.CUDAGraph] = {}
        self._logits_NV: Tensor | None = None  # of a step whose tokens the sampler chooses
        self._states_ND: dict[TokenSource, Tensor] = {}  # of each graph's last run

    def _at(self, name: Any) -> Tensor:
        return self._places[name].of(self._numbers)

    def _lay_out(self) -> Step:
        """Make the step whose tensors are views of the buffer, and each group's attention metadata over them."""
        device, starts = self.decoder.device, range(0, self.sequences * self.each + 1, self.each)
        ids, edges = self._at("ids"), torch.tensor(starts, dtype=torch.int32, device=device)
        owners = torch.arange(self.sequences, dtype=torch.int32, device=device).repeat_interleave(self.each)
        slots = {group: self._at(("slots", group)) for group in self.widths}
        metadata = {
            group: self.decoder.backend.static_metadata(
                positions_N=self._at("rows at"),
                row_sequence_N=owners,
                query_start_S1=edges,
                pages_SP=self._at(("pages", group)).view(self.sequences, width),
                first_S=self._at(("first", group)),
                page_tokens=self.pool.allocators[group].tokens,
                slot_mapping_N=slots[group],
                max_rows=self.each,
            )
            for group, width in self.widths.items()
        }
        return Step(
            ids_N=ids,
            ple_ids_N=ids,
            positions_N=self._at("positions"),
            query_start=tuple(starts),
            kv_ranges={},
            slot_mapping=slots,
            logit_rows=None,
            rope={},
            attn_metadata=metadata,
        )

    def write(self, chunks: Sequence[ScheduledChunk], pinned: PinnedBuffers) -> Tensor:
        """Write the numbers of some chunks and return those to send, bytes; rows that they lack are padding.

        Ids that only the device knows are not among them: they stay what the step before has put in their place.
        """
        put = pinned.put
        put["positions"][:] = put["rows at"][:] = -1
        for group in self.widths:
            put["slots", group][:] = -1
        for index, chunk in enumerate(chunks):
            low = index * self.each
            rows = slice(low, low + chunk.rows)
            put["ids"][rows] = chunk.ids
            put["positions"][rows] = put["rows at"][rows] = range(chunk.start, chunk.start + chunk.rows)
            self._put_sampling(put, low, chunk)
            for group in self.widths:
                first, pages = chunk.table.pages(group)
                start = index * self.widths[group]
                put["pages", group][start : start + len(pages)] = pages
                put["first", group][index] = first
                put["slots", group][rows] = slots_of(chunk, group)
        ids_are_there = any(ON_DEVICE in chunk.ids for chunk in chunks)
        return pinned.numbers[self._places["positions"].start if ids_are_there else 0 :]

    def send(self, numbers: Tensor) -> None:
        """Copy the last bytes of the step's numbers to where the step reads them."""
        self._numbers[len(self._numbers) - len(numbers) :].copy_(numbers, non_blocking=True)

    def _put_sampling(self, put: Mapping[Any, Any], low: int, chunk: ScheduledChunk) -> None:
        """Write how each row's token is sampled; nobody reads that of a row before the sampled ones."""
        request = chunk.sequence.request
        for row in range(chunk.rows):
            numbers = numbers_of(SamplingRow(request.sampling, chunk.sequence.seed, chunk.start + row + 1))
            for name, number in zip((*FLOATS, "top_k"), numbers, strict=True):
                put[name][low + row] = number

    def launch(self, source: TokenSource, is_captured: bool) -> None:
        """Run the step over the numbers that are there: replay its graph, captured before, or compute it."""
        if not is_captured:
            self._compute(source)
            return
        self._graphs[source].replay()

    def has_captured(self, source: TokenSource) -> bool:
        """Return whether there is a graph of the step."""
        return source in self._graphs

    def capture(self, source: TokenSource, memory: Any) -> None:
        """Capture the step over padding alone, which writes to no slot; `memory` is shared by all graphs of an engine."""
        self.send(self.write((), self._pinned[0]))
        side: Any = torch.cuda.Stream(self.decoder.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._compute(source)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Threads other than the engine's may use the device meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            self._compute(source)
        self._graphs[source] = graph

    def _compute(self, source: TokenSource) -> None:
        """Run the decoder, and put each row's next token where the next step's ids are read."""
        step, decoder = self.step, self.decoder
        with decoder.on_device():
            step.rope.update(decoder.rope_tables(step.positions_N))
            self._states_ND[source] = states_ND = decoder.run_layers(decoder.embed_rows(step), step, self.pool)
            logits_NV = decoder.lm_head(states_ND)
        if source is TokenSource.SAMPLER:
            self._logits_NV = logits_NV
            return
        if source is TokenSource.GREEDY:
            best_N, tokens_N = logits_NV.max(-1)
        else:
            tokens_N, best_N = sample_batch(logits_NV, self._sampling)
        self.found_2N[0].copy_(tokens_N)
        self.found_2N[1].view(torch.double).copy_(best_N)
        step.ids_N.copy_(tokens_N)

    def next_pinned(self) -> PinnedBuffers:
        """Return the idle one of the two pinned buffers: that of the step before the last one, whose tokens have come."""
        self._pinned.reverse()
        return self._pinned[0]

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Return the logits [R, V] of some rows of a step whose tokens the sampler chooses, on the device."""
        assert self._logits_NV is not None
        return self._logits_NV[torch.tensor(rows, device=self._logits_NV.device)]

    def states(self, source: TokenSource, rows: range) -> Tensor:
        """Return copies of the final states [R, D] of neighbouring rows of the last step that had its tokens from `source`."""
        return self._states_ND[source][rows.start : rows.stop].clone()


@dataclass(slots=True)
class CapturedStep:
    """A launched step over static memory; with `keeps_states` the states of sampled rows are part of its result."""

    chunks: Sequence[ScheduledChunk]
    buffers: GraphBuffers
    source: TokenSource
    pinned: PinnedBuffers
    is_followed: bool = False  # the step after it is launched
    keeps_states: bool = False

    @property
    def is_on_device(self) -> bool:
        """Return whether the graph itself chooses the tokens, and on all ranks the same.

        The largest of equal logits are equal, but ranks on GPUs of different kinds could round chances differently.
        """
        return self.source is TokenSource.GREEDY or (self.source is TokenSource.SAMPLED and self.buffers.decoder.ranks is None)

    def result(self) -> StepResult:
        """Wait for the tokens."""
        found = self._tokens()
        return (
            StepResult(tuple(map(self._with_states, range(len(self.chunks)), found))) if self.keeps_states else StepResult(found)
        )

    def _with_states(self, index: int, result: ChunkResult) -> ChunkResult:
        chunk = self.chunks[index]
        return replace(result, sampled_RD=self.buffers.states(self.source, self._rows(index, chunk, chunk.num_sampled)))

    def _tokens(self) -> tuple[ChunkResult, ...]:
        if self.source is TokenSource.SAMPLER:
            rows = [row for index, chunk in enumerate(self.chunks) for row in self._rows(index, chunk, rows_for_logits(chunk))]
            sampler = sampler_for(self.buffers.decoder)
            return tuple(sample_chunks(sampler, self.chunks, self.buffers.logits(rows)))
        if self.pinned.arrived is not None:
            self.pinned.arrived.synchronize()
        tokens, best = self.pinned.found_2N[0].tolist(), self.pinned.found_2N[1].view(torch.double).tolist()
        return tuple(
            _result([(tokens[row], best[row]) for row in self._rows(index, chunk, chunk.num_sampled)])
            for index, chunk in enumerate(self.chunks)
        )

    def _rows(self, index: int, chunk: ScheduledChunk, count: int) -> range:
        """Return the static rows that hold the last `count` rows of a chunk."""
        stop = index * self.buffers.each + chunk.rows
        return range(stop - count, stop)


class CapturedSteps:
    """The static steps of an engine, made when first needed."""

    def __init__(self, decoder: Decoder, pool: PagedKVCache, context: int, *, keeps_states: bool = False) -> None:
        self.decoder, self.pool, self.context, self.keeps_states = decoder, pool, context, keeps_states
        self.is_captured = decoder.device.type == "cuda"
        self._buffers: dict[tuple[int, int], GraphBuffers] = {}
        self._seen = set[tuple[int, int]]()  # of several rows each
        self._memory = torch.cuda.graph_pool_handle() if self.is_captured else None

    def accepts(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Return whether a step is a few rows of each of some sequences, all of whose next tokens are wanted.

        Steps of several rows each are left alone the first time they come: to capture one takes as long as many steps.
        """
        if not 0 < len(chunks) <= BUCKETS[-1] or not all(_is_plain(chunk) for chunk in chunks):
            return False
        sequences, each = _shape(chunks)
        if sequences * each > BUCKETS[-1]:
            return False
        is_known = each == 1 or (sequences, each) in self._seen
        self._seen.add((sequences, each))
        return is_known

    def launch(self, chunks: Sequence[ScheduledChunk]) -> CapturedStep:
        """Launch a step that `accepts` takes."""
        buffers = self.buffers(*_shape(chunks))
        if not all(_is_sampled_by_graph(chunk) for chunk in chunks):
            source = TokenSource.SAMPLER
        else:
            is_greedy = all(chunk.sequence.request.sampling.temperature == 0 for chunk in chunks)
            source = TokenSource.GREEDY if is_greedy else TokenSource.SAMPLED
        if self.is_captured and not buffers.has_captured(source):
            with self.decoder.together(lambda leader: leader.capture(self._shape_of(buffers, source), self.pool)):
                buffers.capture(source, self._memory)
        return self._launch(chunks, buffers, source)

    def capture(self, shape: StaticShape) -> None:
        """Capture a step as the leader of this rank does."""
        if self.is_captured:
            self.buffers(shape.sequences, shape.each).capture(TokenSource(shape.source), self._memory)

    def repeat(self, shape: StaticShape, numbers: Tensor) -> None:
        """Run a step as the leader of this rank does, over the numbers that it sends."""
        buffers = self.buffers(shape.sequences, shape.each)
        buffers.send(numbers)
        buffers.launch(TokenSource(shape.source), self.is_captured)

    def launch_after(self, pending: PendingStep, chunks: Sequence[ScheduledChunk]) -> CapturedStep:
        """Launch the step after one whose tokens have not come: the same rows, one position on."""
        assert isinstance(pending, CapturedStep)
        found = self._launch(chunks, pending.buffers, pending.source)
        pending.is_followed = True
        return found

    def withdraw(self) -> None:
        """Wait until no launched step reads or writes its memory any more."""
        if self.is_captured:
            torch.cuda.synchronize(self.decoder.device)

    def _launch(self, chunks: Sequence[ScheduledChunk], buffers: GraphBuffers, source: TokenSource) -> CapturedStep:
        pinned = buffers.next_pinned()
        numbers = buffers.write(chunks, pinned)
        with self.decoder.together(lambda leader: leader.static_step(self._shape_of(buffers, source), self.pool, numbers)):
            buffers.send(numbers)
            buffers.launch(source, self.is_captured)
        if source is not TokenSource.SAMPLER:
            pinned.found_2N.copy_(buffers.found_2N, non_blocking=True)
            if pinned.arrived is not None:
                pinned.arrived.record()
        return CapturedStep(chunks, buffers, source, pinned, keeps_states=self.keeps_states)

    def _shape_of(self, buffers: GraphBuffers, source: TokenSource) -> StaticShape:
        return StaticShape(self.context, buffers.sequences, buffers.each, source.value)

    def buffers(self, sequences: int, each: int) -> GraphBuffers:
        """Return the static step of a bucket of sequences with up to `each` rows."""
        if (sequences, each) not in self._buffers:
            widths = most_pages(self.decoder.plan, self.context, each)
            self._buffers[sequences, each] = GraphBuffers(self.decoder, self.pool, sequences, each, widths)
        return self._buffers[sequences, each]


def _result(found: Sequence[tuple[int, float]]) -> ChunkResult:
    """Return what a chunk's sampled rows brought: a token and the largest logit each."""
    if not all(math.isfinite(best) for _, best in found):
        return ChunkResult(error=not_finite())
    return ChunkResult(tuple(SampledToken(token) for token, _ in found))


def _shape(chunks: Sequence[ScheduledChunk]) -> tuple[int, int]:
    """Return the bucket of sequences, and the rows that the longest of them brings."""
    return BUCKETS[bisect_left(BUCKETS, len(chunks))], max(chunk.rows for chunk in chunks)


def _is_plain(chunk: ScheduledChunk) -> bool:
    is_short = chunk.rows <= MOST_ROWS and chunk.is_last
    request = chunk.sequence.request
    has_media = any(span.stop > chunk.start for span in request.media)
    return is_short and rows_for_logits(chunk) > 0 and not (chunk.reports or has_media) and request.adapter is None


def _is_sampled_by_graph(chunk: ScheduledChunk) -> bool:
    """Return whether a chunk's tokens can be chosen without its logits leaving the graph, and nothing else is asked of them."""
    request = chunk.sequence.request
    if not chunk.num_sampled or chunk.want_probs or asks_of_last_row(chunk):
        return False
    is_edited = request.sampling.alters_logits or bool(request.logits_processors or request.min_tokens)
    return not is_edited and request.sampling.logprobs is None and is_batchable(request.sampling)
