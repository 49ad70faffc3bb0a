"""Fused attention on torch's own kernel.

Owns no mathematics: it equals `reference.build_attention` within rounding. Rows may depend on their neighbours in the last bits,
since the library chooses kernels by shape. Shape letters as in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.ops.step import KVCache, Step, visible_mask
from gemcutter.ops.types import Attention, OpContext, Param
from gemcutter.plan import LayerPlan, ModelPlan

MASK_ROWS = 128  # rows of one attention call: keys outside their common window are skipped whole
MASK_ELEMENTS = 1 << 23  # mask entries of one call; the library widens each to a float


def build_attention(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Attention:
    """Build fused attention: a call for a few rows of a sequence at a time, over the keys that they see and no others."""

    def attention(q_NHE: Tensor, step: Step, cache: KVCache) -> Tensor:
        out, last_N = torch.empty_like(q_NHE), step.last_visible.get(layer.group)
        for index, kv_range in enumerate(step.kv_ranges[layer.group]):
            first, last = step.query_start[index], step.query_start[index + 1]
            if first == last:
                continue
            keys, values = (x.to(q_NHE.dtype) for x in cache.read(layer.kv_layer, kv_range))  # the cache may be narrower
            newest = kv_range.start + keys.shape[0]
            tile = max(1, min(MASK_ROWS, MASK_ELEMENTS // (newest * layer.heads // layer.kv_heads)))
            for start in range(first, last, tile):
                rows = slice(start, min(start + tile, last))
                visible = None if last_N is None else last_N[rows]
                out[rows] = _attend(q_NHE[rows], step.positions_N[rows], visible, keys, values, kv_range.start, layer.window)
        return out

    return attention


def _attend(
    q_nHE: Tensor, positions_n: Tensor, last_n: Tensor | None, k_TKE: Tensor, v_TKE: Tensor, start: int, window: int | None
) -> Tensor:
    """Attend for some rows of one sequence, whose keys begin at position `start`.

    The G query heads of a key head are laid out as rows, so that keys are read once for all of them.
    """
    rows, heads, dim = q_nHE.shape
    key_heads = k_TKE.shape[1]
    first, last = int(positions_n[0]), int(positions_n[-1])
    newest = last if last_n is None else max(last, int(last_n.max()))
    oldest = start if window is None else max(start, first - window + 1)
    keys = slice(oldest - start, newest + 1 - start)
    q_1KRE = q_nHE.transpose(0, 1).reshape(1, key_heads, -1, dim)
    k_1KTE, v_1KTE = (x[keys].transpose(0, 1)[None] for x in (k_TKE, v_TKE))
    seen = None
    if rows > 1:  # a single row sees all keys of the slice
        positions_T = torch.arange(oldest, newest + 1, device=q_nHE.device)
        seen = visible_mask(positions_n, positions_T, window, last_n).repeat(heads // key_heads, 1)
    out = F.scaled_dot_product_attention(q_1KRE, k_1KTE, v_1KTE, attn_mask=seen, scale=1.0)
    return out.view(heads, rows, dim).transpose(0, 1)
