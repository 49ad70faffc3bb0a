"""The sentences on a GPU, written in the kernels of the `triton_*` files and the bound word `linear`.

Owns which kernels make a sentence; a whole layer also norms its residual in the pass that makes it, the last time for the layer
after it. Nothing here waits for the device, so a runner can capture a step in a graph: sizes come from the plan and from row
counts, slots from `cuda_step.py`. Refuses arithmetic: each function equals its namesake in `reference.py` within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from gemcutter.ops import NEXT_NORM, triton_attention, triton_experts, triton_fused, triton_gates, triton_linear
from gemcutter.ops.cuda_step import is_near, paged
from gemcutter.ops.reference import Attention, Param, Words, closing_scale, matrix, rounded_root, vector
from gemcutter.ops.step import Pool, Step
from gemcutter.plan import LayerPlan, ModelPlan
from gemcutter.quant.gpu_packing import GpuPackedWeight

Fan = tuple[Tensor, ...]  # the weights under which rows are normed, or these rows
NORMED = "normed"  # where a step's memo has the residual that a layer gave, and its norm under the next layer's weight

# ---- the lines of a layer ----


def build_project(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Callable[..., Tensor]:
    """Build norm, one in-projection of what the layer owns, and one pass that norms, rotates and writes keys and values.

    In the last writer, queries are made of the kept rows alone.
    """
    return _build_project(plan, layer, params, words, vector(params, "attn.q_norm"))


def _build_project(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words, q_norm_compact: Tensor
) -> Callable[..., Tensor]:
    """Build what `build_project` says, with another weight for queries where the layer is stored compactly."""
    norm, q_norm_plain, eps = vector(params, "attn.norm"), vector(params, "attn.q_norm"), plan.eps
    k_norm = vector(params, "attn.k_norm") if layer.writes else None
    weight = matrix(params, "attn.in")
    query, keys = weight.part("q"), weight.part(*(name for name, _ in layer.attn_parts() if name != "q"))
    is_last_writer = layer.index == plan.first_reader - 1

    def project(x_ND: Tensor, step: Step, pool: Pool) -> Tensor:
        normed, rope = _normed(x_ND, step, norm, eps), step.rope[layer.rope]
        if k_norm is None:
            return triton_fused.finish_q(words.linear(normed, weight), layer, q_norm_plain, eps, *rope)
        slots, compact = paged(step, layer.window).slots_N, pool.compact(layer.index)
        assert slots is not None
        q_norm = q_norm_plain if compact is None else q_norm_compact
        target = pool.storage(layer.index) if compact is None else (compact.turned_TKR, compact.normed_TKE)
        if not is_last_writer or step.keep is None:
            raw = words.linear(normed, weight)
            return triton_fused.finish_qkv(raw, layer, q_norm, k_norm, eps, *rope, slots, *target)
        triton_fused.finish_kv(words.linear(normed, keys), layer, k_norm, eps, *rope, slots, *target)
        raw, rope = words.linear(normed[step.keep_M], query), step.kept().rope[layer.rope]
        return triton_fused.finish_q(raw, layer, q_norm, eps, *rope)

    return project


def _normed(x_ND: Tensor, step: Step, norm_D: Tensor, eps: float) -> Tensor:
    """Give the rows' norm as the layer before has left it, or make it."""
    residual, normed = step.memo.pop(NORMED, (None, None))
    return normed if residual is x_ND else triton_fused.norm(x_ND, norm_D, eps)


