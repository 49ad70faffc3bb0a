"""The row kernels against the reference: every mode and head dim, rows apart and in place, row counts around launch shapes.

Owns no whole layer op: `test_triton_layers.py` does. Read `gemcutter/ops/triton/fused_norm.py` beside it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemcutter.ops import reference
from gemcutter.ops.step import KEqVCache
from gemcutter.ops.triton import elementwise, fused_norm
from gemcutter.plan import Attn, LayerPlan, Proj, RopeSpec

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# One rounding of the result and the order of sums; half-precision results are rounded once here, more often in the reference.
TOLERANCES = {F32: 4e-6, BF16: 2e-2, F16: 2e-3}
EPS = 1e-6
LAYER = LayerPlan(0, Attn.GLOBAL, Proj.QKV, 0, "self", 4, 2, 16, None, RopeSpec(1e4, 16, 8), 1, None, 0)


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(size: int, seed: int = 1) -> Tensor:
    """Draw a norm's weight."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.5


def apart(x_ND: Tensor) -> Tensor:
    """Lay rows apart, NaN between them."""
    wide = torch.full((x_ND.shape[0], x_ND.shape[1] + 8), torch.nan, dtype=x_ND.dtype, device=x_ND.device)
    wide[:, : x_ND.shape[1]] = x_ND
    return wide[:, : x_ND.shape[1]]


def check(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    """Compare with a float32 result."""
    limit = TOLERANCES[found.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(found.float().cpu(), wanted.float().cpu(), rtol=limit, atol=limit)


# ---- norms ----


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 32), (3, 80), (2, 1536), (5, 7)])
def test_norm(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = draw(rows, size, dtype=dtype).to(device), weights(size).to(device)
    for given in (None, weight):
        wanted = reference.rms_norm(x.float(), given, EPS)
        check(fused_norm.norm(x, given, EPS), wanted)
        check(fused_norm.norm(apart(x), given, EPS), wanted)
    own = x.clone()
    assert fused_norm.norm(own, weight, EPS, out=own) is own
    check(own, reference.rms_norm(x.float(), weight, EPS))


def test_norm_of_many_rows_takes_fewer_warps(device: torch.device) -> None:
    few, many = fused_norm._row_shape(fused_norm.FEW_ROWS, 2560), fused_norm._row_shape(fused_norm.FEW_ROWS + 1, 2560)
    assert (few, many) == ((4096, 16), (4096, 8))
    x = draw(fused_norm.FEW_ROWS + 1, 16).to(device)
    check(fused_norm.norm(x, None, EPS), reference.rms_norm(x, None, EPS))


def test_norm_sees_eps_where_rows_are_small(device: torch.device) -> None:
    x = (draw(2, 64) * 1e-3).to(device)
    check(fused_norm.norm(x, None, 1e-2), reference.rms_norm(x, None, 1e-2))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [32, 80])
def test_norm_under_three_weights(size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, given = draw(3, size, dtype=dtype).to(device), [weights(size, seed).to(device) for seed in range(3)]
    found = fused_norm.multi_norm(x, given, EPS)
    assert [each.dtype for each in found] == [dtype, dtype, F32]
    for each, weight in zip(found, given, strict=True):
        check(each, reference.rms_norm(x.float(), weight, EPS))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("num_norms", [0, 1, 3])
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 80)])
def test_add_norm(rows: int, size: int, num_norms: int, dtype: torch.dtype, device: torch.device) -> None:
    x, y = draw(rows, size, dtype=dtype).to(device), draw(rows, size, dtype=dtype, seed=5).to(device)
    weight, given = weights(size).to(device), [weights(size, seed).to(device) for seed in range(num_norms)]
    wanted = (x.float() + reference.rms_norm(y.float(), weight, EPS)) * 0.7
    total, *normed = fused_norm.add_multi_norm(x, y, weight, EPS, 0.7, given)
    check(total, wanted)
    assert len(normed) == num_norms
    for each, one in zip(normed, given, strict=True):  # of the sum as it was rounded
        check(each, reference.rms_norm(total.float(), one, EPS))
    check(fused_norm.add_multi_norm(x, y, weight, EPS, 1.0, ())[0], wanted / 0.7)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("num_norms", [0, 1])
