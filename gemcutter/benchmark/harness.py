"""Runs one test after the other on an engine: prompts of p rows, or n single rows, behind a context that is there already.

Owns the filling of contexts without computing them, and the timing. Speed does not depend on what keys and values are, only on
how many there are: slots are filled with normed random rows, and block tables say that positions are held, as they do after an
earlier turn. Refuses to know ceilings. Read `engine/engine.py` for what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.model.text import Decoder
from gemcutter.ops.reference import rms_norm

FILL_ROWS = 4096  # positions drawn at a time
WARM_UP_ROWS = 16
MAX_ROWS = 512  # of a step: what the engine takes by itself


@dataclass(frozen=True, slots=True)
class BenchCase:
    """`tokens` rows of a prompt at once ("pp"), or one by one ("tg") in `batch` sequences, after `depth` positions."""

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """Format the test as llama-bench does: pp512, tg128@d16384; 8 sequences are tg128x8."""
        many = f"x{self.batch}" if self.batch > 1 else ""
        return f"{self.kind}{self.tokens}{many}" + (f"@d{self.depth}" if self.depth else "")

    @property
    def total(self) -> int:
        """Count the tokens of all sequences."""
        return self.tokens * self.batch

    @property
    def context(self) -> int:
        """Count the positions that the test needs; one token more is chosen than computed."""
        return self.depth + self.tokens + 2


def list_cases(
    prompts: Sequence[int], replies: Sequence[int], depths: Sequence[int], batches: Sequence[int] = (1,)
) -> list[BenchCase]:
    """List all tests, those of one depth after the other; a size of 0 asks for none. Prompts run alone, replies in batches."""
    alone = [("pp", size, 1) for size in prompts if size]
    sizes = alone + [("tg", size, batch) for size in replies if size for batch in batches]
    return [BenchCase(kind, size, depth, batch) for depth in depths for kind, size, batch in sizes]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Replies, all of which had begun when the clock did: `tokens` came in `seconds` and `steps` after that."""

    replies: tuple[tuple[int, ...], ...]
    tokens: int
    steps: int
    seconds: float

    @property
    def speed(self) -> float:
        """Return the tokens a second."""
        return self.tokens / self.seconds


