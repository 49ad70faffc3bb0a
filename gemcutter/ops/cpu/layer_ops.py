"""The layer ops on the native CPU kernels: every function here is one call of the library, which runs one parallel region.

Owns a layer as one `gc_layer` that is filled once. Refuses arithmetic: each function equals its namesake in `reference.py`
within rounding. Read `csrc/cpu/layer_ops.cpp` for the other side, `attn_metadata.py` for steps, `backend.py` for when these are
selected.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemcutter.native import AttentionView, ExpertsView, LayerView, Matrix
from gemcutter.ops.cpu.adapters import address_of, carry_deltas, numbers_of_rows
from gemcutter.ops.cpu.attn_metadata import of_group
from gemcutter.ops.cpu.bindings import ACTIVATIONS, array_of, bind_kv, entry, rows_of, whole_matrix
from gemcutter.ops.step import NO_ADAPTERS, AdapterRows, KVCache, Step
from gemcutter.ops.types import Attention, LayerOutput, OpContext, Param, closing_scale, matrix, vector
from gemcutter.plan import LayerPlan, ModelPlan
from gemcutter.quant import Weight
from gemcutter.quant.cpu_packed import CpuPackedWeight


def linear(x_ND: Tensor, weight: Weight) -> Tensor:
    """Multiply float32 rows as they are, whatever the weight; layer ops may round theirs."""
    if len(weight.parts) > 1 and any(isinstance(part, CpuPackedWeight) and part.order is not None for part in weight.parts):
        return torch.cat([linear(x_ND, Weight((part,))) for part in weight.parts], dim=1)  # each in its own order of columns
    x, parts = rows_of(x_ND), array_of(weight.parts)
    out = torch.empty(x.shape[0], weight.rows)
    entry("gc_linear")(ctypes.addressof(parts), len(parts), x.data_ptr(), x.shape[0], ACTIVATIONS["float32"], out.data_ptr())
    return out.to(x_ND.dtype)


def bind_matmul(weight: Weight, rows_ND: Tensor, activations: str) -> Callable[[], None]:
    """Return a call that multiplies the same rows with a weight over and over, taken in the form `activations`."""
    parts, rows = array_of(weight.parts), rows_of(rows_ND)
    out, form, call = torch.empty(len(rows), weight.rows), ACTIVATIONS[activations], entry("gc_linear")
    return lambda: call(ctypes.addressof(parts), len(parts), rows.data_ptr(), len(rows), form, out.data_ptr())


def build_attention(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Attention:
    """Build attention over the cache's pages as they are."""
    shape, call = attention_view(layer), entry("gc_attention_forward")
    address, binding, group, rope = ctypes.addressof(shape), bind_kv(layer.kv_layer, ctx), layer.group, layer.rope

    def attention(q_NHE: Tensor, step: Step, cache: KVCache, shape: AttentionView = shape) -> Tensor:
        q, kv = rows_of(q_NHE), binding.view(cache)
        out = torch.empty_like(q)
        call(q.data_ptr(), of_group(step, group, rope), address, ctypes.addressof(kv), out.data_ptr())
        return out.to(q_NHE.dtype)

    return attention


def attention_view(layer: LayerPlan) -> AttentionView:
    """Describe a layer's attention."""
    return AttentionView(heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim, window=layer.window or 0)