def test_join_norm(num_norms: int, dtype: torch.dtype, device: torch.device) -> None:
    x, dense, experts = (draw(3, 80, dtype=dtype, seed=seed).to(device) for seed in range(3))
    given = [weights(80, seed).to(device) for seed in range(3)]
    branches = [reference.rms_norm(y.float(), w, EPS) for y, w in zip((dense, experts), given[:2], strict=True)]
    wanted = (x.float() + reference.rms_norm(branches[0] + branches[1], given[2], EPS)) * 0.3
    again = [weights(80, 7).to(device)][:num_norms]
    total, *normed = fused_norm.join_multi_norm(x, dense, experts, *given, EPS, 0.3, again)
    check(total, wanted)
    assert len(normed) == num_norms
    for each, one in zip(normed, again, strict=True):  # of the sum as it was rounded
        check(each, reference.rms_norm(total.float(), one, EPS))


# ---- one pass over packed rows ----


def angles(rows: int, half: int, pairs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rotary tables that turn the first pairs and leave the others."""
    turns = torch.zeros(rows, 1, half)
    turns[..., :pairs] = draw(rows, 1, pairs, seed=3) * 3
    return turns.cos().to(device, dtype), turns.sin().to(device, dtype)


class Packed:
    """Packed rows of a layer, and what the reference makes of each part, in float32."""

    def __init__(self, layer: LayerPlan, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        dim = layer.head_dim
        self.layer, self.widths = layer, [width for _, width in layer.attn_parts()]
        self.raw = apart(draw(rows, sum(self.widths), dtype=dtype).to(device))
        self.q_norm, self.k_norm = weights(dim, 1).to(device), weights(dim, 2).to(device)
        self.rope = angles(rows, dim // 2, layer.rope.pairs, dtype, device)
        q, *kv = (part.reshape(rows, -1, dim).float() for part in self.raw.split(self.widths, dim=1))
        turn = [each.float() for each in self.rope]
        self.q = reference.rope(reference.rms_norm(q, self.q_norm, EPS), *turn)
        if kv:
            self.k = reference.rope(reference.rms_norm(kv[0], self.k_norm, EPS), *turn)
            self.v = reference.rms_norm(kv[-1], None, EPS) if layer.has_v_norm else kv[-1]

    def pool(self, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make a poisoned pool."""
        shape, device = (slots, self.layer.kv_heads, self.layer.head_dim), self.raw.device
        return torch.full(shape, torch.nan, device=device).to(dtype), torch.full(shape, torch.nan, device=device).to(dtype)


def slots_of(rows: int, device: torch.device) -> Tensor:
    """Return slots in no order, with room between them."""
    return (torch.randperm(rows, generator=torch.Generator().manual_seed(9)) * 2 + 1).to(device)


def check_pool(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], slots_N: Tensor, tolerance: float | None = None
) -> None:
    """Compare written slots, and see that no other was touched."""
    for pool, rows in zip(found, wanted, strict=True):
        check(pool.float()[slots_N], rows, tolerance or TOLERANCES[pool.dtype])
        others = torch.ones(pool.shape[0], dtype=torch.bool, device=pool.device)
        others[slots_N] = False
        assert pool.float()[others].isnan().all()


