"""The model ops on a GPU: embeddings before the first layer, norm and LM head after the last.

Owns which kernels make an op; refuses arithmetic, as `layer_ops.py` does. Each function equals its namesake in `reference.py`
within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from gemcutter.ops.step import NO_ADAPTERS, AdapterRows
from gemcutter.ops.triton import elementwise, fused_norm
from gemcutter.ops.triton import linear as linear_kernels
from gemcutter.ops.triton.attn_metadata import is_near
from gemcutter.ops.types import OpContext, Param, matrix, rounded_root, vector
from gemcutter.plan import ModelPlan
from gemcutter.quant.gpu_packing import GpuPackedWeight


def build_embed(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the token embedding."""
    weight, scale, dtype = matrix(params, "embed.tokens"), rounded_root(plan.hidden, ctx), ctx.precision.rows
    (table,) = weight.parts
    if isinstance(table, Tensor):
        return lambda ids_N: elementwise.embed_rows(table, ids_N, scale, dtype)
    if isinstance(table, GpuPackedWeight):
        return lambda ids_N: linear_kernels.gather_rows(table, ids_N, dtype, scale)
    return lambda ids_N: weight.gather(ids_N, dtype) * scale


def build_ple_embed(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the per-layer embeddings of a range of layers; of a table that the device can't read, the host gathers the rows."""
    table, projection, norm = matrix(params, "embed.ple"), matrix(params, "ple.in"), vector(params, "ple.norm")
    token_scale, context_scale, dim = rounded_root(plan.ple_dim, ctx), plan.hidden**-0.5, plan.ple_dim
    near, dtype, held = is_near(table, norm.device), ctx.precision.rows, plan.ple_rows

    def ple_embed(x_ND: Tensor, ple_ids_N: Tensor, first: int, last: int, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        context = ctx.linear_lora(x_ND, projection.slice(first * dim, last * dim), adapters)
        span = table.span(first * dim, last * dim)
        (part,) = span.parts
        if near and isinstance(part, Tensor) and held.is_whole:
            return elementwise.ple_rows(context, part, ple_ids_N, norm, plan.eps, token_scale, context_scale)

        def gather(ids_N: Tensor) -> Tensor:
            if near and isinstance(part, GpuPackedWeight):
                return linear_kernels.gather_rows(part, ids_N, dtype)
            return span.gather(ids_N, dtype)

        tokens = ctx.table_gatherer(gather, held)(ple_ids_N)
        return elementwise.ple_rows(context, tokens, None, norm, plan.eps, token_scale, context_scale)

    return ple_embed


def build_final_norm(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the norm after the last layer."""
    norm = vector(params, "norm")
    return lambda x_MD: fused_norm.norm(x_MD, norm, plan.eps)


def build_lm_head(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the LM head: normed rows [R, D] to soft-capped logits [R, V] in float32."""
    weight = matrix(params, "embed.tokens" if plan.tied_head else "head")
    return lambda h_RD: linear_kernels.logits_of(h_RD, weight, plan.softcap)
