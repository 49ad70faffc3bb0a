"""The layer ops on a GPU, composed of the kernels of this folder and the bound primitive op `linear`.

Owns which kernels make an op; a whole layer also norms its residual in the pass that makes it, the last time for the layer after
it. Nothing here waits for the device, so a runner can capture a step in a graph: sizes come from the plan and from row counts,
slots from `attn_metadata.py`. Refuses arithmetic: each function equals its namesake in `reference.py` within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gemcutter.ops.step import NO_ADAPTERS, AdapterRows, KVCache, Step
from gemcutter.ops.triton import attention as attention_kernels
from gemcutter.ops.triton import elementwise, fused_norm, moe
from gemcutter.ops.triton import linear as linear_kernels
from gemcutter.ops.triton.attn_metadata import of_group
from gemcutter.ops.types import Attention, LayerOutput, OpContext, Param, closing_scale, matrix, vector
from gemcutter.plan import LayerPlan, ModelPlan, MoEPlan

Norms = tuple[Tensor, ...]  # the weights under which rows are normed, or these rows

# ---- queries, keys and values ----


def build_qkv(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build norm, one in-projection of what the layer owns, and one pass that norms, rotates and writes keys and values.

    In a layer that drops rows, queries are made of those that go on alone.
    """
    return _build_qkv(plan, layer, params, ctx, vector(params, "attn.q_norm"))


def _build_qkv(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext, q_norm_compact: Tensor
) -> Callable[..., Tensor]:
    """Build what `build_qkv` says, with another weight for queries where the layer is stored compactly.

    The function also takes the rows' norm, where the layer before has made it.
    """
    norm, q_norm_plain, eps = vector(params, "attn.norm"), vector(params, "attn.q_norm"), plan.eps
    k_norm = vector(params, "attn.k_norm") if layer.writes else None
    weight = matrix(params, "attn.in")
    query, keys = weight.part("q"), weight.part(*(name for name, _ in layer.attn_parts() if name != "q"))

    def qkv(x_ND: Tensor, step: Step, cache: KVCache, normed_ND: Tensor | None = None) -> Tensor:
        normed, rope = fused_norm.norm(x_ND, norm, eps) if normed_ND is None else normed_ND, step.rope[layer.rope]
        if k_norm is None:
            return fused_norm.finish_q(ctx.linear_lora(normed, weight, step.adapter_rows), layer, q_norm_plain, eps, *rope)
        slots, compact = of_group(step, layer.group).slot_mapping_N, cache.compact(layer.index)
        assert slots is not None
        q_norm = q_norm_plain if compact is None else q_norm_compact
        target = cache.storage(layer.index) if compact is None else (compact.rotary_TKR, compact.normed_TKE)
        if not layer.drops_rows or step.kept is None:
            raw = ctx.linear_lora(normed, weight, step.adapter_rows)
            return fused_norm.finish_qkv(raw, layer, q_norm, k_norm, eps, *rope, slots, *target)
        raw = ctx.linear_lora(normed, keys, step.adapter_rows)
        fused_norm.finish_kv(raw, layer, k_norm, eps, *rope, slots, *target)
        raw = ctx.linear_lora(normed[step.logit_rows_M], query, step.kept.adapter_rows)
        return fused_norm.finish_q(raw, layer, q_norm, eps, *step.kept.rope[layer.rope])

    return qkv


