"""Every op in plain PyTorch: the specification, and the fallback.

Each row's result depends on that row and its own sequence alone, bit for bit: matrix products run over tiles of a fixed number
of rows and attention over blocks of keys aligned to absolute positions, so that neighbours, chunk sizes and batch order change
nothing. Shape letters: N rows, M kept rows, D hidden, H heads, K key heads, G heads per key head, E head dim, F mlp width, V
vocabulary, X experts, L layers, P per-layer-embedding dim, T keys. Refuses to know devices and speed; read `torch_fast.py` for
that.

Source: the oracle is transformers' gemma4 in float32. Deviates in bfloat16: scores, router and expert sums stay in float32
(docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.ops.step import NO_ADAPTERS, AdapterRows, KVCache, KVRange, Step, visible_mask
from gemcutter.ops.types import Attention, AudioScales, OpContext, Param, closing_scale, matrix, rounded_root, vector
from gemcutter.plan import LayerPlan, ModelPlan
from gemcutter.quant import Weight, dequantize
from gemcutter.tower_plan import AudioPlan, VisionPlan

ROW_TILE = 16  # rows of one matrix product; fixed, so that a row never meets another kernel
KEY_BLOCK = 256  # keys of one softmax update, aligned to absolute positions
ELEMENT_TILE = 1 << 14  # elements of one elementwise call: too few for the library to cut between threads
VECTOR = 64  # elements that fill two vector registers of any processor and dtype here
WEIGHT_TILE = 1 << 20  # elements of a weight that are converted at a time: the model is never held twice


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a transcendental function so that equal elements give equal results wherever they stand.

    The library evaluates most elements in vector registers and those left over, at the end of every thread's share, by another
    code path whose last bits differ. Padded tiles below the share of a thread leave none over. Only processors have two paths.
    """
    if x.device.type != "cpu" or (x.numel() <= ELEMENT_TILE and x.numel() % VECTOR == 0):
        return function(x.contiguous())
    flat = x.reshape(-1)
    padded = F.pad(flat, (0, -len(flat) % VECTOR))
    return torch.cat([function(tile) for tile in torch.split(padded, ELEMENT_TILE)])[: len(flat)].view(x.shape)


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Divide by the root mean square over the last axis and multiply by the weight itself (not 1 + weight), in float32."""
    wide = x.float()
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    return (normed if weight_D is None else normed * weight_D).to(x.dtype)


def rope(x_NHE: Tensor, cos_N1C: Tensor, sin_N1C: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) in x's own dtype; pairs that stay have cos 1 and sin 0."""
    low, high = x_NHE.chunk(2, dim=-1)
    return torch.cat((low * cos_N1C - high * sin_N1C, high * cos_N1C + low * sin_N1C), dim=-1)


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply the tanh-GELU of the gate with the up projection."""
    return elementwise(lambda x: F.gelu(x, approximate="tanh"), gate) * up


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Softcap logits smoothly into (-cap, cap)."""
    return logits if cap is None else elementwise(torch.tanh, logits / cap) * cap


def linear(x_ND: Tensor, weight: Weight) -> Tensor:
    """Multiply rows with a matrix [F, D]: products and sums in float32, one rounding to x's dtype; [N, F]."""
    rows, columns = x_ND.shape
    padded = F.pad(x_ND.float(), (0, 0, 0, -rows % ROW_TILE)).view(-1, ROW_TILE, columns)
    out = x_ND.new_empty(rows, weight.rows)
    offset = 0
    for tile in weight.row_chunks(WEIGHT_TILE):
        wide = dequantize(tile).t()
        for index, block in enumerate(padded):
            start = index * ROW_TILE
            out[start : start + ROW_TILE, offset : offset + wide.shape[1]] = (block @ wide)[: rows - start]
        offset += wide.shape[1]
    return out


