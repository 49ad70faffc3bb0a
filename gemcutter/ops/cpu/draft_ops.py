"""A drafter on the native CPU kernels: all drafts of a burst in one call of the library.

Owns an assistant as one `gc_drafter` that is filled once; refuses arithmetic, as `layer_ops.py` does. Read `csrc/cpu/draft.cpp`
for the other side, `model/drafter.py` for the definition.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_void_p

import torch
from torch import Tensor

from gemcutter.native import DrafterView, Matrix
from gemcutter.ops import LAYER_OPS
from gemcutter.ops.cpu.attn_metadata import of_group
from gemcutter.ops.cpu.bindings import ACTIVATIONS, bind_kv, entry, rows_of, whole_matrix
from gemcutter.ops.cpu.layer_ops import BoundLayer
from gemcutter.ops.step import KVCache, Step
from gemcutter.ops.types import Draft, Drafts, OpContext, Param, matrix, vector
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight
from gemcutter.quant.cpu_layout import PANEL


def build_draft(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext, embed: Weight, scale: float) -> Draft | None:
    """Build bursts of drafts. `embed` is the target's token table, `scale` what it multiplies rows with.

    Returns None where the rows under a centroid are no whole panels.
    """
    if plan.centroids and plan.vocab % (plan.centroids * PANEL):
        return None
    ops = [op for op in LAYER_OPS if op != "ple_gate"]
    layers = [BoundLayer(plan, layer, _of_layer(params, layer.index), ctx, ops) for layer in plan.layers]
    bindings, call = [bind_kv(layer.kv_layer, ctx) for layer in plan.layers], entry("gc_draft")
    norm, addresses = rows_of(vector(params, "norm")), _pointers([layer.address for layer in layers])
    order = vector(params, "draft.order").contiguous() if plan.centroids else None
    assert plan.backbone is not None
    view = DrafterView(
        embed=whole_matrix(embed),
        into=whole_matrix(matrix(params, "draft.in")),
        out=whole_matrix(matrix(params, "draft.out")),
        centroids=whole_matrix(matrix(params, "draft.centroids")) if plan.centroids else Matrix(),
        head=whole_matrix(matrix(params, "embed.tokens" if plan.tied_head else "head")),
        layers=ctypes.addressof(addresses),
        norm=norm.data_ptr(),
        order=None if order is None else order.data_ptr(),
        num_layers=len(layers),
        hidden=plan.hidden,
        target_hidden=plan.backbone,
        top_k=plan.centroid_top_k,
        embed_scale=scale,
        eps=plan.eps,
        softcap=plan.softcap or 0.0,
        activations=ACTIVATIONS[ctx.precision.activations],
    )
    alive = (layers, addresses, norm, order, embed)
    choices = plan.vocab // plan.centroids * plan.centroid_top_k if plan.centroids else plan.vocab

    def draft(ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache, count: int, wants_logits: bool) -> Drafts:
        assert alive
        views = [binding.view(cache) for binding in bindings]
        steps = _pointers([of_group(step, layer.group, layer.rope) for layer in plan.layers])
        kv = _pointers([ctypes.addressof(each) for each in views])
        sequences = len(ids_S)
        tokens_KS, chances_KS = torch.empty(count, sequences, dtype=torch.long), torch.empty(count, sequences)
        after_ST = states_ST.to(torch.float32, copy=True).contiguous()
        logits_SC = torch.empty(sequences, choices) if wants_logits else None
        ids_SC = torch.empty(sequences, choices, dtype=torch.long) if wants_logits and plan.centroids else None
        call(
            ctypes.addressof(view),
            ctypes.addressof(steps),
            ctypes.addressof(kv),
            sequences,
            count,
            ids_S.data_ptr(),
            after_ST.data_ptr(),
            tokens_KS.data_ptr(),
            chances_KS.data_ptr(),
            None if logits_SC is None else logits_SC.data_ptr(),
            None if ids_SC is None else ids_SC.data_ptr(),
        )
        return Drafts(tokens_KS, chances_KS, after_ST, logits_SC, ids_SC)

    return draft


def _of_layer(params: Mapping[str, Param], index: int) -> dict[str, Param]:
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): param for name, param in params.items() if name.startswith(prefix)}


def _pointers(addresses: list[int]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(addresses))(*addresses)
