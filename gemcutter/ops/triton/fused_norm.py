"""Norms on Triton with what surrounds them: residuals, several weights at once, and one pass over a packed q/k/v row.

Owns the kernels between matrix products and attention that norm. Rows are read once and written once; arithmetic is float32
whatever the rows' dtype, rounded once at the end. Launch shapes follow from row counts and sizes alone, so that a step can be
captured in a graph. Refuses to know weights, steps and pages beyond a slot number a row. Shape letters as in `reference.py`,
which says what every kernel computes; `elementwise.py` has the kernels that do not norm, `layer_ops.py` calls both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcutter.ops.triton.variant import Variant, variant_of
from gemcutter.plan import LayerPlan, Proj

FEW_ROWS = 256  # up to here a kernel has the chip to itself, and a row is spread over more warps
TILE = 2048  # elements of one program where rows are many

# ---- norms and residuals ----
#
# A kernel loads all it needs before its first sum: the compiler moves no load across it, and a row that is alone waits for each.


@triton.jit
def root_of(x, SIZE: tl.constexpr, eps):
    """Return 1 / rms of the last axis, kept, of lanes that are zero beyond SIZE."""
    return tl.rsqrt(tl.sum(x * x, axis=-1, keep_dims=True) / SIZE + eps)


@triton.jit
def _load_norm_weights(w0, w1, w2, lanes, mask, NUM_NORMS: tl.constexpr):
    """Load up to three norm weights; those that are missing stand for the first."""
    first = tl.load(w0 + lanes, mask, 0.0) if NUM_NORMS > 0 else tl.zeros_like(lanes).to(tl.float32)
    second, third = first, first
    if NUM_NORMS == 3:
        second, third = tl.load(w1 + lanes, mask, 0.0), tl.load(w2 + lanes, mask, 0.0)
    return first, second, third


@triton.jit
def _store_norms(normed, weights, out0, out1, out2, at, mask, NUM_NORMS: tl.constexpr):
    """Write one row's norm under NUM_NORMS weights."""
    tl.store(out0 + at, normed * weights[0], mask)
    if NUM_NORMS == 3:
        tl.store(out1 + at, normed * weights[1], mask)
        tl.store(out2 + at, normed * weights[2], mask)


@triton.jit
def _store_sum(found, out, weights, out0, out1, out2, at, mask, eps, SIZE: tl.constexpr, NUM_NORMS: tl.constexpr):
    """Write one row, and its norm under NUM_NORMS weights."""
    rounded = found.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask)
    if NUM_NORMS > 0:
        again = rounded.to(tl.float32)  # what a later kernel would read
        _store_norms(again * root_of(again, SIZE, eps), weights, out0, out1, out2, at, mask, NUM_NORMS)


@triton.jit
def _norm_kernel(x, x_row, w0, w1, w2, out0, out1, out2, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, NUM_NORMS: tl.constexpr):
    """Norm a row; NUM_NORMS 0: without a weight, 3: under three weights."""
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, at = lanes < SIZE, row * SIZE + lanes
    wide = tl.load(x + row * x_row + lanes, mask, 0.0).to(tl.float32)
    weights = _load_norm_weights(w0, w1, w2, lanes, mask, NUM_NORMS)
    normed = wide * root_of(wide, SIZE, eps)
    if NUM_NORMS == 0:
        tl.store(out0 + at, normed, mask)
    else:
        _store_norms(normed, weights, out0, out1, out2, at, mask, NUM_NORMS)


@triton.jit
def _add_norm_kernel(
    x, y, w, out, w0, w1, w2, out0, out1, out2, eps, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr, NUM_NORMS: tl.constexpr
):
    """Add a normed row to the residual, and norm the sum again under NUM_NORMS weights."""
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, at = lanes < SIZE, row * SIZE + lanes
    residual, wide = tl.load(x + at, mask, 0.0).to(tl.float32), tl.load(y + at, mask, 0.0).to(tl.float32)
    weight, weights = tl.load(w + lanes, mask, 0.0), _load_norm_weights(w0, w1, w2, lanes, mask, NUM_NORMS)
    found = (residual + wide * root_of(wide, SIZE, eps) * weight) * scale
    _store_sum(found, out, weights, out0, out1, out2, at, mask, eps, SIZE, NUM_NORMS)


