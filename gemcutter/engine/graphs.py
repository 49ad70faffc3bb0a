"""Decode steps over memory that never moves: filled anew for every token, captured once as a CUDA graph and replayed.

Owns `Slate`, the static rows of a decode step with the choice of its tokens, `Graphs`, which keeps one for each bucket of
sequences and number of rows that each brings, and `Flight`, a step that was launched and whose tokens are on their way. The host
waits for nothing but these tokens, and the step after may be launched before they land: its ids are already where the graph reads
them. Without a GPU the same code runs step by step, uncaptured. Refuses to know queues and page accounting. Read `runner.py` for
all other steps, `engine.py` for who launches ahead, `ops/cuda_step.py` for what kernels read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.draw import FLOATS, Draws, can_draw, draw, numbers_of
from gemcutter.engine.memory import most_pages
from gemcutter.engine.request import Event
from gemcutter.engine.runner import choose_one, needs_logits
from gemcutter.engine.scheduler import Work
from gemcutter.model.text import Decoder
from gemcutter.ops.step import ALIGNMENT, Step
from gemcutter.ops.triton.attn_metadata import TritonAttnMetadata
from gemcutter.plan import GroupId

# Sequences of a captured step; fewer are padded. Close together, because a row of padding costs: it chooses experts as others do.
BUCKETS = (*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8))
MOST_ROWS = 8  # that a sequence brings: one to decode, and drafts or the short end of a prompt
WARM_UPS = 2  # runs before a capture: kernels are compiled and library handles made


class Choice(Enum):
    """Where a step's tokens are chosen."""

    GREEDY = "greedy"  # by the graph, each the arg max
    DRAWN = "drawn"  # by the graph, as `draw.py` does
    ON_HOST = "on host"  # from logits that the host gets


@dataclass(frozen=True, slots=True)
class Place:
    """Where some numbers lie in a buffer of bytes."""

    start: int
    dtype: torch.dtype
    size: int

    @property
    def end(self) -> int:
        """Give the first byte behind them."""
        return self.start + self.size * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        """View them in a buffer."""
        return buffer[self.start : self.end].view(self.dtype)


class Staging:
    """Pinned memory of the host with the layout of a slate's numbers, and where its tokens come back."""

    def __init__(self, places: Mapping[Any, Place], nbytes: int, is_cuda: bool) -> None:
        self.numbers = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=is_cuda)
        self.put = {name: place.of(self.numbers).numpy() for name, place in places.items()}
        self.tokens_N = torch.zeros(places["ids"].size, dtype=torch.long, pin_memory=is_cuda)
        self.landed: Any = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]


