"""Matrix products on torch's own kernels: the library's for the stored dtype, or in float32 a converted chunk at a time.

Owns no mathematics: each function equals `reference.linear` within rounding. Rows may depend on their neighbours in the last
bits, since libraries choose kernels by shape. Read `gemcutter/ops/backend.py` for when these are selected.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.ops.reference import WEIGHT_TILE
from gemcutter.quant import Weight


def linear_dense(x_ND: Tensor, weight: Weight) -> Tensor:
    """Multiply with the library's kernel for the stored dtype, one call a part."""
    products = [_product(x_ND, part) for part in weight.parts if isinstance(part, Tensor)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _product(x_ND: Tensor, part: Tensor) -> Tensor:
    if x_ND.dtype == part.dtype:
        return F.linear(x_ND, part)
    wide = torch.promote_types(x_ND.dtype, part.dtype)  # the router alone, whose rows are float32
    return F.linear(x_ND.to(wide), part.to(wide)).to(x_ND.dtype)


def linear_chunked(x_ND: Tensor, weight: Weight) -> Tensor:
    """Multiply in float32, one converted chunk of the weight at a time.

    Where the processor has no bfloat16 products, the library's bfloat16 kernel is several times slower than converting a chunk
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
