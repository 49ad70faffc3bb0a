"""Every implementation of every op against the reference, and the reference against a third opinion: plain float64.

Owns the shape grids and the poison in unused cache slots; the formulas in plain float64 are in `formulas.py` and share no code
with `ops/`. A kernel added to a backend is tested here without another line; an op without a test fails. Shape letters: N rows,
H heads, K key heads, E head dim, D hidden, F outputs, T keys. Read `gemcutter/ops/reference.py` beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.model.rope import Rope
from gemcutter.ops import DRAFTER_OPS, LAYER_OPS, OPS, TOWER_OPS, reference
from gemcutter.ops.backend import KernelImpl
from gemcutter.ops.registry import CPU, IMPLEMENTATIONS
from gemcutter.ops.step import KVRange, Step, prepare
from gemcutter.ops.types import Attention, OpContext, Param, Precision
from gemcutter.plan import Attn, LayerPlan, ModelPlan, MoEPlan, Proj, RopeSpec, group_of
from gemcutter.quant import Weight
from tests.kernels.formulas import EPS, naive_gelu, naive_norm, naive_rope

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Largest difference over largest value. float32: the order of summation. bfloat16: the reference sums in float32 and rounds once
# (2**-9); a library may also round probabilities, or a weight that is stored wider than the rows.
TOLERANCE = {F32: 1e-5, BF16: 2**-6}
ONE_ROUNDING = {F32: 1e-5, BF16: 2**-8}


def implementations_of(op: str) -> pytest.MarkDecorator:
    """Run a test with every implementation of an op that can run here; Triton's have tests of their own, in `tests/triton`."""
    skip = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))
    here = (each for each in IMPLEMENTATIONS if each.op == op and each.name != "triton")
    found = [pytest.param(each, id=each.name, marks=[skip] if each.name == "native" else []) for each in here]
    return pytest.mark.parametrize("impl", found)


def tolerance_of(impl: KernelImpl, dtype: torch.dtype) -> float:
    return (ONE_ROUNDING if impl.name == "reference" else TOLERANCE)[dtype]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    if not wanted.numel():
        return
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= tolerance, f"relative error {float(error):.2g}"  # NaN fails


# ---- linear ----

COLUMNS = 37
PARTS = {"one": (19,), "two": (33, 5), "three": (40, 7, 7)}
ROWS = (0, 1, 2, 3, 16, 17, 100)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small weights into several tiles of at least 16 rows."""
    monkeypatch.setattr(reference, "WEIGHT_TILE", 64)


@implementations_of("linear")
@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=["x-f32", "x-bf16"])
@pytest.mark.parametrize("stored", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.usefixtures("small_tiles")
def test_linear(impl: KernelImpl, parts: str, stored: torch.dtype, x_dtype: torch.dtype) -> None:
    tensors = tuple(randn(rows, COLUMNS, seed=i, dtype=stored) for i, rows in enumerate(PARTS[parts]))
    weight, linear = Weight(tensors), impl.load()
    matrix = torch.cat([tensor.double() for tensor in tensors])
    for rows in ROWS:
        x_ND = randn(rows, COLUMNS, seed=rows, dtype=x_dtype)
        found = linear(x_ND, weight)
        assert found.dtype == x_dtype
        assert_close(found, x_ND.double() @ matrix.T, tolerance_of(impl, x_dtype))
        assert_close(found, reference.linear(x_ND, weight), TOLERANCE[x_dtype])


@implementations_of("linear")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.usefixtures("small_tiles")
def test_linear_over_views(impl: KernelImpl, dtype: torch.dtype) -> None:
    """Slices, named parts and experts are views into larger tensors; rows of x may be strided too."""
    stack = Weight(torch.split(randn(3, 70, COLUMNS, dtype=dtype), [30, 40], dim=-2), ("gate", "up"))
    x_ND = randn(5, 2 * COLUMNS, dtype=dtype)[:, ::2]
    whole = torch.cat(stack.parts, dim=-2)[1].double()
    views = {
        "expert": (stack.expert(1), whole),
        "part": (stack.expert(1).part("up"), whole[30:]),
        "slice": (stack.expert(1).slice(21, 55), whole[21:55]),
    }
    for weight, matrix in views.values():
        assert_close(impl.load()(x_ND, weight), x_ND.double() @ matrix.T, tolerance_of(impl, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_reference_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    x_ND, weight = randn(35, 96, dtype=dtype), Weight((randn(50, 96, seed=1, dtype=dtype),))
    whole = reference.linear(x_ND, weight)
    for rows in (slice(0, 1), slice(3, 20), slice(16, 35), slice(34, 35)):
        assert reference.linear(x_ND[rows], weight).equal(whole[rows])


# ---- attention ----


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence of a step: `past` committed positions, `rows` new ones; the cache has let go of all before `start`."""

    past: int
    rows: int
    start: int = 0

    @property
    def positions(self) -> range:
        return range(self.past, self.past + self.rows)