def build_attention(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Attention:
    """Build attention of a layer's queries over what its `kv_layer` wrote: scale 1, softmax in float32, no score cap.

    [M, H, E] to [M, H, E].
    """

    def attention(q_NHE: Tensor, step: Step, cache: KVCache) -> Tensor:
        out, last_N = torch.empty_like(q_NHE), step.last_visible.get(layer.group)
        for index, kv_range in enumerate(step.kv_ranges[layer.group]):
            low, high = step.query_start[index], step.query_start[index + 1]
            if low == high:
                continue
            k_TKE, v_TKE = cache.read(layer.kv_layer, kv_range)
            for start in range(low, high, ROW_TILE):
                rows = slice(start, min(start + ROW_TILE, high))
                positions, last = step.positions_N[rows], None if last_N is None else last_N[rows]
                out[rows] = _attend_tile(q_NHE[rows], positions, last, k_TKE, v_TKE, kv_range, layer.window)
        return out

    return attention


def _attend_tile(
    q_nHE: Tensor,
    positions_n: Tensor,
    last_n: Tensor | None,
    k_TKE: Tensor,
    v_TKE: Tensor,
    kv_range: KVRange,
    window: int | None,
) -> Tensor:
    """Attend for up to ROW_TILE rows of one sequence, one aligned block of keys after the other."""
    rows, heads, dim = q_nHE.shape
    key_heads = k_TKE.shape[1]
    group = heads // key_heads
    pad = ROW_TILE - rows
    q_KRE = (
        F.pad(q_nHE.float(), (0, 0, 0, 0, 0, pad))
        .view(ROW_TILE, key_heads, group, dim)
        .permute(1, 0, 2, 3)
        .reshape(key_heads, -1, dim)
    )
    newest = int(positions_n[-1]) if last_n is None else max(int(positions_n[-1]), int(last_n.max()))
    positions = F.pad(positions_n, (0, pad), value=-1)  # padding rows see nothing
    last = None if last_n is None else F.pad(last_n, (0, pad), value=-1)
    top = q_KRE.new_full((key_heads, ROW_TILE, group, 1), -torch.inf)
    total = torch.zeros_like(top)
    out = q_KRE.new_zeros(key_heads, ROW_TILE, group, dim)
    oldest = 0 if window is None else max(0, int(positions_n[0]) - window + 1)
    for block in range(oldest // KEY_BLOCK * KEY_BLOCK, newest + 1, KEY_BLOCK):
        k_KBE, v_KBE = (_key_block(x, kv_range.start, block) for x in (k_TKE, v_TKE))
        seen = visible_mask(positions, torch.arange(block, block + KEY_BLOCK, device=q_KRE.device), window, last)
        scores = (q_KRE @ k_KBE.transpose(1, 2)).view(key_heads, ROW_TILE, group, KEY_BLOCK)
        scores = torch.where(seen[None, :, None, :], scores, -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        anchor = torch.where(new_top == -torch.inf, 0.0, new_top)  # a row that has seen nothing yet stays at zero, not NaN
        weights = elementwise(torch.exp, scores - anchor)
        shrink = elementwise(torch.exp, top - anchor)
        total = total * shrink + weights.sum(-1, keepdim=True)
        mixed = weights.view(key_heads, -1, KEY_BLOCK) @ v_KBE
        out = out * shrink + mixed.view_as(out)
        top = new_top
    out = out / torch.where(total == 0, 1.0, total)
    return out.permute(1, 0, 2, 3).reshape(ROW_TILE, heads, dim)[:rows].to(q_nHE.dtype)


def _key_block(x_TKE: Tensor, first: int, block: int) -> Tensor:
    """Return positions block to block + KEY_BLOCK - 1 as [K, B, E] in float32, zeros where the range has none."""
    low, high = max(block - first, 0), min(block + KEY_BLOCK - first, x_TKE.shape[0])
    before = max(first - block, 0)
    found = x_TKE[low:high].float()
    return F.pad(found, (0, 0, 0, 0, before, KEY_BLOCK - before - found.shape[0])).transpose(0, 1)


def build_embed(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the token embedding: rows times sqrt(D), the root rounded to the compute dtype first."""
    table, scale, dtype = matrix(params, "embed.tokens"), rounded_root(plan.hidden, ctx), ctx.precision.rows

    def embed(ids_N: Tensor) -> Tensor:
        return table.gather(ids_N, dtype) * scale

    return embed


def build_ple_embed(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the per-layer embeddings of a range of layers: (token row + normed projection of the embedding) / sqrt(2)."""
    table, projection, norm = matrix(params, "embed.ple"), matrix(params, "ple.in"), vector(params, "ple.norm")
    token_scale, dim, dtype = rounded_root(plan.ple_dim, ctx), plan.ple_dim, ctx.precision.rows

    def ple_embed(x_ND: Tensor, ple_ids_N: Tensor, first: int, last: int, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        span = table.span(first * dim, last * dim)
        tokens = ctx.table_gatherer(lambda ids_N: span.gather(ids_N, dtype), plan.ple_rows)(ple_ids_N) * token_scale
        context = ctx.linear_lora(x_ND, projection.slice(first * dim, last * dim), adapters) * plan.hidden**-0.5
        context = rms_norm(context.view(-1, last - first, dim), norm, plan.eps)
        return (context + tokens.view_as(context)) * 2**-0.5

    return ple_embed


def build_qkv(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build norm, in-projection, q/k/v norms and RoPE: writes k and v of all rows iff the plan says so, returns q [M, H, E].

    In a layer that drops rows, those whose states nobody wants stop here: their keys and values are made, their queries are not.
    """
    norm, q_norm = vector(params, "attn.norm"), vector(params, "attn.q_norm")
    k_norm = vector(params, "attn.k_norm") if layer.writes else None
    weight = matrix(params, "attn.in")
    query, keys = weight.part("q"), weight.part(*(name for name, _ in layer.attn_parts() if name != "q"))
    kv_width = layer.kv_heads * layer.head_dim

    def write(kv_NX: Tensor, step: Step, cache: KVCache) -> None:
        k_raw = kv_NX[:, :kv_width].reshape(-1, layer.kv_heads, layer.head_dim)
        v_raw = kv_NX[:, kv_width:].reshape_as(k_raw) if kv_NX.shape[1] > kv_width else k_raw  # QK_ONLY: the raw key projection
        k = rope(rms_norm(k_raw, k_norm, plan.eps), *step.rope[layer.rope])
        v = rms_norm(v_raw, None, plan.eps) if layer.has_v_norm else v_raw
        cache.write(layer.index, step.slot_mapping[layer.group], k, v)

    def qkv(x_ND: Tensor, step: Step, cache: KVCache) -> Tensor:
        normed = rms_norm(x_ND, norm, plan.eps)
        if layer.writes:
            write(ctx.linear_lora(normed, keys, step.adapter_rows), step, cache)
        if layer.drops_rows and step.kept is not None:
            normed, step = normed[step.logit_rows_M], step.kept
        q = ctx.linear_lora(normed, query, step.adapter_rows).view(-1, layer.heads, layer.head_dim)
        return rope(rms_norm(q, q_norm, plan.eps), *step.rope[layer.rope])

    return qkv


def build_attn_out(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the out-projection of the attention, its norm and the residual."""
    weight, post_norm = matrix(params, "attn.out"), vector(params, "attn.post_norm")

    def attn_out(x_MD: Tensor, o_MHE: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        return x_MD + rms_norm(ctx.summed(ctx.linear_lora(o_MHE.flatten(1), weight, adapters)), post_norm, plan.eps)

    return attn_out


def build_mlp(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the MLP: the dense branch, plus the experts where the plan has some; norms and residual.

    It closes a layer without per-layer embeddings, and multiplies with the layer's scalar then.
    """
    norm, post_norm, scale = vector(params, "mlp.norm"), vector(params, "mlp.post_norm"), closing_scale(layer, params, "mlp")
    w_in, w_out = matrix(params, "mlp.in"), matrix(params, "mlp.out")

    def dense(x_MD: Tensor, adapters: AdapterRows) -> Tensor:
        gate, up = ctx.linear_lora(rms_norm(x_MD, norm, plan.eps), w_in, adapters).chunk(2, dim=1)
        return ctx.summed(ctx.linear_lora(gelu_mul(gate, up), w_out, adapters))

    def mlp(x_MD: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        return (x_MD + rms_norm(dense(x_MD, adapters), post_norm, plan.eps)) * scale

    if layer.moe is None:
        return mlp
    experts = _build_experts(plan, layer, params, ctx)
    dense_norm, expert_norm = vector(params, "mlp.branch_norm"), vector(params, "moe.branch_norm")

    def moe_mlp(x_MD: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        both = rms_norm(dense(x_MD, adapters), dense_norm, plan.eps)
        both = both + rms_norm(experts(x_MD, adapters), expert_norm, plan.eps)
        return (x_MD + rms_norm(both, post_norm, plan.eps)) * scale

    return moe_mlp


def _build_experts(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext
) -> Callable[[Tensor, AdapterRows], Tensor]:
    """Build router and experts. Both read the residual stream; the router in float32, so that its choice is stable."""
    moe = layer.moe
    assert moe is not None
    norm, router = vector(params, "moe.norm"), matrix(params, "moe.router")
    scale, expert_scale = vector(params, "moe.router_scale") * plan.hidden**-0.5, vector(params, "moe.expert_scale")
    w_in, w_out = matrix(params, "moe.in"), matrix(params, "moe.out")
    held = range(moe.first, moe.first + moe.num_held)

    def experts(x_MD: Tensor, adapters: AdapterRows) -> Tensor:
        chance_MX = ctx.linear_lora(rms_norm(x_MD.float(), None, plan.eps) * scale, router, adapters).softmax(-1)
        weights, chosen = chance_MX.topk(moe.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True) * expert_scale[chosen]
        normed = rms_norm(x_MD, norm, plan.eps)
        out = torch.zeros(x_MD.shape, dtype=torch.float32, device=x_MD.device)
        for index in sorted(set(chosen.flatten().tolist())):  # ascending: a row sums its experts in one order in any batch
            if index not in held:
                continue
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            gate, up = ctx.linear(normed[rows], w_in.expert(index - moe.first)).chunk(2, dim=1)
            found = ctx.linear(gelu_mul(gate, up), w_out.expert(index - moe.first))
            out[rows] += found.float() * weights[rows, slots, None]
        return ctx.summed(out).to(x_MD.dtype)

    return experts


def build_ple_gate(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the per-layer-embedding gate, which closes a layer: the residual opens P gates, the gated row goes back, normed."""
    gate, w_out, post_norm = matrix(params, "ple.gate"), matrix(params, "ple.out"), vector(params, "ple.post_norm")
    scale = closing_scale(layer, params, "ple_gate")

    def ple_gate(x_MD: Tensor, ple_MP: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        gated = gelu_mul(ctx.linear_lora(x_MD, gate, adapters), ple_MP)
        return (x_MD + rms_norm(ctx.linear_lora(gated, w_out, adapters), post_norm, plan.eps)) * scale

    return ple_gate


def build_layer(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext, next_norm: Tensor | None = None
) -> None:
    """Return nothing: a layer is computed op by op, as `model/text.py` spells it."""


def build_draft(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext, embed: Weight, scale: float) -> None:
    """Return nothing: a drafter is computed op by op, as `model/drafter.py` spells it."""


def build_vision_layer(plan: VisionPlan, params: Mapping[str, Param], activations: str) -> None:
    """Return nothing: a layer of a vision tower is computed op by op, as `model/vision.py` spells it."""


def build_audio_layer(plan: AudioPlan, params: Mapping[str, Param], activations: str, scales: AudioScales) -> None:
    """Return nothing: a layer of an audio tower is computed op by op, as `model/audio.py` spells it."""


def build_final_norm(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the norm after the last layer."""
    norm = vector(params, "norm")
    return lambda x_MD: rms_norm(x_MD, norm, plan.eps)


def build_lm_head(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the LM head: normed rows [R, D] to soft-capped logits [R, V] in float32."""
    weight = matrix(params, "embed.tokens" if plan.tied_head else "head")

    def lm_head(h_RD: Tensor) -> Tensor:
        return softcap(ctx.linear(h_RD, weight).float(), plan.softcap)

    return lm_head
