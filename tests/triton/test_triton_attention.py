"""Triton attention against its definition: ragged sequences, shuffled pages, every head dim, window, split and way of storage.

A `World` holds one layer's pool, in which all slots but those of the sequences hold NaN, and the step that reads it. `expected`
attends key by key in float64. Knows nothing of who wrote the keys. Read `test_cuda_step.py` for the pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.engine.memory import compact_weights, page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.ops import reference
from gemcutter.ops.step import KVRange, Step, prepare
from gemcutter.ops.triton import attention, attn_metadata
from gemcutter.ops.types import OpContext
from gemcutter.plan import GLOBAL_GROUP, Attn, LayerPlan, ModelPlan, Proj, RopeSpec, group_of
from tests.triton.decoders import decode_with, prompt

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
Part = tuple[int, int]  # of one sequence: committed positions, and rows of this step


@dataclass(frozen=True)
class Case:
    """The geometry of a layer, the sequences of a step, and how keys are stored; `turned` columns make the layer compact."""

    parts: tuple[Part, ...]
    heads: int = 4
    key_heads: int = 2
    dim: int = 16
    window: int | None = None
    page: int = 16
    rows: torch.dtype = torch.float32
    pool: torch.dtype | None = None
    rotary_dims: int = 0

    def layer(self) -> LayerPlan:
        attn = Attn.GLOBAL if self.window is None else Attn.SLIDING
        proj, rope = Proj.QK_ONLY if self.rotary_dims else Proj.QKV, RopeSpec(1e4, self.dim, (self.rotary_dims or self.dim) // 2)
        return LayerPlan(0, attn, proj, 0, "self", self.heads, self.key_heads, self.dim, self.window, rope, 4, None, 0)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class World:
    """One layer's pool, a step over it, and the step's queries."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.layer, self.device = case, case.layer(), device
        spans = list(self._spans())
        pages = 3 + max((page for span in spans for page in span.pages), default=0)
        weight = 1 + normal(case.dim, seed=1).abs()
        self.plan = ModelPlan((self.layer,), 8, 8, None, 1e-6, 9999, 0, 0, 0, True, False)
        compact = {0: weight} if case.rotary_dims else None
        dtype = case.pool or case.rows
        self.pool = PagedKVCache(self.plan, {group_of(case.window): PoolSize(pages, case.page)}, dtype, device, compact)
        for tensor in (*self.pool.keys.values(), *self.pool.values.values()):
            tensor.fill_(torch.nan)
        self.slots = [self._write(span, start + rows, weight) for span, (start, rows) in zip(spans, case.parts, strict=True)]
        spans = [replace(span, where=slots) for span, slots in zip(spans, self.slots, strict=True)]
        positions = torch.cat([torch.arange(start, start + rows) for start, rows in case.parts]).to(device)
        query_start = tuple(itertools.accumulate((rows for _, rows in case.parts), initial=0))
        ranges = {self.layer.group: tuple(spans)}
        self.step = prepare(Step(positions, positions, positions, query_start, ranges, {}, None, {}), attn_metadata.build)
        self.q_NHE = (normal(query_start[-1], case.heads, case.dim, seed=2) * case.dim**-0.5).to(device, case.rows)

    def _spans(self) -> Iterator[KVRange]:
        """Allocate to every sequence pages from all over the pool, without those that its window has passed."""
        case = self.case
        sizes = []
        for start, rows in case.parts:
            first = 0 if case.window is None else max(0, start - case.window + 1) // case.page
            sizes.append((first, -(-(start + rows) // case.page) - first))
        order = torch.randperm(sum(size for _, size in sizes) + 2, generator=torch.Generator().manual_seed(3)).tolist()
        for first, size in sizes:
            yield KVRange(first * case.page, slice(0), tuple(order.pop() for _ in range(size)), case.page)

    def _write(self, span: KVRange, stop: int, weight: Tensor) -> Tensor:
        """Fill a sequence's slots; keys of a compact layer are its weighted values but for the columns that turn."""
        case = self.case
        slots = (torch.tensor(span.pages, dtype=torch.long)[:, None] * case.page + torch.arange(case.page)).flatten()[
            : stop - span.start
        ]
        shape = (len(slots), case.key_heads, case.dim)
        keys, values = normal(*shape, seed=5 + stop), normal(*shape, seed=6 + stop)
        if case.rotary_dims:
            still = torch.arange(case.dim) % (case.dim // 2) >= case.rotary_dims // 2
            keys = torch.where(still, values * weight, keys)
        self.pool.write(0, slots.to(self.device), keys.to(self.device), values.to(self.device))
        return slots.to(self.device)

    def _read(self, span: KVRange) -> tuple[Tensor, Tensor]:
        """Read a sequence's keys and values; compact keys in float32, as kernels have them, not rounded to the pool's dtype."""
        compact = self.pool.compact(0)
        wide = compact and replace(compact, normed_TKE=compact.normed_TKE.float())
        keys, values = self.pool.read(0, span)
        return (wide.keys(span.where) if wide else keys), values

    def attend(self, step: Step | None = None) -> Tensor:
        return attention.build_attention(self.layer)(self.q_NHE, step or self.step, self.pool)

    def expected(self, last: Rows[int] | None = None) -> Tensor:
        """Attend in float64, each row by itself; `last` is the last position that it may see."""
        case, group = self.case, self.case.heads // self.case.key_heads
        out, positions = torch.zeros(self.q_NHE.shape, dtype=torch.float64), self.step.positions_N.tolist()
        for s, span in enumerate(self.step.kv_ranges[group_of(case.window)]):
            keys, values = (x.cpu().double().repeat_interleave(group, 1) for x in self._read(span))
            for n in range(self.step.query_start[s], self.step.query_start[s + 1]):
                oldest = 0 if case.window is None else max(0, positions[n] - case.window + 1)
                seen = slice(oldest - span.start, max(positions[n], last[n] if last else 0) + 1 - span.start)
                scores = torch.einsum("he,the->ht", self.q_NHE[n].cpu().double(), keys[seen])
                out[n] = torch.einsum("ht,the->he", scores.softmax(-1), values[seen])
        return out


def assert_close(found: Tensor, expected: Tensor) -> None:
    error = (found.cpu().double() - expected).abs().max().item()
    assert error <= TOLERANCE[found.dtype] * max(1.0, expected.abs().max().item())  # NaN is no less


DECODE = ((0, 1), (299, 1), (15, 1), (16, 1))
DRAFTS = ((140, 3), (0, 1), (270, 4), (5, 2))
RAGGED = ((0, 37), (50, 1), (0, 0), (20, 9), (133, 8), (3, 16))
CASES = {
    "decode": Case(DECODE),
    "decode of one short sequence": Case(((9, 1),)),
    "drafts": Case(DRAFTS),
    "ragged": Case(RAGGED),
    "one prompt": Case(((0, 70),)),
    "one chunk": Case(((90, 40),)),
    "decode in a window": Case(DECODE, window=130),
    "drafts in a window of a few keys": Case(DRAFTS, window=3),
    "ragged in a window": Case(RAGGED, window=24),
    "ragged in a window of one key": Case(RAGGED, window=1),
    "one key head for all": Case(DRAFTS, heads=8, key_heads=1),
    "one key head each": Case(RAGGED, heads=2, key_heads=2),
    "groups of three": Case(RAGGED, heads=6, key_heads=2),
    "drafts in groups of three": Case(DRAFTS, heads=3, key_heads=1),
    "more heads than a tile has rows": Case(((40, 20), (10, 2)), heads=32, key_heads=1),
    "wide pages": Case(RAGGED, page=64),
    "one huge page": Case(((200, 2),), page=1008),
    "dim 64": Case(((140, 2), (0, 1)), dim=64, page=32),
    "dim 128": Case(RAGGED, dim=128, page=64, rows=torch.bfloat16),
    "dim 256": Case(((140, 3), (0, 1)), dim=256, page=64, rows=torch.bfloat16, window=70),
    "dim 256 ragged": Case(RAGGED, dim=256, page=64, rows=torch.bfloat16, window=70),
    "dim 512": Case(((140, 2), (3, 1)), dim=512, page=64, rows=torch.bfloat16),
    "dim 512 ragged": Case(((0, 40), (70, 2)), dim=512, page=64, rows=torch.bfloat16),
    "float16": Case(((140, 2),), dim=64, rows=torch.float16),
    "narrow pool": Case(((140, 2), (5, 1)), pool=torch.bfloat16),
    "8-bit pool": Case(((140, 2), (5, 1)), rows=torch.bfloat16, pool=torch.float8_e4m3fn),
    "8-bit pool ragged": Case(((20, 9), (3, 1)), rows=torch.bfloat16, pool=torch.float8_e4m3fn),
    "compact decode": Case(DECODE, dim=64, rotary_dims=16),
    "compact drafts, few columns turn": Case(DRAFTS, dim=32, rotary_dims=4),
    "compact ragged": Case(RAGGED, dim=32, rotary_dims=20),
    "compact in a window": Case(RAGGED, dim=32, rotary_dims=8, window=24),
    "compact dim 512": Case(((150, 2), (3, 9)), dim=512, page=64, rotary_dims=128, rows=torch.bfloat16),
    "compact 8-bit pool": Case(((140, 2), (5, 1)), dim=32, rotary_dims=8, rows=torch.bfloat16, pool=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_see_their_keys_and_no_others(name: str, device: torch.device) -> None:
    world = World(CASES[name], device)
    assert_close(world.attend(), world.expected())


@pytest.mark.parametrize("window", [None, 40])
def test_agrees_with_the_reference(window: int | None, device: torch.device) -> None:
    world = World(Case(RAGGED, window=window), device)
    expected = reference.build_attention(world.plan, world.layer, {}, OpContext(reference.linear))(
        world.q_NHE, world.step, world.pool
    )
    assert_close(world.attend(), expected.cpu().double())


def test_kept_rows_attend_alone(device: torch.device) -> None:
    world = World(Case(RAGGED), device)
    whole, keep = world.attend(), [0, 36, 37, 46, 70]
    kept = prepare(replace(world.step, logit_rows=tuple(keep)), attn_metadata.build).remaining
    world.q_NHE = world.q_NHE[keep]
    assert_close(world.attend(kept), whole[keep].cpu().double())


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("parts", [((40, 6), (3, 4)), ((0, 30), (20, 20))])
def test_media_rows_see_all_of_their_block(parts: tuple[Part, ...], window: int | None, device: torch.device) -> None:
    world = World(Case(parts, window=window), device)
    positions = world.step.positions_N.tolist()
    ends = [start + rows - 1 for start, rows in parts]  # of the last block of every sequence
    last = [ends[0] if 41 <= p <= 44 or 5 <= p <= 25 else p for p in positions[: parts[0][1]]]
    last += [min(p + 2, ends[1]) for p in positions[parts[0][1] :]]
    step = replace(world.step, last_visible=dict.fromkeys(world.step.kv_ranges, torch.tensor(last, device=device)))
    assert_close(world.attend(prepare(step, attn_metadata.build)), world.expected(last))


@pytest.mark.parametrize("max_rows", [2, 40])
def test_padding_rows_are_zero_and_spare_tables_are_not_read(max_rows: int, device: torch.device) -> None:
    """A captured graph runs over buffers that are larger than the step in them."""
    world = World(Case(((200, 2), (17, 1))), device)
    here = attn_metadata.of_group(world.step, GLOBAL_GROUP)
    wide = torch.full((4, 40), 999, dtype=torch.int32, device=device)  # pages that no pool has
    wide[:2, : here.pages_SP.shape[1]] = here.pages_SP
    padded = attn_metadata.TritonAttnMetadata(
        positions_N=torch.tensor([200, 201, 17, -1, -1], dtype=torch.int32, device=device),
        row_sequence_N=torch.tensor([0, 0, 1, 2, 3], dtype=torch.int32, device=device),
        query_start_S1=torch.tensor([0, 2, 3, 4, 5], dtype=torch.int32, device=device),
        pages_SP=wide,
        first_S=torch.zeros(4, dtype=torch.int32, device=device),
        page_tokens=16,
        slot_mapping_N=None,
        max_rows=max_rows,
    )
    expected = world.expected()
    world.q_NHE = torch.cat([world.q_NHE, world.q_NHE[:2]])
    found = world.attend(replace(world.step, attn_metadata={GLOBAL_GROUP: padded}))
    assert_close(found[:3], expected)
    assert not found[3:].any()


def test_nothing_is_launched_for_no_rows(device: torch.device) -> None:
    world = World(Case(((5, 0), (9, 0))), device)
    assert world.attend().shape == (0, 4, 16)


def test_splits_fill_the_machine_and_no_more() -> None:
    machine = attention.Machine(132, 232_448)
    assert attention.num_splits(1, 1 << 17, machine) == attention.MAX_SPLITS
    assert attention.num_splits(8, 512, machine) == 8  # of a window of 512 keys, each a block
    assert attention.num_splits(8, 1 << 17, machine) == 32
    assert attention.num_splits(8 * 32, 1 << 17, machine) == 1
    assert attention.num_splits(1, 16, machine) == 1


@pytest.mark.parametrize("dim", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("shared_bytes", [101_376, 166_912, 232_448])
def test_every_machine_has_a_shape(dim: int, shared_bytes: int) -> None:
    machine = attention.Machine(1, shared_bytes)
    decode = attention.short_launch(dim, 8, 1, torch.bfloat16, torch.bfloat16, machine)
    drafts = attention.short_launch(dim, 8, 5, torch.bfloat16, torch.bfloat16, machine)
    prefill = attention.long_launch(dim, 8, torch.bfloat16, machine)
    for launch in (decode, drafts, prefill):
        blocks = dim * launch.block_n * 2 * 2 * max(1, launch.stages - 1)  # keys and values on their way, in 16 bits
        assert blocks <= shared_bytes
    assert decode.block_m < drafts.block_m <= prefill.block_m


def test_a_layer_writes_and_reads_compactly_and_says_the_same(device: torch.device) -> None:
    """Triton's project writes what its attention reads, over a pool that is compact wherever a layer can be."""
    outputs = {}
    for kernels in ("reference", "triton"):
        decoder = decode_with(kernels, "experts", device)
        layer = next(layer for layer in decoder.layers if layer.plan.can_compact)
        compact = compact_weights(decoder)
        assert compact.keys() == ({layer.plan.index} if kernels == "triton" else set())
        pool = PagedKVCache(decoder.plan, page_counts(decoder.plan, 64, 16), decoder.dtype, device, compact)
        sequence, outputs[kernels] = SequenceState(0, Request(prompt(22))), []
        sequence.table = table = BlockTable(pool)
        for rows in (12, 9, 1):
            work = ScheduledChunk.of(sequence, table, rows)
            table.reserve(rows)
            step = decoder.prepare(replace(build_step(decoder, [work]), logit_rows=None))  # all rows, not the wanted ones
            x_ND = normal(rows, decoder.plan.hidden, seed=rows).to(device)
            outputs[kernels].append(layer.attention(layer.qkv(x_ND, step, pool), step.remaining, pool))
            table.commit(rows)
    assert_close(torch.cat(outputs["triton"]), torch.cat(outputs["reference"]).cpu().double())