def layer_of(proj: Proj, dim: int, heads: int, kv_heads: int, pairs: int | None = None) -> LayerPlan:
    """Make a layer's plan."""
    rope = RopeSpec(1e4, dim, dim // 2 if pairs is None else pairs)
    return replace(LAYER, proj=proj, head_dim=dim, heads=heads, kv_heads=kv_heads, rope=rope)


GEOMETRIES = [  # head_dim, heads, key heads, turning pairs: powers of two and others
    (16, 4, 2, None),
    (24, 3, 1, 5),
    (64, 8, 1, 16),
    (128, 2, 2, 64),
    (256, 2, 1, None),
    (512, 4, 2, 64),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("proj", Proj)
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "pairs"), GEOMETRIES)
def test_finish(
    dim: int, heads: int, kv_heads: int, pairs: int | None, proj: Proj, dtype: torch.dtype, device: torch.device
) -> None:
    layer, rows = layer_of(proj, dim, heads, kv_heads, pairs), 3
    packed, slots = Packed(layer, rows, dtype, device), slots_of(rows, device)
    pool = packed.pool(2 * rows + 1, dtype)
    written = (slots, *pool) if proj.writes else ()
    found = fused_norm.finish_qkv(packed.raw, layer, packed.q_norm, packed.k_norm, EPS, *packed.rope, *written)
    assert found.is_contiguous()
    check(found, packed.q)
    if proj.writes:
        check_pool(pool, (packed.k, packed.v), slots)


@pytest.mark.parametrize("proj", [Proj.QKV, Proj.QK_ONLY])
def test_keys_and_queries_apart(proj: Proj, device: torch.device) -> None:
    """As in the last writer: keys and values of all rows, queries of some."""
    layer = layer_of(proj, 32, 4, 2)
    packed, slots = Packed(layer, 3, F32, device), slots_of(3, device)
    width, pool = packed.widths[0], packed.pool(7, F32)
    fused_norm.finish_kv(packed.raw[:, width:], layer, packed.k_norm, EPS, *packed.rope, slots, *pool)
    check_pool(pool, (packed.k, packed.v), slots)
    keep = torch.tensor([0, 2], device=device)
    cos, sin = (table[keep] for table in packed.rope)
    check(fused_norm.finish_q(packed.raw[keep, :width], layer, packed.q_norm, EPS, cos, sin), packed.q[keep])


def test_values_without_a_norm(device: torch.device) -> None:
    layer = replace(layer_of(Proj.QKV, 16, 2, 1), has_v_norm=False)
    packed, slots = Packed(layer, 2, F32, device), slots_of(2, device)
    pool = packed.pool(5, F32)
    fused_norm.finish_qkv(packed.raw, layer, packed.q_norm, packed.k_norm, EPS, *packed.rope, slots, *pool)
    check_pool(pool, (packed.k, packed.v), slots)


def test_a_compact_layer_keeps_only_the_pairs_that_turn(device: torch.device) -> None:
    layer = layer_of(Proj.QK_ONLY, 32, 2, 2, pairs=4)
    packed, slots = Packed(layer, 3, F32, device), slots_of(3, device)
    normed = packed.pool(7, F32)[1]
    turned = torch.full((7, 2, layer.rotary_dims), torch.nan, device=device)
    fused_norm.finish_qkv(packed.raw, layer, packed.q_norm, packed.k_norm, EPS, *packed.rope, slots, turned, normed)
    compact = KEqVCache(normed, turned, packed.k_norm)
    check_pool((compact.keys(slice(None)), normed), (packed.k, packed.v), slots)


