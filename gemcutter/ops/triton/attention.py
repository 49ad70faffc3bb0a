"""Attention over paged keys and values on Triton: prefill over ragged sequences and split-key decode, one kernel for both.

A program holds the rows of one tile for all query heads of one key head, so that keys are read once for the whole group. Long
sequences are cut into tiles of rows; sequences of a few rows are cut along their keys instead, and `_merge` joins the parts by
their log-sums. Owns launch shapes, which depend on geometry and row counts alone; refuses to know who wrote the keys. Read
`cuda_step.py` for pages, `ops/step.py` for the compact form, `reference.py` for what attention means. Shape letters as there, R
rotary columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcutter.errors import KernelError
from gemcutter.ops.step import KVCache, Step
from gemcutter.ops.triton.attn_metadata import TritonAttnMetadata, of_group
from gemcutter.ops.triton.dequant import INTERPRETED
from gemcutter.ops.triton.variant import Variant
from gemcutter.plan import LayerPlan

MIN_PAGE = 16  # a block of keys lies in one page, and the matrix units take no fewer keys
PAGE_TOKENS = 64  # as the engine has them; compiled ahead of time
SHORT_ROWS = 8  # sequences of up to so many rows are cut along their keys: decode, and decode with drafts
FEW_SEQUENCES = 8  # so many share a kernel that looks for its sequence
SPLIT_KEYS = 64  # keys that are worth a program of their own
MAX_SPLITS = 128
MERGE_COLUMNS = 64  # columns of one program of the merge: all parts of them lie in registers at once


@triton.jit
def _dot(a, b, sums):
    """Multiply on the matrix units and add."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _long_tile(query_start_S1, sequences, ROWS: tl.constexpr, SHORT: tl.constexpr, SEQUENCES: tl.constexpr):
    """Find this program's sequence and its tile there, the last tiles first: they see the most keys."""
    s = tl.arange(0, SEQUENCES)
    start = tl.load(query_start_S1 + s, mask=s < sequences, other=0)
    rows = tl.load(query_start_S1 + s + 1, mask=s < sequences, other=0) - start
    tiles = tl.where(rows > SHORT, (rows + ROWS - 1) // ROWS, 0)
    ends = tl.cumsum(tiles, 0)
    at = tl.num_programs(0) - 1 - tl.program_id(0)
    found = tl.sum((ends <= at).to(tl.int32), 0)
    return found, at - tl.sum(tl.where(s < found, tiles, 0), 0)


@triton.jit(do_not_specialize=["sequences", "width"])
def _attend(
    q_NHE,
    keys_TKX,
    values_TKE,
    out,
    lse,
    positions_N,
    last_N,
    query_start_S1,
    pages_SP,
    first_S,
    sequences,
    width,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    ROTARY: tl.constexpr,
    ROTARY_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHORT: tl.constexpr,
    IS_SHORT: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_LAST_VISIBLE: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Attend for one tile of rows of one sequence and one key head's queries, over all their keys or one split of them."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    HEADS: tl.constexpr = KEY_HEADS * GROUP
    if IS_SHORT:
        TILES: tl.constexpr = (SHORT + ROWS - 1) // ROWS
        s, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    else:
        s, tile = _long_tile(query_start_S1, sequences, ROWS, SHORT, SEQUENCES)
        if s >= sequences:
            return
    start, stop = tl.load(query_start_S1 + s), tl.load(query_start_S1 + s + 1)
    if (tile * ROWS >= stop - start) | ((stop - start > SHORT) & IS_SHORT):  # no tile, or one of the other launch
        return
    head = tl.program_id(1)
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, E)
    row = tile * ROWS + m // GROUP
    is_row = (m < ROWS * GROUP) & (start + row < stop)
    position = tl.load(positions_N + start + row, mask=is_row, other=-1)
    last = position
    if HAS_LAST_VISIBLE:
        last = tl.maximum(position, tl.load(last_N + start + row, mask=position >= 0, other=-1))

    # the keys that some row sees, [low, high), and this program's blocks of them
    high = tl.max(last, 0) + 1
    low = 0
    if WINDOW > 0:
        low = tl.maximum(tl.min(tl.where(position >= 0, position, 0x7FFFFFFF), 0) - WINDOW + 1, 0)
    begin, end = low // BLOCK_N, (high + BLOCK_N - 1) // BLOCK_N
    if IS_SPLIT:
        share = tl.maximum((end - begin + tl.num_programs(2) - 1) // tl.num_programs(2), MIN_BLOCKS)
        begin += tl.program_id(2) * share
        end = tl.minimum(end, begin + share)

    q_at = q_NHE + ((start + row) * HEADS + head * GROUP + m % GROUP)[:, None] * E
    if ROTARY > 0:  # the columns that turn meet the stored keys, all others the normalised rows
        c = tl.arange(0, ROTARY_PADDED)
        column = tl.where(c < ROTARY // 2, c, c + (E - ROTARY) // 2)
        q_rotary = tl.load(q_at + column[None, :], mask=is_row[:, None] & (c < ROTARY)[None, :], other=0.0)
        q = tl.load(q_at + e[None, :], mask=is_row[:, None] & (e % (E // 2) >= ROTARY // 2)[None, :], other=0.0)
    else:
        q = tl.load(q_at + e[None, :], mask=is_row[:, None], other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, E], tl.float32)
    pages = pages_SP + s * width - tl.load(first_S + s)
    n = tl.arange(0, BLOCK_N)
    value_at, key_at = n[:, None] * (KEY_HEADS * E) + e[None, :], n[:, None] * (KEY_HEADS * E) + e[None, :]
    if ROTARY > 0:
        key_at = n[:, None] * (KEY_HEADS * ROTARY) + c[None, :]
    page = tl.load(pages + begin // (PAGE // BLOCK_N), mask=begin < end, other=0)
    for block in tl.range(begin, end, disable_licm=BLOCK_M >= 64):  # else it holds an address for each piece of the queries
        key = block * BLOCK_N + n
        is_held = (key >= low) & (key < high)  # slots beyond may hold anything, NaN too
        this = page.to(tl.int64)
        page = tl.load(pages + (block + 1) // (PAGE // BLOCK_N), mask=block + 1 < end, other=0)
        slot = (this * (PAGE // BLOCK_N) + block % (PAGE // BLOCK_N)) * (BLOCK_N * KEY_HEADS) + head
        value = tl.load(values_TKE + slot * E + value_at, mask=is_held[:, None], other=0.0).to(q.dtype)
        none = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if ROTARY > 0:
            if ROTARY == ROTARY_PADDED:
                rotary = tl.load(keys_TKX + slot * ROTARY + key_at).to(q.dtype)
            else:
                rotary = tl.load(keys_TKX + slot * ROTARY + key_at, mask=(c < ROTARY)[None, :], other=0.0).to(q.dtype)
            scores = _dot(q_rotary, tl.trans(rotary), _dot(q, tl.trans(value), none))
        else:
            keys = tl.load(keys_TKX + slot * E + key_at).to(q.dtype)
            scores = _dot(q, tl.trans(keys), none)
        seen = key[None, :] <= last[:, None]
        if WINDOW > 0:
            seen &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))  # powers of two from here on
        new_top = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet stays at zero, not NaN
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(weights, 1)
        mixed = _dot(weights.to(q.dtype), value, mixed * shrink[:, None])
        top = new_top

    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    if IS_SPLIT:
        part = (s * SHORT + row) * HEADS + head * GROUP + m % GROUP
        part = part * tl.num_programs(2) + tl.program_id(2)
        tl.store(lse + part, top + tl.log2(total), mask=is_row)
        tl.store(out + part[:, None] * E + e[None, :], mixed, mask=(is_row & (total > 0.0))[:, None])
    else:
        start, stop = (
            tl.load(query_start_S1 + s),
            tl.load(query_start_S1 + s + 1),
        )  # anew: no register holds addresses in the loop
        is_row = (m < ROWS * GROUP) & (start + row < stop)
        out_at = out + ((start + row) * HEADS + head * GROUP + m % GROUP)[:, None] * E
        tl.store(out_at + e[None, :], mixed.to(out.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _merge(
    parts,
    lse,
    out_NHE,
    query_start_S1,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    SHORT: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Join the parts of some columns of one row and head: their mean, weighed by their sums."""
    s, row = tl.program_id(0) // SHORT, tl.program_id(0) % SHORT
    start, stop = tl.load(query_start_S1 + s), tl.load(query_start_S1 + s + 1)
    if (row >= stop - start) | (stop - start > SHORT):
        return
    head, e = tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    part = (tl.program_id(0) * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    sums = tl.load(lse + part)
    top = tl.max(sums, 0)
    weights = tl.exp2(sums - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    found = tl.load(parts + part[:, None] * E + e[None, :], mask=(weights > 0.0)[:, None] & (e < E)[None, :], other=0.0)
    mixed = tl.sum(found * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_NHE + ((start + row) * HEADS + head) * E + e, mixed.to(out_NHE.dtype.element_ty), mask=e < E)


@dataclass(frozen=True, slots=True)
class Launch:
    """The shape of a program: rows times heads, keys of one block, warps, and blocks on their way at once."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What launch shapes depend on beside the geometry."""

    processors: int
    shared_bytes: int


Shapes = dict[int, tuple[tuple[int, Launch], ...]]

# By largest head dim: the shared memory that each shape needs with 16-bit rows, and the shape; the first that fits is taken. FEW
# hold the rows of a decode step, SHORT those of a draft. All were compiled ahead of time: none spills registers.
LONG: Shapes = {
    128: ((150_000, Launch(128, 64, 8, 3)), (0, Launch(64, 64, 4, 2))),
    256: ((200_000, Launch(128, 64, 8, 2)), (110_000, Launch(64, 64, 8, 2)), (0, Launch(64, 32, 8, 2))),
    512: ((200_000, Launch(64, 32, 8, 2)), (0, Launch(32, 32, 8, 2))),
}
SHORT: Shapes = {
    256: ((0, Launch(32, 32, 8, 3)),),
    512: ((166_000, Launch(32, 32, 8, 3)), (0, Launch(32, 32, 8, 2))),
}
FEW: Shapes = {
    256: ((0, Launch(16, 32, 4, 3)),),
    512: ((150_000, Launch(16, 32, 8, 3)), (0, Launch(16, 32, 8, 2))),
}
FLOAT32 = Launch(16, 16, 4, 1)


@lru_cache
def machine_of(device: torch.device) -> Machine:
    """Read a device's properties; on the CPU, where the interpreter runs, those of a large one."""
    if device.type != "cuda":
        return Machine(132, 232_448)
    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Machine(found["multiprocessor_count"], found["max_shared_mem"])


def long_launch(dim: int, group: int, rows: torch.dtype, machine: Machine) -> Launch:
    """Choose the shape of programs that hold a tile of a long sequence."""
    launch = FLOAT32 if rows == torch.float32 else _fitting(LONG, dim, machine)
    return replace(launch, block_m=max(launch.block_m, triton.next_power_of_2(group)))


def short_launch(dim: int, group: int, count: int, rows: torch.dtype, pool: torch.dtype, machine: Machine) -> Launch:
    """Choose the shape of programs that hold `count` rows of a sequence, or as many of them as they can."""
    is_few = count * group <= 16
    launch = FLOAT32 if rows == torch.float32 else _fitting(FEW if is_few else SHORT, dim, machine)
    if pool.itemsize == 1 and not is_few:  # dequantizing a block takes registers, and so does each that is on its way
        block_n, stages = max(MIN_PAGE, launch.block_n // 2), 2 if dim > 256 else launch.stages
        launch = replace(launch, block_n=block_n, stages=stages)
    return replace(launch, block_m=max(launch.block_m, triton.next_power_of_2(group)))


def _fitting(shapes: Shapes, dim: int, machine: Machine) -> Launch:
    found = next(found for largest, found in shapes.items() if dim <= largest)
    return next(launch for needed, launch in found if needed <= machine.shared_bytes)


def num_splits(tiles: int, capacity: int, machine: Machine) -> int:
    """Choose over how many programs the keys of each of `tiles` tiles are spread, a power of two, when there are `capacity`."""
    room = triton.next_power_of_2(-(-capacity // SPLIT_KEYS))
    wanted: int = min(2 * machine.processors // tiles, room, MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def _constants(
    heads: int, key_heads: int, dim: int, rotary: int, window: int | None, page: int, launch: Launch, **others: int | bool
) -> dict[str, int | bool]:
    """Return the constants of a launch; `rotary` is the width of stored keys."""
    rotary = 0 if rotary == dim else rotary
    block_n = min(launch.block_n, page & -page)
    return {
        "KEY_HEADS": key_heads,
        "GROUP": heads // key_heads,
        "E": dim,
        "ROTARY": rotary,
        "ROTARY_PADDED": max(16, triton.next_power_of_2(rotary)),
        "WINDOW": window or 0,
        "PAGE": page,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": block_n,
        "MIN_BLOCKS": SPLIT_KEYS // block_n,
        "SEQUENCES": 1,
        **others,
    }


@dataclass(frozen=True, slots=True)
class _Site:
    """One call's tensors and geometry."""

    q_NHE: Tensor
    keys_TKX: Tensor
    values_TKE: Tensor
    step: TritonAttnMetadata
    window: int | None
    machine: Machine

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return heads, key heads and head dim."""
        return self.q_NHE.shape[1], self.values_TKE.shape[1], self.q_NHE.shape[2]

    def launch(self, grid: tuple[int, ...], launch: Launch, out: Tensor, lse: Tensor, **constants: int | bool) -> None:
        """Run the kernel over a grid of tiles, key heads and splits."""
        step, last_N = self.step, self.step.last_visible_N
        _attend[grid](
            self.q_NHE,
            self.keys_TKX,
            self.values_TKE,
            out,
            lse,
            step.positions_N,
            step.positions_N if last_N is None else last_N,
            step.query_start_S1,
            step.pages_SP,
            step.first_S,
            step.sequences,
            step.pages_SP.shape[1],
            **_constants(*self.sizes, self.keys_TKX.shape[2], self.window, step.page_tokens, launch, **constants),
            HAS_LAST_VISIBLE=last_N is not None,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


def paged_attention(q_NHE: Tensor, keys_TKX: Tensor, values_TKE: Tensor, step: TritonAttnMetadata, window: int | None) -> Tensor:
    """Attend for rows over the pages of one layer, scale 1, softmax in float32; zeros where a row sees no key.

    `keys_TKX` are whole keys, or the R columns that turn of a compact layer, whose queries are multiplied with its weight
    already. `last_N` (int32) gives the last position that each row may see where that is not its own: a media row's, which
    sees all of its block. Raises KernelError where a page holds no whole blocks of keys, or rows are too many.
    """
    if q_NHE.numel() >= 1 << 31:
        raise KernelError(f"Triton attention counts queries in 32 bits, {q_NHE.shape[0]} rows are too many; lower max_rows")
    if step.page_tokens % MIN_PAGE:
        raise KernelError(f"Triton attention needs pages of a multiple of {MIN_PAGE} tokens, found {step.page_tokens}")
    site = _Site(q_NHE.contiguous(), keys_TKX, values_TKE, step, window, machine_of(q_NHE.device))
    out = torch.empty_like(site.q_NHE)
    if q_NHE.shape[0]:
        if step.max_rows > SHORT_ROWS:
            _attend_long(site, out)
        if step.max_rows <= SHORT_ROWS or step.sequences > 1:
            _attend_short(site, out)
    return out


def _attend_long(site: _Site, out: Tensor) -> None:
    """Attend for the sequences of more than SHORT_ROWS rows."""
    (heads, key_heads, dim), sequences = site.sizes, site.step.sequences
    launch = long_launch(dim, heads // key_heads, out.dtype, site.machine)
    rows = launch.block_m // (heads // key_heads)
    tiles = (out.shape[0] + sequences * (rows - 1)) // rows  # the most that so many rows of so many sequences fill
    site.launch(
        (tiles, key_heads, 1),
        launch,
        out,
        out,
        SHORT=SHORT_ROWS,
        IS_SHORT=False,
        IS_SPLIT=False,
        SEQUENCES=max(FEW_SEQUENCES, triton.next_power_of_2(sequences)),
    )


def _attend_short(site: _Site, out: Tensor) -> None:
    """Attend for the sequences of at most SHORT_ROWS rows, the keys spread over as many programs as fill the device."""
    step, (heads, key_heads, dim) = site.step, site.sizes
    group, most = heads // key_heads, min(triton.next_power_of_2(step.max_rows), SHORT_ROWS)
    likely = most if step.max_rows <= SHORT_ROWS else 1  # beside long sequences, the short ones decode one row each
    launch = short_launch(dim, group, likely, out.dtype, site.values_TKE.dtype, site.machine)
    tiles = step.sequences * -(-most // (launch.block_m // group))
    capacity = step.pages_SP.shape[1] * step.page_tokens
    if site.window is not None:
        capacity = min(capacity, site.window + most)
    splits, slots = num_splits(tiles * key_heads, capacity, site.machine), step.sequences * most
    parts, lse = out, out
    if splits > 1:
        parts = out.new_empty(slots, heads, splits, dim, dtype=torch.float32)
        lse = out.new_empty(slots, heads, splits, dtype=torch.float32)
    site.launch((tiles, key_heads, splits), launch, parts, lse, SHORT=most, IS_SHORT=True, IS_SPLIT=splits > 1)
    if splits > 1:
        columns = min(dim, MERGE_COLUMNS)
        grid = (slots, heads, dim // columns)
        _merge[grid](parts, lse, out, step.query_start_S1, HEADS=heads, E=dim, SHORT=most, SPLITS=splits, COLUMNS=columns)


def build_attention(layer: LayerPlan) -> Callable[[Tensor, Step, KVCache], Tensor]:
    """Build attention of a layer's queries over the pages that its `kv_layer` wrote, compact or not."""

    def attention(q_NHE: Tensor, step: Step, cache: KVCache) -> Tensor:
        metadata, compact = of_group(step, layer.group), cache.compact(layer.kv_layer)
        if compact is None:
            return paged_attention(q_NHE, *cache.storage(layer.kv_layer), metadata, layer.window)
        scaled = torch.mul(q_NHE, compact.weight_E, out=torch.empty_like(q_NHE))
        return paged_attention(scaled, compact.rotary_TKR, compact.normed_TKE, metadata, layer.window)

    return attention


def _variants() -> Iterator[Variant]:
    """List decode, drafts and prefill for every geometry of the family, as each kind of machine would launch them."""
    layers = {
        "sliding": (8, 1, 256, 256, 512),
        "sliding, 2 heads a key": (16, 8, 256, 256, 1024),
        "global": (8, 1, 512, 512, None),
        "compact": (16, 1, 512, 128, None),
        "compact, 8 heads a key": (32, 4, 512, 128, None),
    }
    machines = {(80,): Machine(108, 166_912), (90, 100): Machine(132, 232_448)}
    pools = {"*bf16": torch.bfloat16, "*fp8e4nv": torch.float8_e4m3fn}
    for (kind, sizes), (targets, machine), (pool, dtype) in product(layers.items(), machines.items(), pools.items()):
        dim, group = sizes[2], sizes[0] // sizes[1]
        for count, what in ((1, "decode"), (5, "drafts"), (512, "prefill")):
            is_short = count <= SHORT_ROWS
            launch = long_launch(dim, group, torch.bfloat16, machine)
            if is_short:
                launch = short_launch(dim, group, count, torch.bfloat16, dtype, machine)
            modes = {"SHORT": min(count, SHORT_ROWS), "IS_SHORT": is_short, "IS_SPLIT": is_short, "HAS_LAST_VISIBLE": False}
            types = ("*bf16", pool, pool, "*fp32" if is_short else "*bf16", "*fp32", *["*i32"] * 5, "i32", "i32")
            yield Variant(
                _attend,
                dict(zip(_attend.arg_names, types, strict=False)),
                _constants(*sizes, PAGE_TOKENS, launch, **modes),
                launch.warps,
                launch.stages,
                f"paged_attention {what}, {kind}, {pool[1:]}",
                targets,
            )
    yield Variant(
        _merge,
        dict(zip(_merge.arg_names, ("*fp32", "*fp32", "*bf16", "*i32"), strict=False)),
        {"HEADS": 8, "E": 512, "SHORT": 1, "SPLITS": MAX_SPLITS, "COLUMNS": MERGE_COLUMNS},
        num_warps=4,
        num_stages=1,
        name="paged_attention, merge",
    )


VARIANTS = tuple(_variants())
