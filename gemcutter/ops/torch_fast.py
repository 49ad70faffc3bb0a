"""Faster words on torch's own kernels: library matrix products and fused attention.

Owns no mathematics: each function here equals its namesake in `reference.py` within rounding. Rows may depend on their
neighbours in the last bits, since libraries choose kernels by shape. Read `bind.py` for when these are chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.ops.reference import WEIGHT_TILE, Attention
from gemcutter.ops.step import Pool, Step, window_mask
from gemcutter.plan import LayerPlan
from gemcutter.quant import Weight

MASK_ROWS = 128  # rows of one attention call: keys outside their common window are skipped whole
MASK_ELEMENTS = 1 << 23  # mask entries of one call; the library widens each to a float


def linear_dense(x_ND: Tensor, weight: Weight) -> Tensor:
    """Multiply with the library's kernel for the stored dtype, one call a part."""
    products = [_product(x_ND, part) for part in weight.parts if isinstance(part, Tensor)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _product(x_ND: Tensor, part: Tensor) -> Tensor:
    if x_ND.dtype == part.dtype:
        return F.linear(x_ND, part)
    wide = torch.promote_types(x_ND.dtype, part.dtype)  # the router alone, whose rows are float32
    return F.linear(x_ND.to(wide), part.to(wide)).to(x_ND.dtype)


def linear_tiled(x_ND: Tensor, weight: Weight) -> Tensor:
    """Multiply in float32, one converted tile of the weight at a time.

    Where the processor has no bfloat16 products, the library's bfloat16 kernel is several times slower than converting a tile
    that stays in the cache and calling the float32 kernel (docs/log.md). One bfloat16 row is the exception: its kernel only
    streams the weight.
    """
    if x_ND.shape[0] == 1 and all(isinstance(part, Tensor) and part.dtype == x_ND.dtype for part in weight.parts):
        return linear_dense(x_ND, weight)
    wide = x_ND.float()
    out = torch.empty(x_ND.shape[0], weight.rows)
    scratch = torch.empty(max(WEIGHT_TILE, weight.columns))
    offset = 0
    for tile in weight.row_chunks(WEIGHT_TILE):
        narrow = scratch[: tile.numel()].view(tile.shape).copy_(tile) if isinstance(tile, Tensor) else tile.dequantize()
        torch.mm(wide, narrow.t(), out=out[:, offset : offset + tile.shape[0]])
        offset += tile.shape[0]
    return out.to(x_ND.dtype)


def build_attention(layer: LayerPlan) -> Attention:
    """Build fused attention: a call for a few rows of a sequence at a time, over the keys that they see and no others."""

    def attention(q_NHE: Tensor, step: Step, pool: Pool) -> Tensor:
        out = torch.empty_like(q_NHE)
        for index, span in enumerate(step.spans[layer.window]):
            first, last = step.row_start[index], step.row_start[index + 1]
            if first == last:
                continue
            keys, values = (x.to(q_NHE.dtype) for x in pool.read(layer.kv_layer, span))  # the cache may be narrower
            newest = span.start + keys.shape[0]
            tile = max(1, min(MASK_ROWS, MASK_ELEMENTS // (newest * layer.heads // layer.kv_heads)))
            for start in range(first, last, tile):
                rows = slice(start, min(start + tile, last))
                out[rows] = _attend(q_NHE[rows], step.positions_N[rows], keys, values, span.start, layer.window)
        return out

    return attention


def _attend(q_nHE: Tensor, positions_n: Tensor, k_TKE: Tensor, v_TKE: Tensor, start: int, window: int | None) -> Tensor:
    """Attend for some rows of one sequence, whose keys begin at position `start`.

    The G query heads of a key head are laid out as rows, so that keys are read once for all of them.
    """
    rows, heads, dim = q_nHE.shape
    key_heads = k_TKE.shape[1]
    first, last = int(positions_n[0]), int(positions_n[-1])
    oldest = start if window is None else max(start, first - window + 1)
    keys = slice(oldest - start, last + 1 - start)
    q_1KRE = q_nHE.transpose(0, 1).reshape(1, key_heads, -1, dim)
    k_1KTE, v_1KTE = (x[keys].transpose(0, 1)[None] for x in (k_TKE, v_TKE))
    seen = None
    if rows > 1:
        positions_T = torch.arange(oldest, last + 1, device=q_nHE.device)
        seen = window_mask(positions_n, positions_T, window).repeat(heads // key_heads, 1)
    out = F.scaled_dot_product_attention(q_1KRE, k_1KTE, v_1KTE, attn_mask=seen, scale=1.0)
    return out.view(heads, rows, dim).transpose(0, 1)
