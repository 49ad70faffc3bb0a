"""Gates, gathers and the router's choice on Triton: what lies between products and needs no norm of the residual.

Owns the elementwise kernels, the embeddings and top-k. Arithmetic is float32 whatever the rows' dtype, rounded once at the end;
launch shapes follow from sizes alone. Shape letters as in `reference.py`, which says what every kernel computes; read
`fused_norm.py` for norms, `layer_ops.py` for who calls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcutter.ops.triton.dequant import apply_softcap, gelu
from gemcutter.ops.triton.fused_norm import FEW_ROWS, TILE, root_of
from gemcutter.ops.triton.variant import Variant, variant_of

COLUMNS = 1024  # elements of one program of an elementwise kernel
ROOT_HALF = 2**-0.5

# ---- elementwise ----


@triton.jit
def _gelu_mul_kernel(gate, gate_row, up, up_row, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < SIZE
    wide = tl.load(gate + row * gate_row + lanes, mask, 0.0).to(tl.float32)
    tl.store(out + row * SIZE + lanes, gelu(wide) * tl.load(up + row * up_row + lanes, mask, 0.0).to(tl.float32), mask)


@triton.jit
def _softcap_kernel(x, out, cap, SIZE, BLOCK: tl.constexpr, CAPPED: tl.constexpr):
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + lanes, lanes < SIZE, 0.0).to(tl.float32)
    if CAPPED:
        wide = apply_softcap(wide, cap)
    tl.store(out + lanes, wide, lanes < SIZE)


@triton.jit
def _embed_kernel(table, table_row, ids, out, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = table + tl.load(ids + row).to(tl.int64) * table_row
    found = tl.load(place + lanes, lanes < SIZE, 0.0).to(tl.float32)
    tl.store(out + row * SIZE + lanes, found * scale, lanes < SIZE)


def gelu_mul(gate_up_N2F: Tensor) -> Tensor:
    """Multiply the tanh-GELU of the first half of each row with its second half: [N, F]."""
    width = gate_up_N2F.shape[1] // 2
    return gate_mul(gate_up_N2F[:, :width], gate_up_N2F[:, width:])


def gate_mul(gate_NP: Tensor, ple_NP: Tensor) -> Tensor:
    """Multiply the tanh-GELU of one with the other, in the gate's dtype; the rows of both may lie apart."""
    rows, size = gate_NP.shape
    out = torch.empty(rows, size, dtype=gate_NP.dtype, device=gate_NP.device)
    if rows:
        block = min(COLUMNS, triton.next_power_of_2(size))
        _gelu_mul_kernel[(rows, triton.cdiv(size, block))](
            gate_NP, gate_NP.stride(0), ple_NP, ple_NP.stride(0), out, SIZE=size, BLOCK=block, num_warps=max(1, block // 256)
        )
    return out


def softcap(logits_RV: Tensor, cap: float | None) -> Tensor:
    """Softcap contiguous logits smoothly into (-cap, cap), in float32."""
    out = torch.empty(logits_RV.shape, dtype=torch.float32, device=logits_RV.device)
    if size := logits_RV.numel():
        grid = (triton.cdiv(size, COLUMNS),)
        _softcap_kernel[grid](logits_RV, out, cap or 1.0, size, BLOCK=COLUMNS, CAPPED=cap is not None, num_warps=4)
    return out


def embed_rows(table_VD: Tensor, ids_N: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Gather the rows that ids name, times `scale`, as `dtype`."""
    rows, size = ids_N.shape[0], table_VD.shape[1]
    out = torch.empty(rows, size, dtype=dtype, device=ids_N.device)
    if rows:
        block = min(COLUMNS, triton.next_power_of_2(size))
        _embed_kernel[(rows, triton.cdiv(size, block))](
            table_VD, table_VD.stride(0), ids_N, out, scale, SIZE=size, BLOCK=block, num_warps=max(1, block // 256)
        )
    return out


# ---- per-layer embeddings and routing ----


@triton.jit
def _ple_kernel(
    context, tokens, token_row, ids, weight, out, eps, token_scale, context_scale, root_half,
    LAYERS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, L_TILE: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """Norm each layer's share of a projected row and add the token's; GATHERS: `tokens` is a table, whose rows ids name."""
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    layers = tl.program_id(1) * L_TILE + tl.arange(0, L_TILE)
    mask = (layers < LAYERS)[:, None] & (lanes < SIZE)[None, :]
    at = layers[:, None] * SIZE + lanes[None, :]
    wide = tl.load(context + row * LAYERS * SIZE + at, mask, 0.0).to(tl.float32) * context_scale
    w = tl.load(weight + lanes, lanes < SIZE, 0.0)[None, :]
    source = tl.load(ids + row).to(tl.int64) if GATHERS else row
    token = tl.load(tokens + source * token_row + at, mask, 0.0).to(tl.float32) * token_scale
    tl.store(out + row * LAYERS * SIZE + at, (wide * root_of(wide, SIZE, eps) * w + token) * root_half, mask)


@triton.jit
def _route_kernel(
    logits, expert_scale, weights, chosen, SIZE: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, T_BLOCK: tl.constexpr
):
    """Take the TOP largest of a row one after the other, ties to the lower index; their softmax is over themselves."""
    row, lanes, places = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, T_BLOCK)
    left = tl.load(logits + row * SIZE + lanes, lanes < SIZE, float("-inf")).to(tl.float32)
    top = tl.max(left, axis=0)
    chance, index = tl.zeros([T_BLOCK], tl.float32), tl.zeros([T_BLOCK], tl.int32)
    for place in tl.static_range(TOP):
        best = tl.max(left, axis=0)
        at = tl.min(tl.where(left == best, lanes, SIZE - 1), axis=0)  # some expert even where no logit is a number
        chance = tl.where(places == place, tl.exp(best - top), chance)
        index = tl.where(places == place, at, index)
        left = tl.where(lanes == at, float("-inf"), left)
    chance = chance / tl.sum(chance, axis=0) * tl.load(expert_scale + index)
    tl.store(weights + row * TOP + places, chance, places < TOP)
    tl.store(chosen + row * TOP + places, index, places < TOP)


def ple_rows(
    context_NF: Tensor,
    tokens: Tensor,
    ids_N: Tensor | None,
    weight_P: Tensor,
    eps: float,
    token_scale: float,
    context_scale: float,
) -> Tensor:
    """Return (norm(context * context_scale) + tokens * token_scale) / sqrt(2), a norm for each P columns: [N, F/P, P].

    `tokens` is a table whose rows `ids` name, or rows [N, F] already gathered; its rows may lie apart.
    """
    (rows, width), size = context_NF.shape, weight_P.shape[0]
    layers = width // size
    out = torch.empty(rows, layers, size, dtype=context_NF.dtype, device=context_NF.device)
    if rows:
        block = triton.next_power_of_2(size)
        tile = min(1 if rows * layers <= 2 * FEW_ROWS else max(1, TILE // block), triton.next_power_of_2(layers))
        _ple_kernel[(rows, triton.cdiv(layers, tile))](
            context_NF, tokens, tokens.stride(0), ids_N, weight_P, out, eps, token_scale, context_scale, ROOT_HALF,
            LAYERS=layers, SIZE=size, BLOCK=block, L_TILE=tile, GATHERS=ids_N is not None,
            num_warps=min(4, max(1, tile * block // 256)),
        )  # fmt: skip
    return out


def route(logits_NX: Tensor, top_k: int, expert_scale_X: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` experts of every row: weights [N, T] in float32, which sum to 1 before the experts' own scales, and
    indices [N, T] in int32, best first.
    """
    rows, size = logits_NX.shape
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=logits_NX.device)
    chosen = torch.empty(rows, top_k, dtype=torch.int32, device=logits_NX.device)
    if rows:
        block = triton.next_power_of_2(size)
        _route_kernel[(rows,)](
            logits_NX, expert_scale_X, weights, chosen, SIZE=size, BLOCK=block, TOP=top_k,
            T_BLOCK=triton.next_power_of_2(top_k), num_warps=max(1, block // 256),
        )  # fmt: skip
    return weights, chosen


# ---- what is compiled ahead of time ----


def _variants() -> Iterator[Variant]:
    rows = {"SIZE": 10240, "BLOCK": COLUMNS}
    yield variant_of(_gelu_mul_kernel, "gelu-mul", 4, "*bf16 i32:16 *bf16 i32:16 *bf16", **rows)
    yield variant_of(_embed_kernel, "embed", 4, "*bf16 i32:16 *i64 *bf16 fp32", SIZE=2560, BLOCK=COLUMNS)
    yield variant_of(_softcap_kernel, "softcap", 4, "*bf16 *fp32 fp32 i32:16", BLOCK=COLUMNS, CAPPED=True)
    layers = {"LAYERS": 42, "SIZE": 256, "BLOCK": 256, "GATHERS": True}
    yield variant_of(_ple_kernel, "ple", 1, "*bf16 *bf16 i32:16 *i64 *fp32 *bf16 fp32 fp32 fp32 fp32", **layers, L_TILE=1)
    yield variant_of(_route_kernel, "route", 1, "*fp32 *fp32 *fp32 *i32", SIZE=128, BLOCK=128, TOP=8, T_BLOCK=8)


VARIANTS = tuple(_variants())