@triton.jit
def _join_norm_kernel(
    x, dense, experts, w_dense, w_experts, w_post, out, w0, out0, eps, scale,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, NUM_NORMS: tl.constexpr,
):  # fmt: skip
    """Norm two branches, norm their sum, add the residual, and norm that again under NUM_NORMS weights."""
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, at = lanes < SIZE, row * SIZE + lanes
    one, two = tl.load(dense + at, mask, 0.0).to(tl.float32), tl.load(experts + at, mask, 0.0).to(tl.float32)
    weight_one, weight_two = tl.load(w_dense + lanes, mask, 0.0), tl.load(w_experts + lanes, mask, 0.0)
    residual, weight = tl.load(x + at, mask, 0.0).to(tl.float32), tl.load(w_post + lanes, mask, 0.0)
    weights = _load_norm_weights(w0, w0, w0, lanes, mask, NUM_NORMS)
    both = one * root_of(one, SIZE, eps) * weight_one + two * root_of(two, SIZE, eps) * weight_two
    found = (residual + both * root_of(both, SIZE, eps) * weight) * scale
    _store_sum(found, out, weights, out0, out0, out0, at, mask, eps, SIZE, NUM_NORMS)


def norm(x_ND: Tensor, weight_D: Tensor | None, eps: float, out: Tensor | None = None) -> Tensor:
    """Norm rows, which may lie apart, in float32; into contiguous `out`, which may be x itself, or new rows."""
    out = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device) if out is None else out
    _launch_norm(x_ND, (weight_D, None, None), (out, None, None), eps, 0 if weight_D is None else 1)
    return out


def multi_norm(x_ND: Tensor, weights: Sequence[Tensor], eps: float) -> tuple[Tensor, ...]:
    """Norm rows under three weights in one pass; the third result, for a router, is float32."""
    outs = _fan_outs(x_ND, 3)
    _launch_norm(x_ND, tuple(weights), outs, eps, 3)
    return outs


def _launch_norm(
    x_ND: Tensor, weights: tuple[Tensor | None, ...], outs: tuple[Tensor | None, ...], eps: float, num_norms: int
) -> None:
    rows, size = x_ND.shape
    if rows:
        block, warps = _row_shape(rows, size)
        _norm_kernel[(rows,)](
            x_ND, x_ND.stride(0), *weights, *outs, eps, SIZE=size, BLOCK=block, NUM_NORMS=num_norms, num_warps=warps
        )