@dataclass
class Cache:
    """A pool of one layer, in which the slots that belong to no sequence hold poison."""

    keys: Tensor
    values: Tensor
    written: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def write(self, layer: int, slots_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        self.written[layer] = (k_NKE, v_NKE)

    def read(self, layer: int, span: KVRange) -> tuple[Tensor, Tensor]:
        assert layer == KV_LAYER
        return self.keys[span.where], self.values[span.where]

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self.written:
            return self.keys, self.values
        return self.written[layer]

    def int8(self, layer: int) -> None:
        return None


KV_LAYER = 3
UNBOUNDED = (Part(0, 1), Part(0, 17), Part(3, 0), Part(0, 0), Part(300, 5), Part(40, 33), Part(255, 2), Part(512, 1))
# Windows cut spans in the middle; the last three have let go of pages of 64 (or of 16) positions.
RELEASED = (*UNBOUNDED, Part(150, 4, 64), Part(640, 20, 576), Part(79, 1, 16))


def layer_plan(heads: int, kv_heads: int, dim: int, window: int | None = None, **traits: Any) -> LayerPlan:
    attn = Attn.GLOBAL if window is None else Attn.SLIDING
    plan = LayerPlan(
        5, attn, Proj.Q_ONLY, KV_LAYER, "self", heads, kv_heads, dim, window, RopeSpec(1e4, dim, dim // 2), 6, None, 0
    )
    return replace(plan, **traits)


def make_step(parts: Sequence[Part], spans: Iterable[KVRange], layer: LayerPlan, **more: Any) -> Step:
    """Make a step of one group, prepared for any CPU kernel."""
    positions = torch.tensor([position for part in parts for position in part.positions])
    query_start = [0]
    for part in parts:
        query_start.append(query_start[-1] + part.rows)
    ranges = {layer.group: tuple(spans)}
    return prepared(
        Step(positions, positions, positions, tuple(query_start), ranges, {}, **{"logit_rows": None, "rope": {}} | more), layer
    )


def prepared(step: Step, layer: LayerPlan) -> Step:
    return prepare(step, lambda rows: CPU.attn_metadata(rows, [(layer.group, layer.rope)]))


def attention_of(impl: KernelImpl, layer: LayerPlan) -> Attention:
    attention: Attention = impl.load()(model_plan(layer), layer, {}, REFERENCE_CONTEXT)
    return attention


def reference_attention(layer: LayerPlan) -> Attention:
    return reference.build_attention(model_plan(layer), layer, {}, REFERENCE_CONTEXT)


def make_cache(
    parts: Sequence[Part], layer: LayerPlan, dtype: torch.dtype, scattered: bool, poison: float
) -> tuple[Cache, list[KVRange]]:
    """Lay the sequences' keys out one after the other with gaps between them, or all over the place."""
    sizes = [part.past + part.rows - part.start for part in parts]
    total = sum(sizes) + 7 * len(parts) + 7
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)) if scattered else torch.arange(total)
    empty = torch.full((total, layer.kv_heads, layer.head_dim), poison, dtype=dtype)
    pool = Cache(empty, empty.clone())
    spans, offset = [], 7
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        slots = order[offset : offset + size]
        pool.keys[slots] = randn(size, layer.kv_heads, layer.head_dim, seed=2 * number, dtype=dtype)
        pool.values[slots] = randn(size, layer.kv_heads, layer.head_dim, seed=2 * number + 1, dtype=dtype)
        spans.append(KVRange(part.start, slots if scattered else slice(offset, offset + size)))
        offset += size + 7
    return pool, spans