def build_attend(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Attention:
    """Build attention over the pages of the layer's `kv_layer`."""
    return triton_attention.build_attention(layer)


def build_mix(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the out-projection of the attention, its norm and the residual."""
    mix = _build_mix(plan, params, words)
    return lambda x_MD, o_MHE: mix(x_MD, o_MHE, ())[0]


def _build_mix(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor, Tensor, Fan], Fan]:
    """Build what `build_mix` says; it also gives the norms of the new residual under a fan of weights."""
    weight, post_norm = matrix(params, "attn.out"), vector(params, "attn.post_norm")

    def mix(x_MD: Tensor, o_MHE: Tensor, fan: Fan) -> Fan:
        return triton_fused.add_norm_fan(x_MD, words.linear(o_MHE.flatten(1), weight), post_norm, plan.eps, 1.0, fan)

    return mix


def build_feed(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor], Tensor]:
    """Build the feed-forward: the dense branch, plus the experts where the plan has some; norms and residual."""
    fan, feed = _build_feed(plan, layer, params, words)
    if layer.moe is None:
        return lambda x_MD: feed(x_MD, (triton_fused.norm(x_MD, fan[0], plan.eps),), ())[0]
    return lambda x_MD: feed(x_MD, triton_fused.norm_fan(x_MD, fan, plan.eps), ())[0]


def _build_feed(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words
) -> tuple[Fan, Callable[[Tensor, Fan, Fan], Fan]]:
    """Build the feed-forward of rows that were normed before, and give the weights to norm them under.

    It gives the new residual, and its norms under a fan of weights.
    """
    norm, post_norm, scale = vector(params, "mlp.norm"), vector(params, "mlp.post_norm"), closing_scale(layer, params, "feed")
    w_in, w_out, moe = matrix(params, "mlp.in"), matrix(params, "mlp.out"), layer.moe

    adapts = words.adapts and bool(w_in.deltas)

    def dense(normed_MD: Tensor) -> Tensor:
        hidden = triton_gates.gelu_mul(words.linear(normed_MD, w_in)) if adapts else triton_linear.gated(normed_MD, w_in)
        return words.linear(hidden, w_out)

    def feed(x_MD: Tensor, normed: Fan, fan: Fan) -> Fan:
        return triton_fused.add_norm_fan(x_MD, dense(*normed), post_norm, plan.eps, scale, fan)

    if moe is None:
        return (norm,), feed
    router, top_k, expert_scale = matrix(params, "moe.router"), moe.top_k, vector(params, "moe.expert_scale")
    router_scale = vector(params, "moe.router_scale") * plan.hidden**-0.5
    experts_in, experts_out = matrix(params, "moe.in"), matrix(params, "moe.out")
    dense_norm, expert_norm = vector(params, "mlp.branch_norm"), vector(params, "moe.branch_norm")

    def feed_both(x_MD: Tensor, normed: Fan, fan: Fan) -> Fan:
        for_dense, for_experts, for_router = normed
        weights, chosen = triton_gates.route(words.linear(for_router, router), top_k, expert_scale)
        found = triton_experts.experts(for_experts, weights, chosen, experts_in, experts_out)
        branches, norms = (dense(for_dense), found), (dense_norm, expert_norm, post_norm)
        return triton_fused.join_norm_fan(x_MD, *branches, *norms, plan.eps, scale, fan)

    return (norm, vector(params, "moe.norm"), router_scale), feed_both


def build_inject(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words
) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the per-layer-embedding gate, which closes a layer."""
    inject = _build_inject(plan, layer, params, words)
    return lambda x_MD, ple_MP: inject(x_MD, ple_MP, ())[0]


def _build_inject(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words
) -> Callable[[Tensor, Tensor, Fan], Fan]:
    """Build what `build_inject` says; it also gives the norms of the new residual under a fan of weights."""
    gate, w_out, post_norm = matrix(params, "ple.gate"), matrix(params, "ple.out"), vector(params, "ple.post_norm")
    scale, adapts = closing_scale(layer, params, "inject"), words.adapts and bool(gate.deltas)

    def inject(x_MD: Tensor, ple_MP: Tensor, fan: Fan) -> Fan:
        gated = triton_gates.gate_mul(words.linear(x_MD, gate), ple_MP) if adapts else triton_linear.gate_mul(x_MD, gate, ple_MP)
        return triton_fused.add_norm_fan(x_MD, words.linear(gated, w_out), post_norm, plan.eps, scale, fan)

    return inject


def build_layer(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Callable[..., Tensor]:
    """Build all lines of a layer: [N, D] to [M, D], M the kept rows in the last writer."""
    project, attend = _build_attention(plan, layer, params, words)
    mix, (weights, feed) = _build_mix(plan, params, words), _build_feed(plan, layer, params, words)
    inject = _build_inject(plan, layer, params, words) if layer.ple_dim else None
    closing: Fan = (vector(params, NEXT_NORM),) if NEXT_NORM in params else ()
    is_last_writer = layer.index == plan.first_reader - 1

    def forward(x_ND: Tensor, step: Step, pool: Pool, ple_MP: Tensor | None) -> Tensor:
        q_MHE = project(x_ND, step, pool)
        if is_last_writer and step.keep is not None:
            x_ND, step = x_ND[step.keep_M], step.kept()
        x_MD, *normed = mix(x_ND, attend(q_MHE, step, pool), weights)
        x_MD, *normed = feed(x_MD, tuple(normed), () if inject else closing)
        if inject is not None:
            assert ple_MP is not None
            x_MD, *normed = inject(x_MD, ple_MP, closing)
        if closing:
            step.memo[NORMED] = (x_MD, *normed)
        return x_MD

    return forward


def _build_attention(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words
) -> tuple[Callable[..., Tensor], Attention]:
    """Build project and attend as a pair: over a compact layer, queries get the weight that its keys were stored without."""
    q_norm, attention = vector(params, "attn.q_norm"), triton_attention.build_attention(layer)
    if not layer.can_compact:
        return build_project(plan, layer, params, words), attention
    weight, pairs, half = vector(params, "attn.k_norm").clone(), layer.rope.pairs, layer.head_dim // 2
    weight[:pairs] = weight[half : half + pairs] = 1.0  # columns that turn are stored with it

    def attend(q_MHE: Tensor, step: Step, pool: Pool) -> Tensor:
        compact = pool.compact(layer.kv_layer)
        if compact is None:
            return attention(q_MHE, step, pool)
        here = paged(step, layer.window)
        return triton_attention.attend(q_MHE, compact.turned_TKR, compact.normed_TKE, here, layer.window)

    return _build_project(plan, layer, params, words, q_norm * weight), attend


# ---- the model's ends ----


def build_embed(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor], Tensor]:
    """Build the token embedding."""
    weight, scale, dtype = matrix(params, "embed.tokens"), rounded_root(plan.hidden, words), words.numerics.rows
    (table,) = weight.parts
    if isinstance(table, Tensor):
        return lambda ids_N: triton_gates.embed_rows(table, ids_N, scale, dtype)
    if isinstance(table, GpuPackedWeight):
        return lambda ids_N: triton_linear.gather_rows(table, ids_N, dtype, scale)
    return lambda ids_N: weight.gather(ids_N, dtype) * scale


def build_ple(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[..., Tensor]:
    """Build the per-layer embeddings of a span of layers; of a table that the device can't read, the host gathers the rows."""
    table, project, norm = matrix(params, "embed.ple"), matrix(params, "ple.in"), vector(params, "ple.norm")
    token_scale, context_scale, dim = rounded_root(plan.ple_dim, words), plan.hidden**-0.5, plan.ple_dim
    near = is_near(table, norm.device)

    def ple(x_ND: Tensor, ple_ids_N: Tensor, first: int, last: int) -> Tensor:
        context, span = words.linear(x_ND, project.slice(first * dim, last * dim)), table.span(first * dim, last * dim)
        (part,) = span.parts
        if near and isinstance(part, Tensor):
            return triton_gates.ple_rows(context, part, ple_ids_N, norm, plan.eps, token_scale, context_scale)
        if near and isinstance(part, GpuPackedWeight):
            tokens = triton_linear.gather_rows(part, ple_ids_N, words.numerics.rows)
        else:
            tokens = span.gather(ple_ids_N, words.numerics.rows)
        return triton_gates.ple_rows(context, tokens, None, norm, plan.eps, token_scale, context_scale)

    return ple


def build_norm(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor], Tensor]:
    """Build the norm after the last layer."""
    norm = vector(params, "norm")
    return lambda x_MD: triton_fused.norm(x_MD, norm, plan.eps)


def build_head(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor], Tensor]:
    """Build the head: normed rows [R, D] to soft-capped logits [R, V] in float32."""
    weight = matrix(params, "embed.tokens" if plan.tied_head else "head")
    return lambda h_RD: triton_linear.logits_of(h_RD, weight, plan.softcap)