def _places(rows: int, sequences: int, widths: Mapping[GroupId, int]) -> dict[Any, Place]:
    """Lay out the numbers of a slate: ids first, each at a multiple of ALIGNMENT bytes."""
    wanted: list[tuple[Any, torch.dtype, int]] = [(name, torch.long, rows) for name in ("ids", "positions", "top_k")]
    wanted += [(("slots", window), torch.long, rows) for window in widths]
    wanted += [(name, torch.float64, rows) for name in FLOATS]
    wanted += [("rows at", torch.int32, rows)]
    for window, width in widths.items():
        wanted += [(("first", window), torch.int32, sequences), (("pages", window), torch.int32, sequences * width)]
    found, end = dict[Any, Place](), 0
    for name, dtype, size in wanted:
        found[name] = Place(-(-end // ALIGNMENT) * ALIGNMENT, dtype, size)
        end = found[name].end
    return found


class Slate:
    """The static step of a bucket of sequences with up to `each` rows, which lie `each` apart.

    All of its numbers lie in one buffer, ids first, so that one copy fills them. Every row gets the token after it.
    """

    def __init__(self, decoder: Decoder, pool: PagedKVCache, sequences: int, each: int, widths: Mapping[GroupId, int]) -> None:
        self.decoder, self.pool, self.sequences, self.each, self.widths = decoder, pool, sequences, each, widths
        self._places = _places(sequences * each, sequences, widths)
        nbytes, is_cuda = max(place.end for place in self._places.values()), decoder.device.type == "cuda"
        self._numbers = torch.zeros(nbytes, dtype=torch.uint8, device=decoder.device)
        # Two, because one may still be read while the next is written.
        self._stagings = [Staging(self._places, nbytes, is_cuda) for _ in range(2)]
        self._draws = Draws(**{name: self._at(name) for name in (*FLOATS, "top_k")})
        self.step = self._lay_out()
        self._graphs: dict[Choice, torch.cuda.CUDAGraph] = {}
        self._logits: Tensor | None = None  # of a step whose tokens the host chooses

    def _at(self, name: Any) -> Tensor:
        return self._places[name].of(self._numbers)

    def _lay_out(self) -> Step:
        """Make the step whose tensors are views of the buffer, and each group's `Paged` over them."""
        device, starts = self.decoder.device, range(0, self.sequences * self.each + 1, self.each)
        ids, edges = self._at("ids"), torch.tensor(starts, dtype=torch.int32, device=device)
        owners = torch.arange(self.sequences, dtype=torch.int32, device=device).repeat_interleave(self.each)
        slots = {window: self._at(("slots", window)) for window in self.widths}
        metadata = {
            group: TritonAttnMetadata(
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

    def fill(self, works: Sequence[Work], staging: Staging, ids_are_there: bool = False) -> None:
        """Write the numbers of some works and send them; rows that they lack are padding.

        With `ids_are_there` the ids stay what the step before has put in their place.
        """
        put = staging.put
        put["positions"][:] = put["rows at"][:] = -1
        for window in self.widths:
            put["slots", window][:] = -1
        for index, work in enumerate(works):
            low, at = index * self.each, work.table.length
            rows = slice(low, low + work.rows)
            if not ids_are_there:
                put["ids"][rows] = work.ids
            put["positions"][rows] = put["rows at"][rows] = range(at, at + work.rows)
            for row in range(work.rows):
                numbers = numbers_of(work.sequence.request, work.sequence.seed, at + row + 1)
                for name, number in zip((*FLOATS, "top_k"), numbers, strict=True):
                    put[name][low + row] = number
            for window in self.widths:
                first, pages = work.table.pages(window)
                start = index * self.widths[window]
                put["pages", window][start : start + len(pages)] = pages
                put["first", window][index] = first
                put["slots", window][rows] = work.table.slot_mapping(window)
        start = self._places["positions"].start if ids_are_there else 0
        self._numbers[start:].copy_(staging.numbers[start:], non_blocking=True)

    def launch(self, choice: Choice, is_captured: bool) -> None:
        """Run the step over the numbers that are there: replay its graph, captured at the first call."""
        if not is_captured:
            self._compute(choice)
            return
        self._graphs[choice].replay()

    def capture(self, choice: Choice, memory: Any) -> None:
        """Capture the step over padding alone, which writes to no slot; `memory` is shared by all graphs of an engine."""
        if choice in self._graphs:
            return
        self.fill((), self._stagings[0])
        side: Any = torch.cuda.Stream(self.decoder.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._compute(choice)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            self._compute(choice)
        self._graphs[choice] = graph

    def _compute(self, choice: Choice) -> None:
        """Run the decoder, and put each row's next token where the next step's ids are read."""
        step = self.step
        step.rope.update(self.decoder.rope_tables(step.positions_N))
        logits = self.decoder.logits(self.decoder.forward(step, self.pool))
        if choice is Choice.GREEDY:
            step.ids_N.copy_(logits.argmax(-1))
        elif choice is Choice.DRAWN:
            step.ids_N.copy_(draw(logits, self._draws))
        else:
            self._logits = logits

    def next_staging(self) -> Staging:
        """Give the memory of the flight before the last one, which has landed."""
        self._stagings.reverse()
        return self._stagings[0]

    def logits(self) -> Tensor:
        """Give the logits [B, V] of a step whose tokens the host chooses; on the host."""
        assert self._logits is not None
        return self._logits.cpu()


@dataclass(slots=True)
class Flight:
    """A launched step."""

    works: Sequence[Work]
    slate: Slate
    choice: Choice
    staging: Staging
    is_committed: bool = False  # its rows count as computed, because the step after them is on its way

    def land(self) -> list[Event | None]:
        """Wait for the tokens, and give each work's choice."""
        lasts = [index * self.slate.each + work.rows - 1 for index, work in enumerate(self.works)]
        if self.choice is Choice.ON_HOST:
            logits = self.slate.logits()
            return [choose_one(work.sequence, logits[row]) for work, row in zip(self.works, lasts, strict=True)]
        if self.staging.landed is not None:
            self.staging.landed.synchronize()
        tokens = self.staging.tokens_N.tolist()
        return [Event(work.sequence.number, tokens[row]) for work, row in zip(self.works, lasts, strict=True)]


class Graphs:
    """The slates of an engine, made when first needed."""

    def __init__(self, decoder: Decoder, pool: PagedKVCache, context: int) -> None:
        self.decoder, self.pool, self.context = decoder, pool, context
        self.is_captured = decoder.device.type == "cuda"
        self._slates: dict[tuple[int, int], Slate] = {}
        self._seen = set[tuple[int, int]]()  # of several rows each
        self._memory = torch.cuda.graph_pool_handle() if self.is_captured else None

    def accepts(self, works: Sequence[Work]) -> bool:
        """Tell whether a step is a few rows of each of some sequences, all of whose next tokens are wanted.

        Steps of several rows each are left alone the first time they come: to capture one takes as long as many steps.
        """
        if not 0 < len(works) <= BUCKETS[-1] or not all(_is_plain(work) for work in works):
            return False
        sequences, each = _shape(works)
        if sequences * each > BUCKETS[-1]:
            return False
        is_known = each == 1 or (sequences, each) in self._seen
        self._seen.add((sequences, each))
        return is_known

    def launch(self, works: Sequence[Work]) -> Flight:
        """Launch a step that `accepts` takes."""
        slate = self._slate(*_shape(works))
        requests = [work.sequence.request for work in works]
        if not all(can_draw(work.sequence.request, work.sequence.in_prompt) for work in works):
            choice = Choice.ON_HOST
        else:
            choice = Choice.GREEDY if all(request.sampling.temperature == 0 for request in requests) else Choice.DRAWN
        if self.is_captured:
            slate.capture(choice, self._memory)
        return self._launch(works, slate, choice, ids_are_there=False)

    def launch_after(self, flight: Flight, works: Sequence[Work]) -> Flight:
        """Launch the step after one whose tokens have not landed: the same rows, one position on."""
        return self._launch(works, flight.slate, flight.choice, ids_are_there=True)

    def _launch(self, works: Sequence[Work], slate: Slate, choice: Choice, ids_are_there: bool) -> Flight:
        staging = slate.next_staging()
        slate.fill(works, staging, ids_are_there)
        slate.launch(choice, self.is_captured)
        if choice is not Choice.ON_HOST:
            staging.tokens_N.copy_(slate.step.ids_N, non_blocking=True)
            if staging.landed is not None:
                staging.landed.record()
        return Flight(works, slate, choice, staging)

    def _slate(self, sequences: int, each: int) -> Slate:
        if (sequences, each) not in self._slates:
            widths = most_pages(self.decoder.plan, self.context, each)
            self._slates[sequences, each] = Slate(self.decoder, self.pool, sequences, each, widths)
        return self._slates[sequences, each]


def _shape(works: Sequence[Work]) -> tuple[int, int]:
    """Give the bucket of sequences, and the rows that the longest of them brings."""
    return BUCKETS[bisect_left(BUCKETS, len(works))], max(work.rows for work in works)


def _is_plain(work: Work) -> bool:
    sequence = work.sequence
    has_report = sequence.in_prompt and sequence.request.wants_all_rows
    is_short = work.rows <= MOST_ROWS and work.is_last_chunk
    return is_short and needs_logits(sequence) and not has_report and sequence.request.adapter is None