def naive_attention(q_NHE: Tensor, step: Step, pool: Cache, window: int | None) -> Tensor:
    """Attend row by row: a query sees itself, what came before it and what it may see beyond, and takes their softmaxed mean.

    Of what came before it sees `window` - 1 positions at most.
    """
    out = torch.empty(q_NHE.shape, dtype=torch.float64)
    for index, span in enumerate(step.kv_ranges[group_of(window)]):
        group = q_NHE.shape[1] // pool.keys.shape[1]  # head j reads key head j // group
        keys, values = (x[span.where].double().repeat_interleave(group, dim=1) for x in (pool.keys, pool.values))
        for row in range(step.query_start[index], step.query_start[index + 1]):
            own = int(step.positions_N[row])
            last_N = step.last_visible.get(group_of(window))
            last = own if last_N is None else int(last_N[row])
            oldest = 0 if window is None else max(0, own - window + 1)
            assert oldest >= span.start, "the test released a key that is seen"
            seen = slice(oldest - span.start, last + 1 - span.start)
            scores = torch.einsum("the,he->th", keys[seen], q_NHE[row].double())
            out[row] = torch.einsum("th,the->he", scores.softmax(0), values[seen])
    return out


@cache
def opinions(layer: LayerPlan, parts: tuple[Part, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, and what the reference and the naive definition make of them in a clean pool."""
    q_NHE = randn(sum(part.rows for part in parts), layer.heads, layer.head_dim, seed=99, dtype=dtype)
    q_NHE = q_NHE * layer.head_dim**-0.5  # as q_norm makes them
    pool, spans = make_cache(parts, layer, dtype, scattered=False, poison=0.0)
    step = make_step(parts, spans, layer)
    return q_NHE, reference_attention(layer)(q_NHE, step, pool), naive_attention(q_NHE, step, pool, layer.window)


@implementations_of("attention")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 1, 128), (6, 2, 256), (4, 1, 512), (1, 1, 64)])
def test_attention(impl: KernelImpl, heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype) -> None:
    layer, parts = layer_plan(heads, kv_heads, dim, window), UNBOUNDED if window is None else RELEASED
    q_NHE, plain, naive = opinions(layer, parts, dtype)
    attention = attention_of(impl, layer)
    for scattered, poison in ((False, torch.nan), (False, 1e4), (True, torch.nan)):
        pool, spans = make_cache(parts, layer, dtype, scattered, poison)
        found = attention(q_NHE, make_step(parts, spans, layer), pool)
        assert found.dtype == dtype
        assert_close(found, naive, tolerance_of(impl, dtype))
        assert_close(found, plain, TOLERANCE[dtype])


@implementations_of("attention")
@pytest.mark.parametrize("window", [None, 5, 64])
def test_attention_of_kept_rows(impl: KernelImpl, window: int | None) -> None:
    """After the last writer a sequence may have any of its rows left, so positions need not follow each other."""
    layer, parts = layer_plan(4, 2, 64, window), (Part(0, 40), Part(7, 3), Part(290, 30), Part(20, 1))
    pool, spans = make_cache(parts, layer, F32, scattered=True, poison=torch.nan)
    keep = (2, 7, 8, 39, 43, 51, 72, 73)  # none of the second sequence
    step = make_step(parts, spans, layer, logit_rows=keep).remaining
    assert step.query_start == (0, 4, 4, 7, 8)
    q_MHE = randn(len(keep), 4, 64, seed=5) / 8
    wanted = naive_attention(q_MHE, step, pool, window)
    assert_close(attention_of(impl, layer)(q_MHE, step, pool), wanted, TOLERANCE[F32])


@implementations_of("attention")
@pytest.mark.parametrize("window", [None, 5, 64])
def test_attention_sees_up_to_the_last_visible_position(impl: KernelImpl, window: int | None) -> None:
    """Rows of a media block see the whole block, later rows included; all others see what they see without it."""
    layer, parts = layer_plan(4, 2, 64, window), (Part(0, 40), Part(290, 30), Part(7, 3), Part(20, 1))
    blocks = ((5, 20), (300, 319), (8, 9))  # first and last position of a block in each of three sequences
    last = [
        next((high for low, high in blocks[index : index + 1] if low <= position <= high), position)
        for index, part in enumerate(parts)
        for position in part.positions
    ]
    pool, spans = make_cache(parts, layer, F32, scattered=True, poison=torch.nan)
    step = make_step(parts, spans, layer, last_visible={layer.group: torch.tensor(last)})
    q_NHE = randn(len(last), 4, 64, seed=6) / 8
    found, wanted = attention_of(impl, layer)(q_NHE, step, pool), naive_attention(q_NHE, step, pool, window)
    assert_close(found, wanted, TOLERANCE[F32])
    causal = attention_of(impl, layer)(q_NHE, make_step(parts, spans, layer), pool)
    differs = ((causal - found).abs().amax((1, 2)) > 1e-4).tolist()
    positions = [position for part in parts for position in part.positions]
    assert differs == [position != high for position, high in zip(positions, last, strict=True)]


@implementations_of("attention")
@pytest.mark.parametrize("rows", [1, 20])
def test_attention_with_scores_far_apart(impl: KernelImpl, rows: int) -> None:
    """Nothing scales the scores: hundreds must neither overflow nor lose the best key, and a window of one is that key."""
    part = Part(300, rows)
    layer = layer_plan(2, 1, 64)
    pool, spans = make_cache([part], layer, F32, scattered=False, poison=torch.nan)
    pool.keys *= 40
    q_NHE = randn(rows, 2, 64, seed=3)
    step = make_step([part], spans, layer)
    assert_close(attention_of(impl, layer)(q_NHE, step, pool), naive_attention(q_NHE, step, pool, None), 1e-3)
    alone = replace(layer, window=1)
    step = make_step([part], spans, alone)
    own = pool.values[spans[0].where][-rows:].expand(-1, 2, -1)
    assert_close(attention_of(impl, alone)(q_NHE, step, pool), own, 1e-6)


@pytest.mark.parametrize("window", [None, 64])
def test_reference_attention_depends_on_its_own_sequence_alone(window: int | None) -> None:
    """Bit for bit: whatever the chunk, the neighbours, the pages let go and the layout."""
    layer = layer_plan(4, 2, 64, window)
    attention = reference_attention(layer)
    whole = Part(0, 600)
    pool, spans = make_cache([whole], layer, BF16, scattered=False, poison=torch.nan)
    q_NHE = randn(600, 4, 64, seed=9, dtype=BF16) / 8
    wanted = attention(q_NHE, make_step([whole], spans, layer), pool)
    slots = torch.arange(spans[0].where.start, spans[0].where.stop) if isinstance(spans[0].where, slice) else spans[0].where
    for past, rows in ((0, 5), (255, 2), (511, 1), (77, 200)):
        start = 0 if window is None else max(0, past - window + 1) // 16 * 16
        part = Part(past, rows, start)
        for where in (slots[start : past + rows], slice(int(slots[start]), int(slots[start]) + past + rows - start)):
            neighbours = make_step([Part(0, 3), part], [KVRange(0, slots[:3]), KVRange(start, where)], layer)
            found = attention(torch.cat([q_NHE[:3], q_NHE[past : past + rows]]), neighbours, pool)
            assert found[3:].equal(wanted[past : past + rows])


# ---- layer ops, composed from the reference's primitive ops, against their formulas ----

HIDDEN, VOCAB, ROWS_N = 24, 30, 7
REFERENCE_CONTEXT = OpContext(reference.linear)


def model_plan(layer: LayerPlan, **traits: Any) -> ModelPlan:
    sizes: dict[str, Any] = {"hidden": HIDDEN, "vocab": VOCAB, "context": 64, "ple_vocab": VOCAB, "pad_id": 0}
    return ModelPlan(
        (layer,), softcap=30.0, eps=EPS, ple_dim=layer.ple_dim, tied_head=True, bidirectional=False, **sizes | traits
    )


def params_of(shapes: dict[str, tuple[int, ...] | list[tuple[int, ...]]], names: Sequence[str] = ()) -> dict[str, Param]:
    """Draw parameters: vectors around 1, matrices as Weights, in several parts where a list of shapes is given."""
    params: dict[str, Param] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if isinstance(shape, list):
            params[name] = Weight(tuple(randn(*part, seed=100 * seed + i) / 5 for i, part in enumerate(shape)), tuple(names))
        elif len(shape) == 1:
            params[name] = 1 + randn(*shape, seed=seed) / 3
        else:
            params[name] = Weight((randn(*shape, seed=seed) / 5,))
    return params


def wide(params: dict[str, Param], name: str) -> Tensor:
    """Return a parameter as one float64 tensor."""
    param = params[name]
    return (torch.cat(param.parts, dim=-2) if isinstance(param, Weight) else param).double()


X_ND = randn(ROWS_N, HIDDEN, seed=77)


@implementations_of("embed")
def test_embed(impl: KernelImpl) -> None:
    params, ids = params_of({"embed.tokens": (VOCAB, HIDDEN)}), torch.tensor([3, 0, 29, 3])
    found = impl.load()(model_plan(layer_plan(1, 1, 4)), params, REFERENCE_CONTEXT)(ids)
    assert_close(found, wide(params, "embed.tokens")[ids] * math.sqrt(HIDDEN), 1e-6)


@implementations_of("embed")
@pytest.mark.parametrize(("hidden", "root"), [(1536, 39.25), (2560, 50.5), (2816, 53.0), (3840, 62.0), (5376, 73.5)])
def test_embed_rounds_the_root_first(impl: KernelImpl, hidden: int, root: float) -> None:
    params: dict[str, Param] = {"embed.tokens": Weight((torch.ones(2, hidden, dtype=BF16),))}
    plan = model_plan(layer_plan(1, 1, 4), hidden=hidden)
    words = OpContext(reference.linear, precision=Precision(BF16, BF16))
    assert impl.load()(plan, params, words)(torch.tensor([1])).unique().tolist() == [root]


@implementations_of("ple_embed")
def test_ple_embed(impl: KernelImpl) -> None:
    dim, layers = 6, 4
    params = params_of({"ple.in": (layers * dim, HIDDEN), "ple.norm": (dim,)})
    params["embed.ple"] = Weight((randn(VOCAB, layers * dim, seed=8),))
    plan, ids = model_plan(layer_plan(1, 1, 4, ple_dim=dim)), torch.arange(ROWS_N)
    ple = impl.load()(plan, params, REFERENCE_CONTEXT)
    tokens = wide(params, "embed.ple")[ids].view(ROWS_N, layers, dim) * math.sqrt(dim)
    context = (X_ND.double() @ wide(params, "ple.in").T / math.sqrt(HIDDEN)).view(ROWS_N, layers, dim)
    wanted = (naive_norm(context, params["ple.norm"]) + tokens) / math.sqrt(2)  # type: ignore[arg-type]
    for first, last in ((0, 4), (1, 3), (3, 4)):
        assert_close(ple(X_ND, ids, first, last), wanted[:, first:last], 1e-5)


@implementations_of("qkv")
@pytest.mark.parametrize("keep", [None, [], [1, 5]], ids=str)
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("proj", Proj)
def test_qkv(impl: KernelImpl, proj: Proj, window: int | None, keep: list[int] | None) -> None:
    """A layer that writes is the last writer here: all rows leave keys and values, those that are kept give queries."""
    spec = RopeSpec(1e6, 8, 1) if window is None else RopeSpec(1e4, 8, 4)
    layer = layer_plan(6, 2, 8, window, proj=proj, rope=spec, kv_layer=5 if proj.writes else KV_LAYER)
    parts = layer.attn_parts()
    params = params_of(
        {"attn.in": [(rows, HIDDEN) for _, rows in parts], "attn.norm": (HIDDEN,), "attn.q_norm": (8,)},
        [name for name, _ in parts],
    )
    if proj.writes:
        params["attn.k_norm"] = 1 + randn(8, seed=50) / 3
    positions = list(range(40, 40 + ROWS_N))
    tables = Rope(spec, torch.device("cpu"), F32).tables(torch.tensor(positions))
    plan = model_plan(layer)
    (layer,) = plan.layers
    kept = tuple(keep) if proj.writes and keep is not None else None
    more = {"slot_mapping": {layer.group: torch.arange(ROWS_N)}, "rope": {spec: tables}, "logit_rows": kept}
    step = prepared(replace(make_step([Part(40, ROWS_N)], [], layer), **more), layer)
    pool = Cache(torch.empty(0), torch.empty(0))
    if impl.name == "native":  # writes to where the pool stores
        pool.written = {5: (torch.empty(ROWS_N, 2, 8), torch.empty(ROWS_N, 2, 8))} if proj.writes else {}
    found = impl.load()(plan, layer, params, REFERENCE_CONTEXT)(X_ND, step, pool)

    normed = naive_norm(X_ND, wide(params, "attn.norm"))
    rows = torch.split(normed @ wide(params, "attn.in").T, [rows for _, rows in parts], dim=1)
    raw = dict(zip((name for name, _ in parts), rows, strict=True))
    q = naive_norm(raw["q"].view(ROWS_N, 6, 8), wide(params, "attn.q_norm"))
    wanted = naive_rope(q, positions, spec)
    assert_close(found, wanted if step.logit_rows_M is None else wanted[step.logit_rows_M], 3e-5)
    assert pool.written.keys() == ({5} if proj.writes else set())
    if proj.writes:
        k, v = pool.written[5]
        raw_k = raw["k"].view(ROWS_N, 2, 8)
        assert_close(k, naive_rope(naive_norm(raw_k, wide(params, "attn.k_norm")), positions, spec), 3e-5)
        assert_close(v, naive_norm(raw["v"].view(ROWS_N, 2, 8) if proj is Proj.QKV else raw_k), 1e-5)


@implementations_of("attn_out")
def test_attn_out(impl: KernelImpl) -> None:
    layer = layer_plan(3, 1, 4)
    params = params_of({"attn.out": (HIDDEN, 12), "attn.post_norm": (HIDDEN,)})
    o_MHE = randn(ROWS_N, 3, 4, seed=4)
    wanted = X_ND + naive_norm(o_MHE.double().flatten(1) @ wide(params, "attn.out").T, wide(params, "attn.post_norm"))
    assert_close(impl.load()(model_plan(layer), layer, params, REFERENCE_CONTEXT)(X_ND, o_MHE), wanted, 1e-5)


def naive_mlp(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate, up = (x @ w_in.T).chunk(2, dim=-1)
    return (naive_gelu(gate) * up) @ w_out.T


@implementations_of("mlp")
@pytest.mark.parametrize("moe", [None, MoEPlan(5, 2, 3), MoEPlan(3, 3, 4), MoEPlan(4, 1, 4)], ids=str)
def test_mlp(impl: KernelImpl, moe: MoEPlan | None) -> None:
    width = 10
    layer = layer_plan(1, 1, 4, mlp_width=width, moe=moe)
    dense: dict[str, Any] = {"mlp.norm": (HIDDEN,), "mlp.in": [(width, HIDDEN)] * 2, "mlp.out": [(HIDDEN, width)]}
    shapes = dense | {"mlp.post_norm": (HIDDEN,), "scale": (1,)}
    if moe:
        shapes |= dict.fromkeys(("mlp.branch_norm", "moe.norm", "moe.branch_norm", "moe.router_scale"), (HIDDEN,))
        shapes |= {"moe.router": (moe.experts, HIDDEN), "moe.expert_scale": (moe.experts,)}
        shapes |= {"moe.in": [(moe.experts, moe.width, HIDDEN)] * 2, "moe.out": [(moe.experts, HIDDEN, moe.width)]}
    params = params_of(shapes)
    get, x = partial(wide, params), X_ND.double()

    both = naive_mlp(naive_norm(x, get("mlp.norm")), get("mlp.in"), get("mlp.out"))
    if moe:
        chances = (naive_norm(x) * get("moe.router_scale") / math.sqrt(HIDDEN)) @ get("moe.router").T
        normed, experts = naive_norm(x, get("moe.norm")), torch.zeros_like(x)
        for row, weights in enumerate(chances.softmax(-1)):
            chosen = weights.argsort(descending=True)[: moe.top_k].tolist()
            for index in chosen:
                share = weights[index] / weights[chosen].sum() * get("moe.expert_scale")[index]
                experts[row] += share * naive_mlp(normed[row], get("moe.in")[index], get("moe.out")[index])
        both = naive_norm(both, get("mlp.branch_norm")) + naive_norm(experts, get("moe.branch_norm"))
    wanted = (x + naive_norm(both, get("mlp.post_norm"))) * get(
        "scale"
    )  # the feed-forward closes a layer without per-layer embeddings
    assert_close(impl.load()(model_plan(layer), layer, params, REFERENCE_CONTEXT)(X_ND), wanted, 1e-5)


@implementations_of("ple_gate")
def test_ple_gate(impl: KernelImpl) -> None:
    layer = layer_plan(1, 1, 4, ple_dim=6)
    params = params_of({"ple.gate": (6, HIDDEN), "ple.out": (HIDDEN, 6), "ple.post_norm": (HIDDEN,), "scale": (1,)})
    ple = randn(ROWS_N, 6, seed=5)
    gated = naive_gelu(X_ND.double() @ wide(params, "ple.gate").T) * ple.double()
    wanted = (X_ND + naive_norm(gated @ wide(params, "ple.out").T, wide(params, "ple.post_norm"))) * wide(params, "scale")
    assert_close(impl.load()(model_plan(layer), layer, params, REFERENCE_CONTEXT)(X_ND, ple), wanted, 1e-5)


@implementations_of("final_norm")
def test_final_norm(impl: KernelImpl) -> None:
    params = params_of({"norm": (HIDDEN,)})
    for rows in (1, ROWS_N):
        found = impl.load()(model_plan(layer_plan(1, 1, 4)), params, REFERENCE_CONTEXT)(X_ND[:rows])
        assert_close(found, naive_norm(X_ND[:rows], wide(params, "norm")), 1e-6)


@implementations_of("layer")
def test_layer(impl: KernelImpl) -> None:
    """What reads a whole layer at once equals the layer computed op by op; the reference reads none."""
    layer = layer_plan(4, 2, 32, 64, mlp_width=10, ple_dim=6, rope=RopeSpec(1e4, 32, 16))
    shapes: dict[str, Any] = {
        "attn.in": (128, HIDDEN),
        "attn.out": (HIDDEN, 128),
        "mlp.in": (20, HIDDEN),
        "mlp.out": (HIDDEN, 10),
    }
    shapes |= {"attn.q_norm": (32,), "ple.gate": (6, HIDDEN), "ple.out": (HIDDEN, 6), "scale": (1,)}
    shapes |= dict.fromkeys(("attn.norm", "attn.post_norm", "mlp.norm", "mlp.post_norm", "ple.post_norm"), (HIDDEN,))
    params, plan, part = params_of(shapes), model_plan(layer), Part(20, ROWS_N)
    params["attn.in"] = replace(params["attn.in"], names=("q",))  # type: ignore[type-var]
    whole = impl.load()(plan, layer, params, REFERENCE_CONTEXT)
    if impl.name == "reference":
        assert whole is None
        return
    pool, spans = make_cache([part], layer, F32, scattered=False, poison=torch.nan)
    tables = Rope(layer.rope, torch.device("cpu"), F32).tables(torch.arange(20, 20 + ROWS_N))
    step, ple = make_step([part], spans, layer, rope={layer.rope: tables}), randn(ROWS_N, 6, seed=5)
    qkv, attention, attn_out, mlp, ple_gate = (
        getattr(reference, f"build_{op}")(plan, layer, params, REFERENCE_CONTEXT) for op in LAYER_OPS
    )
    wanted = ple_gate(mlp(attn_out(X_ND, attention(qkv(X_ND, step, pool), step, pool))), ple)
    assert_close(whole(X_ND, step, pool, ple)[0], wanted, 1e-5)


@implementations_of("lm_head")
@pytest.mark.parametrize("softcap", [None, 30.0, 2.0])
@pytest.mark.parametrize("tied", [True, False])
def test_lm_head(impl: KernelImpl, tied: bool, softcap: float | None) -> None:
    params = params_of({"embed.tokens": (VOCAB, HIDDEN), "head": (VOCAB, HIDDEN)})
    plan = replace(model_plan(layer_plan(1, 1, 4)), tied_head=tied, softcap=softcap)
    logits = X_ND.double() @ wide(params, "embed.tokens" if tied else "head").T
    found = impl.load()(plan, params, REFERENCE_CONTEXT)(X_ND)
    assert found.dtype == F32
    assert_close(found, logits if softcap is None else softcap * torch.tanh(logits / softcap), 1e-5)


# ---- nothing is left out ----


def test_every_op_is_tested_here() -> None:
    tests = {name.removeprefix("test_") for name, value in globals().items() if callable(value)}
    assert {impl.op for impl in IMPLEMENTATIONS} == {*OPS, *DRAFTER_OPS, *TOWER_OPS}  # tested in tests/parity
    assert {*OPS} <= tests