class BenchEngine:
    """An engine whose context is filled up to `depth`, for tests of that depth; sequences of a batch share it.

    Replies may follow prompts of `prompt_rows` rows. With a `speculator`, others of its kind may draft for some runs, and prompts
    may be run several times over the same context, which takes memory of its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        tests: Sequence[BenchCase],
        max_rows: int = MAX_ROWS,
        kv_dtype: torch.dtype | None = None,
        prompt_rows: int = 1,
        speculator: Speculator | None = None,
    ) -> None:
        self.decoder, self.depth = decoder, tests[0].depth
        assert all(test.depth == self.depth for test in tests)
        batch, context = max(test.batch for test in tests), max(test.context for test in tests) + prompt_rows - 1
        self._keeps_context = bool(speculator is not None and self.depth)  # for prompts to be run again, over the same keys
        sequences = batch + self._keeps_context  # one more, which does not run
        self.engine = Engine(
            decoder, context, max_rows, sequences, prefix_cache_bytes=None, kv_dtype=kv_dtype, speculator=speculator
        )
        self._draw = torch.Generator().manual_seed(0)
        self._held: tuple[tuple[int, ...], BlockTable] | None = None  # the context that prompts begin with, and its pages
        if self.depth:
            fill(self.engine.pool, decoder, self._draw)

    def warm_up(self) -> None:
        """Run a few rows through everything, so that no test pays for what happens once."""
        self.decode(self.draw(min(WARM_UP_ROWS, self.engine.context - self.depth - 2), 1), 2)

    def run(self, test: BenchCase, at_start: Callable[[], None] = lambda: None) -> float:
        """Run one test and give its seconds; `at_start` is called when they begin.

        Of a prompt they last until its first token is chosen, of a reply from then on, so that all of its steps have one row.
        """
        if test.kind == "tg":
            return self.decode(self.draw(1, test.batch), test.tokens + 1, at_start=at_start).seconds
        self._submit(self.draw(test.tokens, 1), 1, None)
        at_start()
        started = time.perf_counter()
        while self.engine.has_work:
            self._step({})
        return time.perf_counter() - started

    def draw(self, rows: int, batch: int) -> list[tuple[int, ...]]:
        """Draw prompts of so many rows behind the same context, which the engine takes for computed from now on."""
        held = tuple(torch.randint(self.decoder.plan.vocab, (self.depth,), generator=self._draw).tolist())
        if self._held is not None:
            self._held[1].release()
        table = hold(self.engine, held)
        if self._keeps_context:
            self._held = held, table
        else:
            table.release()
        owns = (torch.randint(self.decoder.plan.vocab, (rows,), generator=self._draw).tolist() for _ in range(batch))
        return [(*held, *own) for own in owns]

    def decode(
        self,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int,
        speculator: Speculator | None = None,
        at_start: Callable[[], None] = lambda: None,
    ) -> Decoded:
        """Decode the replies to some prompts side by side, greedily and past any end, with drafts by `speculator`.

        `at_start` is called when all have begun, and the clock starts.
        """
        replies = self._submit(prompts, max_tokens, speculator)
        while not all(replies.values()):
            self._step(replies)
        begun, steps = sum(map(len, replies.values())), self.engine.stats().steps
        at_start()
        started = time.perf_counter()
        while self.engine.has_work:
            self._step(replies)
        seconds = time.perf_counter() - started
        found = tuple(map(tuple, replies.values()))
        return Decoded(found, sum(map(len, found)) - begun, self.engine.stats().steps - steps, seconds)

    def _submit(self, prompts: Sequence[tuple[int, ...]], max_tokens: int, speculator: Speculator | None) -> dict[int, list[int]]:
        """Queue prompts, and return a list for the tokens of each."""
        if self._held is not None:
            remember(self.engine, *self._held)
        self.engine.speculator = self.engine.scheduler.proposer = speculator
        return {self.engine.submit(Request(ids, max_tokens=max_tokens)): [] for ids in prompts}

    def _step(self, replies: Mapping[int, list[int]]) -> None:
        for event in self.engine.step():
            if event.error is not None:
                raise event.error
            if event.token is not None and replies:
                replies[event.request].append(event.token)


def hold(engine: Engine, ids: tuple[int, ...]) -> BlockTable:
    """Make the engine remember `ids` as computed, and nothing else: a prompt that begins with them continues from there.

    Returns the table that holds their pages, so that `remember` can do so again later, with the same keys and values.
    """
    while engine.prefix.evict():
        pass
    table = BlockTable(engine.pool)
    while table.length < len(ids):
        table.reserve(min(engine.scheduler.max_batched_tokens, len(ids) - table.length))
        table.commit(table.reserved)
    remember(engine, ids, table)
    return table


def remember(engine: Engine, ids: tuple[int, ...], table: BlockTable) -> None:
    """Make the engine remember `ids`, whose pages a table holds, and nothing else."""
    while engine.prefix.evict():
        pass
    engine.prefix.keep(ids, table)


def fill(pool: PagedKVCache, decoder: Decoder, draw: torch.Generator) -> None:
    """Fill every slot of a pool with rows as layers write them: normed, keys with their norm's weight; one draw over and over."""
    for layer in decoder.plan.writers:
        shape = (FILL_ROWS, layer.kv_heads, layer.head_dim)
        weight = decoder.params[f"layers.{layer.index}.attn.k_norm"]
        assert isinstance(weight, torch.Tensor)
        keys, values = (rms_norm(torch.randn(shape, generator=draw), norm, decoder.plan.eps) for norm in (weight, None))
        keys, values = keys.to(decoder.device, decoder.dtype), values.to(decoder.device, decoder.dtype)
        book = pool.allocators[layer.group]
        num_slots = book.tokens * len(book.ref_counts)
        for start in range(0, num_slots, FILL_ROWS):
            slots = torch.arange(start, min(start + FILL_ROWS, num_slots), device=decoder.device)
            pool.write(layer.index, slots, keys[: len(slots)], values[: len(slots)])