class BoundLayer:
    """One layer's `gc_layer`, filled with what some of its ops need."""

    def __init__(
        self, plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext, ops: Sequence[str]
    ) -> None:
        self.layer, self.params = layer, params
        self.alive: list[Any] = []  # what the struct points to beside the parameters
        self._adapted = list[tuple[Matrix, Weight]]()  # matrices of the struct whose changes are still to be bound
        self.view = LayerView(
            attention=attention_view(layer),
            hidden=plan.hidden,
            ple_dim=layer.ple_dim,
            eps=plan.eps,
            mlp_scale=1.0,
            ple_scale=1.0,
            has_v_norm=layer.has_v_norm,
            activations=ACTIVATIONS[ctx.precision.activations],
            ranks=None if ctx.ranks is None else ctx.ranks.view,
        )
        for op in ops:
            getattr(self, f"_fill_{op}")()

    @property
    def address(self) -> int:
        """Return the struct's address.

        Adapters' changes are bound when it is first asked for: they are packed for it, and most ops run as part of a layer.
        """
        while self._adapted:
            found, weight = self._adapted[-1]
            self.alive.append(carry_deltas(found, weight.deltas))
            self._adapted.pop()
        return ctypes.addressof(self.view)

    def logit_rows(self, step: Step) -> tuple[int | None, int]:
        """Return the address and number of the rows whose queries are made; without an address all of them.

        An empty list has no address of its own and gets some other.
        """
        rows_M = step.logit_rows_M
        if not self.layer.drops_rows or rows_M is None:
            return None, step.num_rows
        return rows_M.data_ptr() or self.address, rows_M.numel()

    def _norm(self, name: str) -> int:
        found = rows_of(vector(self.params, name))
        self.alive.append(found)
        return found.data_ptr()

    def _fill(self, name: str, weight: Weight) -> None:
        setattr(self.view, name, whole_matrix(weight))
        self._adapt(getattr(self.view, name), weight)

    def _adapt(self, found: Matrix, weight: Weight) -> None:
        if weight.deltas:
            self._adapted.append((found, weight))

    def _halves(self, name: str) -> tuple[Weight, Weight]:
        """Return gate and up."""
        weight = matrix(self.params, name)
        return weight.slice(0, weight.rows // 2), weight.slice(weight.rows // 2, weight.rows)

    def _fill_qkv(self) -> None:
        weight, names = matrix(self.params, "attn.in"), [name for name, _ in self.layer.attn_parts()]
        for place, name in enumerate(("q", "k", "v")):
            if name in names:
                part = weight.part(name) if weight.names else weight
                self.view.attn_in[place] = whole_matrix(part)
                self._adapt(self.view.attn_in[place], part)
        self.view.attn_norm, self.view.q_norm = self._norm("attn.norm"), self._norm("attn.q_norm")
        if self.layer.writes:
            self.view.k_norm = self._norm("attn.k_norm")

    def _fill_attention(self) -> None:
        """Attention has no parameters."""

    def _fill_attn_out(self) -> None:
        self._fill("attn_out", matrix(self.params, "attn.out"))
        self.view.attn_post_norm = self._norm("attn.post_norm")

    def _fill_mlp(self) -> None:
        gate, up = self._halves("mlp.in")
        self.alive += (gate, up)
        for own, weight in (("gate", gate), ("up", up), ("down", matrix(self.params, "mlp.out"))):
            self._fill(own, weight)
        self.view.mlp_norm, self.view.mlp_post_norm = self._norm("mlp.norm"), self._norm("mlp.post_norm")
        self.view.mlp_scale = closing_scale(self.layer, self.params, "mlp")
        if self.layer.moe is not None:
            self.view.experts = ctypes.addressof(self._experts())

    def _fill_ple_gate(self) -> None:
        for own in ("ple_gate", "ple_out"):
            self._fill(own, matrix(self.params, own.replace("_", ".")))
        self.view.ple_post_norm = self._norm("ple.post_norm")
        self.view.ple_scale = closing_scale(self.layer, self.params, "ple_gate")

    def _experts(self) -> ExpertsView:
        moe = self.layer.moe
        assert moe is not None
        halves, w_out = self._halves("moe.in"), matrix(self.params, "moe.out")
        stacks = [[stack.expert(index) for index in range(moe.num_held)] for stack in (*halves, w_out)]
        gate, up, down = (array_of([part for expert in stack for part in expert.parts]) for stack in stacks)
        router = matrix(self.params, "moe.router")
        router_scale = rows_of(vector(self.params, "moe.router_scale") * self.view.hidden**-0.5)
        found = ExpertsView(
            experts=moe.experts,
            top_k=moe.top_k,
            width=moe.width,
            first=moe.first,
            held=moe.num_held,
            router=whole_matrix(router),
            gate=ctypes.addressof(gate),
            up=ctypes.addressof(up),
            down=ctypes.addressof(down),
            router_scale=router_scale.data_ptr(),
            expert_scale=self._norm("moe.expert_scale"),
            norm=self._norm("moe.norm"),
            dense_branch_norm=self._norm("mlp.branch_norm"),
            expert_branch_norm=self._norm("moe.branch_norm"),
        )
        self._adapt(found.router, router)
        self.alive += (stacks, gate, up, down, router_scale, found)
        return found


def build_qkv(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build norm, in-projection, q/k/v norms, RoPE and cache write."""
    bound, call = BoundLayer(plan, layer, params, ctx, ("qkv",)), entry("gc_qkv")
    binding = bind_kv(layer.index, ctx) if layer.writes else None

    def qkv(x_ND: Tensor, step: Step, cache: KVCache) -> Tensor:
        x, (kept, rows) = rows_of(x_ND), bound.logit_rows(step)
        kv = None if binding is None else binding.view(cache)
        q_MHE = torch.empty(rows, layer.heads, layer.head_dim)
        to = None if kv is None else ctypes.addressof(kv)
        metadata = of_group(step, layer.group, layer.rope)
        wanted = None if kept is None else numbers_of_rows(step.remaining.adapter_rows, rows)
        call(bound.address, metadata, to, x.data_ptr(), kept, rows, address_of(wanted), q_MHE.data_ptr())
        return q_MHE

    return qkv


def build_attn_out(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the out-projection of the attention, its norm and the residual."""
    bound, call = BoundLayer(plan, layer, params, ctx, ("attn_out",)), entry("gc_attn_out")

    def attn_out(x_MD: Tensor, o_MHE: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        x, o, wanted = rows_of(x_MD), rows_of(o_MHE), numbers_of_rows(adapters, len(x_MD))
        out = torch.empty_like(x)
        call(bound.address, x.data_ptr(), o.data_ptr(), x.shape[0], address_of(wanted), out.data_ptr())
        return out

    return attn_out


def build_mlp(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the MLP, dense or dense and experts."""
    bound, call = BoundLayer(plan, layer, params, ctx, ("mlp",)), entry("gc_mlp")

    def mlp(x_MD: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        x, wanted = rows_of(x_MD), numbers_of_rows(adapters, len(x_MD))
        out = torch.empty_like(x)
        call(bound.address, x.data_ptr(), x.shape[0], address_of(wanted), out.data_ptr())
        return out

    return mlp


def build_ple_gate(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the per-layer-embedding gate."""
    bound, call = BoundLayer(plan, layer, params, ctx, ("ple_gate",)), entry("gc_ple_gate")

    def ple_gate(x_MD: Tensor, ple_MP: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        x, ple, wanted = rows_of(x_MD), _strided(ple_MP), numbers_of_rows(adapters, len(x_MD))
        out = torch.empty_like(x)
        call(bound.address, x.data_ptr(), ple.data_ptr(), ple.stride(0), x.shape[0], address_of(wanted), out.data_ptr())
        return out

    return ple_gate


def _strided(ple_MP: Tensor) -> Tensor:
    """Return float32 rows whose elements follow each other; the rows may be apart."""
    return ple_MP if ple_MP.dtype == torch.float32 and ple_MP.stride(1) == 1 else rows_of(ple_MP)


def build_layer(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext, next_norm: Tensor | None = None
) -> Callable[..., LayerOutput]:
    """Build all ops of a layer as one call: [N, D] to [M, D], M the rows that go on. The next layer norms its rows itself."""
    ops = ("qkv", "attention", "attn_out", "mlp", *(["ple_gate"] if layer.ple_dim else []))
    bound, call = BoundLayer(plan, layer, params, ctx, ops), entry("gc_layer_forward")
    group, rope, binding, hidden, address = layer.group, layer.rope, bind_kv(layer.kv_layer, ctx), plan.hidden, bound.address

    def forward(x_ND: Tensor, step: Step, cache: KVCache, ple_MP: Tensor | None, normed_ND: Tensor | None = None) -> LayerOutput:
        x, kv, (kept, rows) = rows_of(x_ND), binding.view(cache), bound.logit_rows(step)
        here = of_group(step, group, rope)
        there = here if kept is None else of_group(step.remaining, group, rope)
        out = torch.empty(rows, hidden)
        ple = None if ple_MP is None else _strided(ple_MP)
        ple_rows, stride = (None, 0) if ple is None else (ple.data_ptr(), ple.stride(0))
        call(address, here, there, ctypes.addressof(kv), kept, x.data_ptr(), ple_rows, stride, out.data_ptr())
        return out, None

    return forward