def add_multi_norm(
    x_ND: Tensor, y_ND: Tensor, weight_D: Tensor, eps: float, scale: float, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return (x + norm(y)) * scale, and its norm under each of none, one or three weights (the third in float32)."""
    rows, size = x_ND.shape
    out, outs = torch.empty_like(x_ND), _fan_outs(x_ND, len(weights))
    if rows:
        block, warps = _row_shape(rows, size)
        spare = (None,) * (3 - len(weights))
        _add_norm_kernel[(rows,)](
            x_ND, y_ND, weight_D, out, *weights, *spare, *outs, *spare, eps, scale,
            SIZE=size, BLOCK=block, NUM_NORMS=len(weights), num_warps=warps,
        )  # fmt: skip
    return out, *outs


def join_multi_norm(
    x_ND: Tensor,
    dense_ND: Tensor,
    experts_ND: Tensor,
    w_dense_D: Tensor,
    w_experts_D: Tensor,
    w_post_D: Tensor,
    eps: float,
    scale: float,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Return (x + norm(norm(dense) + norm(experts))) * scale, each norm under its own weight, and its norm under none or one."""
    rows, size = x_ND.shape
    out, outs = torch.empty_like(x_ND), _fan_outs(x_ND, len(weights))
    if rows:
        block, warps = _row_shape(rows, size)
        again = (*weights, *outs) or (None, None)
        _join_norm_kernel[(rows,)](
            x_ND, dense_ND, experts_ND, w_dense_D, w_experts_D, w_post_D, out, *again, eps, scale,
            SIZE=size, BLOCK=block, NUM_NORMS=len(weights), num_warps=warps,
        )  # fmt: skip
    return out, *outs


def _fan_outs(x_ND: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(x_ND.shape, dtype=dtype, device=x_ND.device) for dtype in (x_ND.dtype, x_ND.dtype, torch.float32)[:count]
    )


def _row_shape(rows: int, size: int) -> tuple[int, int]:
    """Return the lanes of a row and its warps: 8 elements a thread, one 16-byte load, where rows are few, else 16."""
    block = triton.next_power_of_2(size)
    return block, min(16, max(1, block // (256 if rows <= FEW_ROWS else 512)))


# ---- one pass over packed query, key and value rows ----

QKV, QK_ONLY, Q_ONLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MODES = {Proj.QKV: 0, Proj.QK_ONLY: 1, Proj.Q_ONLY: 2}


@triton.jit
def _load_halves(place, mask, HALF: tl.constexpr):
    """Load heads, or a norm's weight, as the two halves that the rotation pairs."""
    return tl.load(place, mask, 0.0).to(tl.float32), tl.load(place + HALF, mask, 0.0).to(tl.float32)


@triton.jit
def _normed(low, high, HALF: tl.constexpr, eps):
    """Divide heads [B, E/2] and [B, E/2] by their rms."""
    root = tl.rsqrt(tl.sum(low * low + high * high, axis=1, keep_dims=True) / (2 * HALF) + eps)
    return low * root, high * root


@triton.jit
def _store_narrow(place, x, mask):
    """Write what the target's dtype holds; 8-bit floats saturate, since they have no infinity."""
    if place.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0)
    tl.store(place, x.to(place.dtype.element_ty), mask)


@triton.jit
def _finish_queries(raw, out, weight, cos, sin, heads, lanes, eps, HEADS: tl.constexpr, HALF: tl.constexpr):
    mask = (heads < HEADS)[:, None] & (lanes < HALF)[None, :]
    at = heads[:, None] * (2 * HALF) + lanes[None, :]
    low, high = _load_halves(raw + at, mask, HALF)
    w_low, w_high = _load_halves(weight + lanes[None, :], (lanes < HALF)[None, :], HALF)
    low, high = _normed(low, high, HALF, eps)
    low, high = low * w_low, high * w_high
    tl.store(out + at, low * cos - high * sin, mask)
    tl.store(out + at + HALF, high * cos + low * sin, mask)


@triton.jit
def _finish_keys(
    raw, k_pool, v_pool, slot, weight, cos, sin, heads, lanes, eps,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, PROJ: tl.constexpr, V_NORM: tl.constexpr,
):  # fmt: skip
    """Write one slot: the first PAIRS pairs of each key, and its value. A negative slot pads a batch and is written nowhere."""
    mask = (heads < KV_HEADS)[:, None] & (lanes < HALF)[None, :]
    at = heads[:, None] * (2 * HALF) + lanes[None, :]
    low, high = _load_halves(raw + at, mask, HALF)
    w_low, w_high = _load_halves(weight + lanes[None, :], (lanes < HALF)[None, :], HALF)
    if PROJ == QKV:
        v_low, v_high = _load_halves(raw + KV_HEADS * 2 * HALF + at, mask, HALF)
        low, high = _normed(low, high, HALF, eps)
        if V_NORM:
            v_low, v_high = _normed(v_low, v_high, HALF, eps)
    else:
        v_low, v_high = low, high
        low, high = _normed(low, high, HALF, eps)
        if V_NORM:
            v_low, v_high = low, high
    low, high = low * w_low, high * w_high
    written = mask & (heads < tl.where(slot >= 0, KV_HEADS, 0))[:, None]
    is_kept = written & (lanes < PAIRS)[None, :]
    k_place = k_pool + slot * (KV_HEADS * 2 * PAIRS) + heads[:, None] * (2 * PAIRS) + lanes[None, :]
    _store_narrow(k_place, low * cos - high * sin, is_kept)
    _store_narrow(k_place + PAIRS, high * cos + low * sin, is_kept)
    v_place = v_pool + slot * (KV_HEADS * 2 * HALF) + at
    _store_narrow(v_place, v_low, written)
    _store_narrow(v_place + HALF, v_high, written)


@triton.jit
def _finish_kernel(
    raw, raw_row, out, out_row, k_pool, v_pool, slots, q_weight, k_weight, cos, sin, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, PROJ: tl.constexpr, V_NORM: tl.constexpr,
):  # fmt: skip
    """Complete one row's heads, Q_TILE query heads or K_TILE key heads a program. HEADS 0: keys and values alone."""
    row, part, lanes = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    q_parts: tl.constexpr = (HEADS + Q_TILE - 1) // Q_TILE
    raw += row * raw_row
    c = tl.load(cos + row * HALF + lanes, lanes < HALF, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * HALF + lanes, lanes < HALF, 0.0).to(tl.float32)[None, :]
    if HEADS > 0:  # noqa: SIM102  # decided when compiled, the next when run
        if part < q_parts:
            heads = part * Q_TILE + tl.arange(0, Q_TILE)
            _finish_queries(raw, out + row * out_row, q_weight, c, s, heads, lanes, eps, HEADS, HALF)
    if PROJ != Q_ONLY:  # noqa: SIM102
        if part >= q_parts:
            heads = (part - q_parts) * K_TILE + tl.arange(0, K_TILE)
            slot = tl.load(slots + row).to(tl.int64)
            raw += HEADS * 2 * HALF
            _finish_keys(
                raw, k_pool, v_pool, slot, k_weight, c, s, heads, lanes, eps, KV_HEADS, HALF, PAIRS, PROJ, V_NORM
            )  # fmt: skip


def finish_qkv(
    raw_NF: Tensor,
    layer: LayerPlan,
    q_norm_E: Tensor,
    k_norm_E: Tensor | None,
    eps: float,
    cos_N1C: Tensor,
    sin_N1C: Tensor,
    slots_N: Tensor | None = None,
    k_TKE: Tensor | None = None,
    v_TKE: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Norm and rotate a layer's projected rows: queries [N, H, E] are returned, keys and values go to their slots.

    `raw` holds q, k and v of a row one after the other, as far as the layer has them; rows may lie apart. A negative slot is
    written nowhere. `out` [N, H, E], dense but for its rows, may be the queries' own part of `raw`.
    """
    shape = (raw_NF.shape[0], layer.heads, layer.head_dim)
    out = torch.empty(shape, dtype=raw_NF.dtype, device=raw_NF.device) if out is None else out
    _finish(raw_NF, layer, layer.heads, layer.proj, out, q_norm_E, k_norm_E, eps, (cos_N1C, sin_N1C), slots_N, k_TKE, v_TKE)
    return out


def finish_q(raw_NF: Tensor, layer: LayerPlan, q_norm_E: Tensor, eps: float, cos_N1C: Tensor, sin_N1C: Tensor) -> Tensor:
    """Norm and rotate projected queries alone, whatever else the layer has: [N, H, E]."""
    out = torch.empty(raw_NF.shape[0], layer.heads, layer.head_dim, dtype=raw_NF.dtype, device=raw_NF.device)
    _finish(raw_NF, layer, layer.heads, Proj.Q_ONLY, out, q_norm_E, None, eps, (cos_N1C, sin_N1C), None, None, None)
    return out


def finish_kv(
    raw_NF: Tensor,
    layer: LayerPlan,
    k_norm_E: Tensor,
    eps: float,
    cos_N1C: Tensor,
    sin_N1C: Tensor,
    slots_N: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
) -> None:
    """Write the keys and values of rows whose queries nobody wants; `raw` holds k and, in a QKV layer, v."""
    _finish(raw_NF, layer, 0, layer.proj, None, None, k_norm_E, eps, (cos_N1C, sin_N1C), slots_N, k_TKE, v_TKE)


def _finish(
    raw_NF: Tensor,
    layer: LayerPlan,
    heads: int,
    proj: Proj,
    out: Tensor | None,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    angles: tuple[Tensor, Tensor],
    slots_N: Tensor | None,
    k_TKE: Tensor | None,
    v_TKE: Tensor | None,
) -> None:
    rows, kv_heads = raw_NF.shape[0], layer.kv_heads if proj.writes else 0
    if not rows:
        return
    half = layer.head_dim // 2
    block = triton.next_power_of_2(half)
    q_tile, k_tile = head_tiles(rows, heads, kv_heads, block)
    parts = triton.cdiv(heads, q_tile) + triton.cdiv(kv_heads, k_tile)
    _finish_kernel[(rows, parts)](
        raw_NF, raw_NF.stride(0), out, 0 if out is None else out.stride(0), k_TKE, v_TKE, slots_N, q_norm_E, k_norm_E, *angles,
        eps, HEADS=heads, KV_HEADS=kv_heads, HALF=half, PAIRS=half if k_TKE is None else k_TKE.shape[2] // 2, BLOCK=block,
        Q_TILE=q_tile, K_TILE=k_tile, PROJ=_MODES[proj], V_NORM=layer.has_v_norm, num_warps=_finish_warps(q_tile, k_tile, block),
    )  # fmt: skip


def head_tiles(rows: int, heads: int, kv_heads: int, block: int) -> tuple[int, int]:
    """Return how many query heads and key heads one program takes: one where rows are few, TILE elements where they are many."""
    most = 1 if rows * (heads + kv_heads) <= 2 * FEW_ROWS else max(1, TILE // (2 * block))
    return min(most, triton.next_power_of_2(max(heads, 1))), min(most, triton.next_power_of_2(max(kv_heads, 1)))


def _finish_warps(q_tile: int, k_tile: int, block: int) -> int:
    return min(8, max(1, block * max(q_tile, k_tile) // 128))


# ---- what is compiled ahead of time ----


def _norm_variants() -> Iterator[Variant]:
    for size, rows in ((2560, 1), (2560, 4096), (5376, 1), (5376, 4096)):  # E4B, 31B
        block, warps = _row_shape(rows, size)
        sizes = {"SIZE": size, "BLOCK": block}
        at = f"{size}x{'1' if rows == 1 else 'many'}"
        yield variant_of(_norm_kernel, f"norm-{at}", warps, "*bf16 i32:16 *fp32 - - *bf16 - - fp32", **sizes, NUM_NORMS=1)
        yield variant_of(
            _add_norm_kernel,
            f"add-norm-{at}",
            warps,
            "*bf16 *bf16 *fp32 *bf16 *fp32 - - *bf16 - - fp32 fp32",
            **sizes,
            NUM_NORMS=1,
        )
    block, warps = _row_shape(1, 2816)  # 26B-A4B
    sizes = {"SIZE": 2816, "BLOCK": block}
    yield variant_of(
        _norm_kernel,
        "multi-norm",
        warps,
        "*bf16 i32:16 *fp32 *fp32 *fp32 *bf16 *bf16 *fp32 fp32",
        **sizes,
        NUM_NORMS=3,
    )
    branches = "*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *bf16 *fp32 *bf16 fp32 fp32"
    yield variant_of(_join_norm_kernel, "join-norm", warps, branches, **(sizes | {"NUM_NORMS": 1}))


def _finish_variants() -> Iterator[Variant]:
    for heads, kv_heads, dim, proj in ((8, 2, 256, Proj.QKV), (32, 4, 512, Proj.QK_ONLY), (8, 0, 512, Proj.Q_ONLY)):
        for rows, pool in ((1, "bf16"), (4096, "bf16"), (4096, "fp8e4nv")):
            block = dim // 2
            q_tile, k_tile = head_tiles(rows, heads, kv_heads, block)
            cache = f"*{pool} *{pool} *i64 *fp32 *fp32" if kv_heads else "- - - *fp32 -"
            if kv_heads or pool == "bf16":
                yield variant_of(
                    _finish_kernel,
                    f"finish-{proj.value}-{dim}x{'1' if rows == 1 else 'many'}-{pool}",
                    _finish_warps(q_tile, k_tile, block),
                    f"*bf16 i32:16 *bf16 i32:16 {cache} *bf16 *bf16 fp32",
                    HEADS=heads,
                    KV_HEADS=kv_heads,
                    HALF=dim // 2,
                    PAIRS=dim // 2,
                    BLOCK=block,
                    Q_TILE=q_tile,
                    K_TILE=k_tile,
                    PROJ=_MODES[proj],
                    V_NORM=True,
                )


VARIANTS = (*_norm_variants(), *_finish_variants())
