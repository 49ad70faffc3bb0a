"""Native attention against the reference, at every processor level that the library has here.

Owns the grid of shapes, the edges of windows and the poison in slots that no query sees. Refuses to know layer ops; read
`test_providers.py` for the same grid over every impl. Shape letters: N rows, H heads, K key heads, E head dim, T keys.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.ops import reference
from gemcutter.ops.cpu.attn_metadata import of_group
from gemcutter.ops.cpu.bindings import KVBinding
from gemcutter.ops.registry import CPU
from gemcutter.ops.step import Int8KVCache, KVRange, Step, prepare, quantize_vectors
from gemcutter.ops.types import OpContext
from gemcutter.plan import Attn, LayerPlan, ModelPlan, Proj, RopeSpec

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
TOLERANCE = 2e-5  # largest difference over largest value
ROUNDED = 2.0**-8  # the same where softmax weights are rounded to bfloat16, by 2^-9 of each at most
ROUNDS = ("avx512_bf16", "amx")  # levels that do so for many rows over a cache of bfloat16 or int8
LAYER = 3
MODEL = ModelPlan((), 8, 8, None, 1e-6, 99, 0, 0, 0, True, False)  # of which attention reads nothing
CODES = {INT8: 2, BF16: 3, F32: 5}
POISON_CODE = -128  # which no vector is quantized to


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    library = native.load_library()
    assert library is not None
    before = library.gc_threads()
    library.gc_set_threads(request.param)
    yield request.param
    library.gc_set_threads(before)


@dataclass(frozen=True)
class Part:
    """Rows of one sequence at `positions`; the cache holds its keys from `start` to `held` - 1."""

    positions: tuple[int, ...]
    held: int
    start: int = 0


@dataclass
class Cache:
    """One layer's keys and values [T, K, E]; of int8 as codes with scales."""

    keys: Tensor
    values: Tensor
    scaled: Int8KVCache | None = None

    def write(self, layer: int, slots_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        raise AssertionError("attention writes nothing")

    def read(self, layer: int, span: KVRange) -> tuple[Tensor, Tensor]:
        return (self.keys[span.where], self.values[span.where]) if self.scaled is None else self.scaled.read(span.where)

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def int8(self, layer: int) -> Int8KVCache | None:
        return self.scaled


def cache_of(keys: Tensor, values: Tensor, dtype: torch.dtype) -> Cache:
    """Round a cache to a dtype. In int8, vectors of NaN, which nobody sees, get codes that nobody writes and scales of NaN."""
    if dtype is not INT8:
        return Cache(keys.to(dtype), values.to(dtype))
    (key_codes, key_scales), (value_codes, value_scales) = map(quantize_vectors, (keys, values))
    for codes, scales in ((key_codes, key_scales), (value_codes, value_scales)):
        codes[scales.isnan()] = POISON_CODE
    return Cache(key_codes, value_codes, Int8KVCache(key_codes, value_codes, key_scales, value_scales))


def rows(count: int, past: int, start: int = 0) -> Part:
    """Return `count` rows after `past` committed positions."""
    return Part(tuple(range(past, past + count)), past + count, start)


def plan(heads: int, kv_heads: int, dim: int, window: int | None) -> LayerPlan:
    attn = Attn.GLOBAL if window is None else Attn.SLIDING
    return LayerPlan(5, attn, Proj.Q_ONLY, LAYER, "self", heads, kv_heads, dim, window, RopeSpec(1e4, dim, dim // 2), 64, None, 0)


def seen_by_any(part: Part, window: int | None) -> Tensor:
    """Return which of the positions start to held - 1 some row of the part sees."""
    position = torch.arange(part.start, part.held)
    seen = torch.zeros(len(position), dtype=torch.bool)
    for row in part.positions:
        seen |= (position <= row) & (position > row - (window or row + 1))
    return seen


def make(parts: Sequence[Part], layer: LayerPlan, dtype: torch.dtype, listed: bool, poison: float) -> tuple[Tensor, Step, Cache]:
    """Draw queries and a cache in which slots that no row sees hold `poison`."""
    draw = torch.Generator().manual_seed(7)
    q_NHE = torch.randn(sum(len(part.positions) for part in parts), layer.heads, layer.head_dim, generator=draw)
    total = sum(part.held - part.start for part in parts) + 5 * len(parts) + 5
    order = torch.randperm(total, generator=torch.Generator().manual_seed(8)) if listed else torch.arange(total)
    keys = torch.full((total, layer.kv_heads, layer.head_dim), poison)
    values, spans, at = keys.clone(), [], 5
    for part in parts:
        size, seen = part.held - part.start, seen_by_any(part, layer.window)
        slots = order[at : at + size]
        for tensor in (keys, values):
            tensor[slots[seen]] = torch.randn(int(seen.sum()), *tensor.shape[1:], generator=draw)
        spans.append(KVRange(part.start, slots if listed else slice(at, at + size)))
        at += size + 5
    positions = torch.tensor([position for part in parts for position in part.positions])
    query_start = [0]
    for part in parts:
        query_start.append(query_start[-1] + len(part.positions))
    step = prepared(Step(positions, positions, positions, tuple(query_start), {layer.group: tuple(spans)}, {}, None, {}), layer)
    q_NHE *= 2 * layer.head_dim**-0.5
    rounded = q_NHE if dtype is F32 else q_NHE.bfloat16().float()  # levels that round queries find them rounded
    return rounded, step, cache_of(keys, values, dtype)


def prepared(step: Step, layer: LayerPlan) -> Step:
    return prepare(step, lambda rows: CPU.attn_metadata(rows, [(layer.group, layer.rope)]))


def view_of(pool: Cache, exact: bool) -> native.KVView:
    found = native.KVView(k=pool.keys.data_ptr(), v=pool.values.data_ptr(), slots=len(pool.keys), dtype=CODES[pool.keys.dtype])
    found.exact = exact
    if pool.scaled is not None:
        found.k_scale, found.v_scale = pool.scaled.key_scales_TK.data_ptr(), pool.scaled.value_scales_TK.data_ptr()
    return found


def attend(q_NHE: Tensor, step: Step, pool: Cache, layer: LayerPlan, exact: bool = False) -> Tensor:
    library = native.load_library()
    assert library is not None
    struct = native.AttentionView(heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim, window=layer.window or 0)
    kv = view_of(pool, exact)
    out = torch.full_like(q_NHE, torch.nan)
    metadata = ctypes.c_void_p(of_group(step, layer.group, layer.rope))
    q, to = ctypes.c_void_p(q_NHE.data_ptr()), ctypes.c_void_p(out.data_ptr())
    assert library.gc_attention_forward(q, metadata, ctypes.byref(struct), ctypes.byref(kv), to) == 0
    return out


@cache
def opinion(parts: tuple[Part, ...], layer: LayerPlan, dtype: torch.dtype) -> Tensor:
    """Return what the reference makes of a clean cache."""
    q_NHE, step, clean = make(parts, layer, dtype, listed=False, poison=0.0)
    return reference.build_attention(MODEL, layer, {}, OpContext(reference.linear))(q_NHE, step, clean)


def check(parts: Sequence[Part], layer: LayerPlan, dtype: torch.dtype = F32, listed: bool = False) -> None:
    """Compare with the reference; the kernel gets a cache with poison where nobody looks."""
    wanted = opinion(tuple(parts), layer, dtype)
    q_NHE, step, pool = make(parts, layer, dtype, listed, torch.nan)
    rounds = dtype is not F32 and native.level() in ROUNDS
    for exact in (False, True) if rounds else (False,):
        found = attend(q_NHE, step, pool, layer, exact)
        tolerance = ROUNDED if rounds and not exact else TOLERANCE
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


SHAPES = [(8, 1, 256), (8, 1, 512), (16, 8, 64), (4, 2, 128), (1, 1, 64), (6, 2, 32), (3, 1, 96)]
SHAPES += [(8, 1, 16), (6, 2, 24), (5, 1, 80), (4, 2, 2), (3, 1, 34), (2, 1, 270)]  # of which no kernel's unit is a part
MIXED = [rows(1, 700), rows(9, 0), rows(2, 131), rows(40, 300), rows(0, 17), rows(1, 0), rows(8, 60), rows(17, 255)]


@pytest.mark.parametrize("listed", [False, True], ids=["view", "listed"])
@pytest.mark.parametrize("dtype", [F32, BF16, INT8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.usefixtures("level")
def test_mixed_batch(heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype, listed: bool) -> None:
    check(MIXED, plan(heads, kv_heads, dim, window), dtype, listed)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.usefixtures("level")
def test_threads(threads: int, window: int | None) -> None:
    for dtype in (BF16, INT8):
        check(MIXED, plan(8, 2, 64, window), dtype, listed=True)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 16, 23, 65, 600])
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.usefixtures("level")
def test_row_counts(count: int, window: int | None) -> None:
    check([rows(count, 0)], plan(4, 1, 64, window), BF16)
    check([rows(count, 0)], plan(4, 1, 64, window), INT8)
    check([rows(count, 77)], plan(2, 2, 64, window))


@pytest.mark.parametrize("window", [1, 7, 64, 512])
@pytest.mark.parametrize("around", [-1, 0, 1])
@pytest.mark.usefixtures("level")
def test_window_edges(window: int, around: int) -> None:
    """The oldest key that a row sees is one after, at, or one before the first held; alone and at the end of a chunk."""
    last = max(window + around, 0)
    layer, released = plan(4, 1, 64, window), max(last + 1 - window, 0)
    for dtype in (F32, INT8):
        check([rows(1, last)], layer, dtype)
        check([rows(last + 1, 0)], layer, dtype)
        check([rows(1, last, released), rows(20, last, max(released - 1, 0))], layer, dtype)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.usefixtures("level")
def test_kept_rows_with_gaps(window: int | None) -> None:
    """Rows that are kept from a chunk are not neighbours; what only dropped rows saw may hold anything."""
    few, many = (2, 90, 91, 199), tuple(range(0, 220, 13))
    for dtype in (BF16, INT8):
        check([Part(few, 240), Part(many, 250)], plan(4, 2, 64, window), dtype, listed=True)


@pytest.mark.parametrize("past", [127, 128, 129, 4095, 5000])
@pytest.mark.usefixtures("level")
def test_long_context_is_cut_and_merged(past: int) -> None:
    for dim in (32, 20):
        for dtype in (BF16, INT8):
            check([rows(2, past)], plan(4, 1, dim, None), dtype)


FEW = [Part((600,), 601), Part((601,), 602), Part((300, 301, 305, 306), 307), rows(16, 700), Part((519, 1030), 1031)]


@pytest.mark.parametrize("dim", [32, 64, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (3, 1), (4, 1), (6, 1), (16, 2), (11, 1)])
@pytest.mark.parametrize("window", [None, 1, 8, 101, 512])
@pytest.mark.usefixtures("level")
def test_few_rows_behind_many_keys(heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    """Windows begin and end at odd and at even positions, with poison in the other half of a pair."""
    for dtype in (BF16, INT8):
        check(FEW, plan(heads, kv_heads, dim, window), dtype, listed=dim == 64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (3, 1), (8, 1)])
@pytest.mark.parametrize("window", [None, 37, 512])
@pytest.mark.usefixtures("level")
def test_a_row_does_not_depend_on_those_beside_it(heads: int, kv_heads: int, window: int | None) -> None:
    """Bit for bit, for every number of rows up to 16."""
    layer = plan(heads, kv_heads, 64, window)
    for dtype in (F32, BF16, INT8):
        q_NHE, step, pool = make([rows(16, 611)], layer, dtype, listed=False, poison=0.0)
        whole = attend(q_NHE, step, pool, layer)
        for first, last in ((0, 1), (1, 2), (2, 4), (3, 6), (4, 9), (9, 16), (15, 16)):
            positions = step.positions_N[first:last]
            piece = prepared(Step(positions, positions, positions, (0, last - first), step.kv_ranges, {}, None, {}), layer)
            assert torch.equal(attend(q_NHE[first:last].contiguous(), piece, pool, layer), whole[first:last])


@pytest.mark.usefixtures("level")
def test_chunks_equal_the_whole() -> None:
    for dtype in (F32, INT8):
        assert_chunks_equal_the_whole(dtype)


def assert_chunks_equal_the_whole(dtype: torch.dtype) -> None:
    layer = plan(4, 1, 64, 30)
    q_NHE, step, pool = make([rows(150, 0)], layer, dtype, listed=False, poison=0.0)
    whole = attend(q_NHE, step, pool, layer, exact=True)
    for first, last in ((0, 11), (11, 12), (12, 100), (100, 150)):
        part = slice(first, last)
        positions = step.positions_N[part]
        piece = prepared(Step(positions, positions, positions, (0, last - first), step.kv_ranges, {}, None, {}), layer)
        found = attend(q_NHE[part].contiguous(), piece, pool, layer, exact=True)
        assert torch.allclose(found, whole[part], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("level")
def test_large_scores_do_not_overflow() -> None:
    layer = plan(2, 1, 64, None)
    q_NHE, step, pool = make([rows(1, 300), rows(30, 300)], layer, F32, listed=False, poison=0.0)
    found = attend(q_NHE * 300, step, pool, layer)
    wanted = reference.build_attention(MODEL, layer, {}, OpContext(reference.linear))(q_NHE * 300, step, pool)
    assert wanted.isfinite().all()
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()  # scores near 1000 have an ulp of 6e-5


@pytest.mark.usefixtures("level")
def test_a_row_that_sees_no_key_gives_zeros() -> None:
    layer = plan(2, 1, 64, 4)
    for count in (1, 20):
        part = Part(tuple(range(count)), 60, 50)  # the cache has let go of all that these rows would see
        q_NHE, step, pool = make([part], layer, F32, listed=False, poison=torch.nan)
        assert attend(q_NHE, step, pool, layer).eq(0).all()


def test_a_cache_is_described_once_and_not_kept_alive() -> None:
    binding, first, second = KVBinding(LAYER), *(Cache(torch.zeros(4, 1, 8), torch.ones(4, 1, 8)) for _ in range(2))
    view = binding.view(first)
    assert binding.view(first) is view
    assert (view.k, view.v) == (first.keys.data_ptr(), first.values.data_ptr())
    assert binding.view(second).k == second.keys.data_ptr()
    assert view.k == first.keys.data_ptr()  # a call that runs over the first cache still has its description
    gone = weakref.ref(second)
    del second
    assert gone() is None