def build_attention(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Attention:
    """Build attention over the pages of the layer's `kv_layer`."""
    return attention_kernels.build_attention(layer)


def _build_pair(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext
) -> tuple[Callable[..., Tensor], Attention]:
    """Build qkv and attention as a pair: over a compact layer, queries get the weight that its keys were stored without."""
    q_norm, attention = vector(params, "attn.q_norm"), attention_kernels.build_attention(layer)
    if not layer.can_compact:
        return build_qkv(plan, layer, params, ctx), attention
    weight, pairs, half = vector(params, "attn.k_norm").clone(), layer.rope.pairs, layer.head_dim // 2
    weight[:pairs] = weight[half : half + pairs] = 1.0  # rotary columns are stored with it

    def k_eq_v_attention(q_MHE: Tensor, step: Step, cache: KVCache) -> Tensor:
        compact = cache.compact(layer.kv_layer)
        if compact is None:
            return attention(q_MHE, step, cache)
        metadata = of_group(step, layer.group)
        return attention_kernels.paged_attention(q_MHE, compact.rotary_TKR, compact.normed_TKE, metadata, layer.window)

    return _build_qkv(plan, layer, params, ctx, q_norm * weight), k_eq_v_attention


# ---- out-projection, MLP and per-layer-embedding gate ----


def build_attn_out(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the out-projection of the attention, its norm and the residual."""
    attn_out = _build_attn_out(plan, params, ctx)
    return lambda x_MD, o_MHE, adapters=NO_ADAPTERS: attn_out(x_MD, o_MHE, (), adapters)[0]


def _build_attn_out(
    plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext
) -> Callable[[Tensor, Tensor, Norms, AdapterRows], Norms]:
    """Build what `build_attn_out` says; it also returns the new residual's norms under some weights."""
    weight, post_norm = matrix(params, "attn.out"), vector(params, "attn.post_norm")

    def attn_out(x_MD: Tensor, o_MHE: Tensor, norms: Norms, adapters: AdapterRows) -> Norms:
        product = ctx.summed(ctx.linear_lora(o_MHE.flatten(1), weight, adapters))
        return fused_norm.add_multi_norm(x_MD, product, post_norm, plan.eps, 1.0, norms)

    return attn_out


def build_mlp(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the MLP: the dense branch, plus the experts where the plan has some; norms and residual."""
    norms, mlp = _build_mlp(plan, layer, params, ctx)
    if layer.moe is None:
        return lambda x_MD, adapters=NO_ADAPTERS: mlp(x_MD, (fused_norm.norm(x_MD, norms[0], plan.eps),), (), adapters)[0]
    return lambda x_MD, adapters=NO_ADAPTERS: mlp(x_MD, fused_norm.multi_norm(x_MD, norms, plan.eps), (), adapters)[0]


def _build_mlp(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext
) -> tuple[Norms, Callable[[Tensor, Norms, Norms, AdapterRows], Norms]]:
    """Build the MLP of rows that were normed before, and return the weights to norm them under.

    It returns the new residual, and its norms under some weights.
    """
    norm, post_norm, scale = vector(params, "mlp.norm"), vector(params, "mlp.post_norm"), closing_scale(layer, params, "mlp")
    w_in, w_out, plan_moe = matrix(params, "mlp.in"), matrix(params, "mlp.out"), layer.moe
    adapts = ctx.is_adapted and bool(w_in.deltas)

    def dense(normed_MD: Tensor, adapters: AdapterRows) -> Tensor:
        if adapts:
            hidden = elementwise.gelu_mul(ctx.linear_lora(normed_MD, w_in, adapters))
        else:
            hidden = linear_kernels.gated(normed_MD, w_in)
        return ctx.summed(ctx.linear_lora(hidden, w_out, adapters))

    def mlp(x_MD: Tensor, normed: Norms, norms: Norms, adapters: AdapterRows) -> Norms:
        (normed_MD,) = normed
        return fused_norm.add_multi_norm(x_MD, dense(normed_MD, adapters), post_norm, plan.eps, scale, norms)

    if plan_moe is None:
        return (norm,), mlp
    router, top_k, expert_scale = matrix(params, "moe.router"), plan_moe.top_k, vector(params, "moe.expert_scale")
    router_scale = vector(params, "moe.router_scale") * plan.hidden**-0.5
    experts_in, experts_out = matrix(params, "moe.in"), matrix(params, "moe.out")
    dense_norm, expert_norm = vector(params, "mlp.branch_norm"), vector(params, "moe.branch_norm")
    held = _held_experts(plan_moe)

    def moe_mlp(x_MD: Tensor, normed: Norms, norms: Norms, adapters: AdapterRows) -> Norms:
        for_dense, for_experts, for_router = normed
        weights, chosen = elementwise.route(ctx.linear_lora(for_router, router, adapters), top_k, expert_scale)
        found = ctx.summed(moe.experts(for_experts, weights, held(chosen), experts_in, experts_out))
        branches, weights_of = (dense(for_dense, adapters), found), (dense_norm, expert_norm, post_norm)
        return fused_norm.join_multi_norm(x_MD, *branches, *weights_of, plan.eps, scale, norms)

    return (norm, vector(params, "moe.norm"), router_scale), moe_mlp


def _held_experts(plan: MoEPlan) -> Callable[[Tensor], Tensor]:
    """Return what numbers chosen experts as they are held: a tensor-parallel rank's from its first one on, others -1."""
    first, count = plan.first, plan.num_held
    if count == plan.experts:
        return lambda chosen_MT: chosen_MT
    return lambda chosen_MT: torch.where((chosen_MT >= first) & (chosen_MT < first + count), chosen_MT - first, -1)


def build_ple_gate(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the per-layer-embedding gate, which closes a layer."""
    ple_gate = _build_ple_gate(plan, layer, params, ctx)
    return lambda x_MD, ple_MP, adapters=NO_ADAPTERS: ple_gate(x_MD, ple_MP, (), adapters)[0]


def _build_ple_gate(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext
) -> Callable[[Tensor, Tensor, Norms, AdapterRows], Norms]:
    """Build what `build_ple_gate` says; it also returns the new residual's norms under some weights."""
    gate, w_out, post_norm = matrix(params, "ple.gate"), matrix(params, "ple.out"), vector(params, "ple.post_norm")
    scale, adapts = closing_scale(layer, params, "ple_gate"), ctx.is_adapted and bool(gate.deltas)

    def ple_gate(x_MD: Tensor, ple_MP: Tensor, norms: Norms, adapters: AdapterRows) -> Norms:
        if adapts:
            gated = elementwise.gate_mul(ctx.linear_lora(x_MD, gate, adapters), ple_MP)
        else:
            gated = linear_kernels.gate_mul(x_MD, gate, ple_MP)
        product = ctx.linear_lora(gated, w_out, adapters)
        return fused_norm.add_multi_norm(x_MD, product, post_norm, plan.eps, scale, norms)

    return ple_gate


# ---- a whole layer ----


def build_layer(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext, next_norm: Tensor | None = None
) -> Callable[..., LayerOutput]:
    """Build all ops of a layer: [N, D] to [M, D], M the rows that go on, and their norm under `next_norm` if that is given."""
    qkv, attention = _build_pair(plan, layer, params, ctx)
    attn_out, (weights, mlp) = _build_attn_out(plan, params, ctx), _build_mlp(plan, layer, params, ctx)
    ple_gate = _build_ple_gate(plan, layer, params, ctx) if layer.ple_dim else None
    closing: Norms = () if next_norm is None else (next_norm,)

    def forward(x_ND: Tensor, step: Step, cache: KVCache, ple_MP: Tensor | None, normed_ND: Tensor | None = None) -> LayerOutput:
        q_MHE = qkv(x_ND, step, cache, normed_ND)
        if layer.drops_rows and step.kept is not None:
            x_ND, step = x_ND[step.logit_rows_M], step.kept
        adapters = step.adapter_rows
        x_MD, *normed = attn_out(x_ND, attention(q_MHE, step, cache), weights, adapters)
        x_MD, *normed = mlp(x_MD, tuple(normed), () if ple_gate else closing, adapters)
        if ple_gate is not None:
            assert ple_MP is not None
            x_MD, *normed = ple_gate(x_MD, ple_MP, closing, adapters)
        return x_MD, normed[0] if normed else None

    return forward