@pytest.mark.parametrize("has_v_norm", [True, False])
def test_8_bit_pools_saturate(has_v_norm: bool, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU converts no 8-bit floats")
    layer = replace(layer_of(Proj.QKV, 16, 2, 1), has_v_norm=has_v_norm)
    packed, slots = Packed(layer, 2, F32, device), slots_of(2, device)
    values = packed.v if has_v_norm else (packed.v * 300).clamp(-448, 448)
    packed.raw[:, -16:] *= 300
    pool = packed.pool(5, torch.float8_e4m3fn)
    fused_norm.finish_qkv(packed.raw, layer, packed.q_norm, packed.k_norm, EPS, *packed.rope, slots, *pool)
    keys, stored = (without_carries(each[slots].float(), x) for each, x in zip(pool, (packed.k, values), strict=True))
    check(keys, packed.k, 2**-4)  # three bits of mantissa, one rounding
    check(stored, values, 2**-4)
    assert has_v_norm or values.abs().max() == 448


def without_carries(found: Tensor, wanted: Tensor) -> Tensor:
    """Replace what rounds up to a power of two: there Triton's interpreter forgets to raise the exponent."""
    rounded = wanted.to(torch.float8_e4m3fn).float()
    carries = rounded.frexp().exponent > wanted.frexp().exponent
    return torch.where(carries, rounded, found) if found.device.type == "cpu" else found


def test_padding_rows_are_written_nowhere(device: torch.device) -> None:
    layer = layer_of(Proj.QKV, 16, 2, 1)
    packed, slots = Packed(layer, 4, F32, device), torch.tensor([3, -1, 0, -1], device=device)
    pool = packed.pool(5, F32)
    fused_norm.finish_qkv(packed.raw, layer, packed.q_norm, packed.k_norm, EPS, *packed.rope, slots, *pool)
    check_pool(pool, (packed.k[[0, 2]], packed.v[[0, 2]]), slots[[0, 2]])


@pytest.mark.parametrize("proj", Proj)
def test_queries_in_place(proj: Proj, device: torch.device) -> None:
    layer = layer_of(proj, 16, 4, 2)
    packed, slots = Packed(layer, 3, F32, device), slots_of(3, device)
    pool = packed.pool(7, F32)
    own = packed.raw[:, : packed.widths[0]].unflatten(1, (4, 16))
    found = fused_norm.finish_qkv(
        packed.raw, layer, packed.q_norm, packed.k_norm, EPS, *packed.rope, slots, *pool, out=own
    )  # fmt: skip
    assert found is own
    check(packed.raw[:, : packed.widths[0]].reshape(3, 4, 16), packed.q)


def test_many_rows_share_programs(device: torch.device) -> None:
    """Beyond the switch a program takes several heads, fewer than its tile where heads are no power of two."""
    layer = layer_of(Proj.QKV, 16, 6, 3)
    rows = 2 * fused_norm.FEW_ROWS // 9 + 1
    assert fused_norm.head_tiles(rows - 1, 6, 3, 8) == (1, 1)
    assert fused_norm.head_tiles(rows, 6, 3, 8) == (8, 4)
    assert fused_norm.head_tiles(4096, 32, 16, 128) == (8, 8)
    packed, slots = Packed(layer, rows, F32, device), slots_of(rows, device)
    pool = packed.pool(2 * rows + 1, F32)
    check(fused_norm.finish_qkv(packed.raw, layer, packed.q_norm, packed.k_norm, EPS, *packed.rope, slots, *pool), packed.q)
    check_pool(pool, (packed.k, packed.v), slots)


# ---- elementwise, gathers, routing ----


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 32), (3, 20), (2, elementwise.COLUMNS + 8)])
def test_gates(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    both = (draw(rows, 2 * size, dtype=dtype) * 4).to(device)
    gate, up = both.float().chunk(2, dim=1)
    check(elementwise.gelu_mul(both), reference.gelu_mul(gate, up))
    check(elementwise.gate_mul(both[:, :size], apart(both[:, size:])), reference.gelu_mul(gate, up))


def test_gates_of_extremes_are_numbers(device: torch.device) -> None:
    gate = torch.tensor([[-3e38, -1e4, -40.0, 0.0, 40.0, 1e4]], device=device)
    check(elementwise.gate_mul(gate, torch.ones_like(gate)), torch.tensor([[0.0, 0.0, 0.0, 0.0, 40.0, 1e4]]))


@pytest.mark.parametrize("cap", [None, 30.0, 2.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_softcap(cap: float | None, dtype: torch.dtype, device: torch.device) -> None:
    logits = (draw(3, 700, dtype=dtype) * 40).to(device)
    found = elementwise.softcap(logits, cap)
    assert found.dtype == F32
    check(found, reference.softcap(logits.float(), cap))


@pytest.mark.parametrize("stored", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("size", [32, elementwise.COLUMNS + 40])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_embedding(size: int, stored: torch.dtype, ids_dtype: torch.dtype, device: torch.device) -> None:
    table = apart(draw(9, size, dtype=stored).to(device))
    ids = torch.tensor([8, 0, 0, 3], device=device)
    found = elementwise.embed_rows(table, ids.to(ids_dtype), 1.5, F32)
    torch.testing.assert_close(found, table[ids].float() * 1.5, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("layers", "size", "rows"), [(3, 16, 2), (5, 12, 3), (65, 8, 8)])
def test_per_layer_rows(layers: int, size: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """From a table that holds more layers, and from gathered rows."""
    table = draw(7, (layers + 2) * size, dtype=dtype, seed=4).to(device)[:, size:-size]
    ids = (torch.arange(rows) * 3 % 7).to(device)
    context, weight = draw(rows, layers * size, dtype=dtype).to(device), weights(size).to(device)
    split = (context.float() * 0.1).view(rows, layers, size)
    wanted = (reference.rms_norm(split, weight, EPS) + table[ids].float().view(rows, layers, size) * 4) * 2**-0.5
    check(elementwise.ple_rows(context, table, ids, weight, EPS, 4.0, 0.1), wanted)
    check(elementwise.ple_rows(context, table[ids], None, weight, EPS, 4.0, 0.1), wanted)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (6, 3), (16, 8), (128, 8), (1, 1)])
def test_routing(experts: int, top_k: int, device: torch.device) -> None:
    logits, scale = (draw(3, experts) * 3).to(device), weights(experts).to(device)
    found, chosen = elementwise.route(logits, top_k, scale)
    chance, wanted = logits.softmax(-1).topk(top_k, dim=-1)
    assert (found.dtype, chosen.dtype) == (F32, torch.int32)
    assert torch.equal(chosen.long(), wanted)
    check(found, chance / chance.sum(-1, keepdim=True) * scale[wanted])


def test_routing_of_ties_takes_each_expert_once(device: torch.device) -> None:
    found, chosen = elementwise.route(torch.zeros(2, 6, device=device), 4, torch.ones(6, device=device))
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2
    check(found, torch.full((2, 4), 0.25))


def test_routing_of_what_is_no_number_names_experts_that_exist(device: torch.device) -> None:
    """A broken row must not break what runs beside it."""
    logits = torch.zeros(2, 6, device=device)
    logits[0] = torch.nan
    found, chosen = elementwise.route(logits, 4, torch.ones(6, device=device))
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 6
    assert bool(found[0].isnan().all())
    check(found[1:], torch.full((1, 4), 0.25))


def test_no_rows_are_no_launch(device: torch.device) -> None:
    """A grid of nothing is an error on a GPU."""
    x, w = torch.empty(0, 32, device=device), weights(32).to(device)
    for found in (fused_norm.norm(x, w, EPS), fused_norm.add_multi_norm(x, x, w, EPS, 1.0, ())[0], elementwise.gate_mul(x, x)):
        assert found.shape == (0, 32)
    assert fused_norm.join_multi_norm(x, x, x, w, w, w, EPS, 1.0, (w,))[1].shape == (0, 32)
    assert elementwise.softcap(x, 30.0).shape == (0, 32)
    assert elementwise.embed_rows(x, torch.empty(0, dtype=torch.long, device=device), 1.0, F32).shape == (0, 32)
    no_angles = torch.empty(0, 1, 8, device=device)
    assert fused_norm.finish_q(x, LAYER, w, EPS, no_angles, no_angles).shape == (0, 4, 16)
    assert elementwise.route(x, 2, w)[1].shape == (0, 2)
    assert elementwise.ple_rows(x, x, None, weights(16).to(device), EPS, 1.0, 1.0).shape == (0, 2, 16)
