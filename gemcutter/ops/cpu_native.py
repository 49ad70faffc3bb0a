"""The native CPU kernels as providers: every function here is one call of the library, which runs one parallel region.

Owns what crosses the border: weights as `gc_matrix`, a layer as one `gc_layer` that is filled once, rows as contiguous float32
tensors. Refuses arithmetic: each function equals its namesake in `reference.py` within rounding. Whoever calls keeps tensors and
weights alive meanwhile. Read `csrc/cpu/sentences.cpp` for the other side, `cpu_step.py` for steps, `bind.py` for when these are
chosen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from gemcutter import native
from gemcutter.errors import CapacityError
from gemcutter.native import AttentionView, ExpertsView, LayerView, Matrix, PleView
from gemcutter.ops.cpu_step import Viewer
from gemcutter.ops.reference import Attention, Param, Words, closing_scale, matrix, rounded_root, vector
from gemcutter.ops.step import Pool, Step
from gemcutter.plan import LayerPlan, ModelPlan
from gemcutter.quant import Part, Weight
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.cpu_packing import row_source

CODES = {torch.bfloat16: 3, torch.float16: 4, torch.float32: 5}  # enum gc_codes
ACTIVATIONS = {"int8": 0, "bf16": 1, "float32": 2}  # enum gc_activations

_ENTRIES: dict[str, tuple[Any, ...]] = {
    "gc_linear": (c_void_p, c_int, c_void_p, c_int64, c_int, c_void_p),
    "gc_attend": (c_void_p, c_void_p, c_void_p, c_void_p),
    "gc_embed": (c_void_p, c_void_p, c_int64, c_float, c_void_p),
    "gc_ple_rows": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
    "gc_project": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
    "gc_mix": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
    "gc_feed": (c_void_p, c_void_p, c_int64, c_void_p),
    "gc_inject": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
    "gc_layer_forward": (c_void_p,) * 6 + (c_int64, c_void_p),
    "gc_norm": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "gc_head": (c_void_p, c_void_p, c_int64, c_int, c_float, c_void_p),
}


@cache
def entry(name: str) -> Callable[..., None]:
    """Give an entry point of the library that raises CapacityError where it finds no memory for the rows on their way."""
    library = native.load_library()
    assert library is not None, native.missing()
    function = getattr(library, name)
    function.argtypes, function.restype = _ENTRIES[name], c_int

    def call(*arguments: Any) -> None:
        _use_threads(torch.get_num_threads())
        if function(*arguments):
            raise CapacityError(f"no memory for the rows of a step in {name}; lower max_rows")

    return call


@lru_cache(maxsize=1)
def _use_threads(count: int) -> None:
    """Use as many threads as torch does; asked again, the library is told only of a change."""
    library = native.load_library()
    assert library is not None
    library.gc_set_threads(count)


def rows_of(x: Tensor) -> Tensor:
    """Give rows as the kernels take them: float32, contiguous."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def matrix_of(part: Part) -> Matrix:
    """Describe a part for the kernels: dense where it lies, or tiled."""
    if isinstance(part, CpuPackedWeight):
        return part.matrix()
    assert isinstance(part, Tensor)
    assert part.stride(1) == 1
    rows, columns = part.shape
    return Matrix(part.data_ptr(), rows, columns, part.stride(0) * part.itemsize, CODES[part.dtype])


def whole_matrix(weight: Weight) -> Matrix:
    """Describe a weight that lies in one part."""
    (part,) = weight.parts
    return matrix_of(part)


def array_of(parts: Sequence[Part]) -> ctypes.Array[Matrix]:
    """Describe several parts, one after the other."""
    return (Matrix * len(parts))(*map(matrix_of, parts))


# ---- words ----


def linear(x_ND: Tensor, weight: Weight) -> Tensor:
    """Multiply float32 rows as they are, whatever the weight; sentences may round theirs."""
    x, parts = rows_of(x_ND), array_of(weight.parts)
    out = torch.empty(x.shape[0], weight.rows)
    entry("gc_linear")(ctypes.addressof(parts), len(parts), x.data_ptr(), x.shape[0], ACTIVATIONS["float32"], out.data_ptr())
    return out.to(x_ND.dtype)


def build_attention(layer: LayerPlan) -> Attention:
    """Build attention over the pool's pages as they lie."""
    shape, view = attention_view(layer), Viewer(layer.window, layer.rope)
    pools, address, call = _Pools(shape, layer), ctypes.addressof(shape), entry("gc_attend")

    def attention(q_NHE: Tensor, step: Step, pool: Pool) -> Tensor:
        pools.meet(pool)
        q = rows_of(q_NHE)
        out = torch.empty_like(q)
        here = view(step)
        call(q.data_ptr(), here.address, address, out.data_ptr())
        return out.to(q_NHE.dtype)

    return attention


def attention_view(layer: LayerPlan) -> AttentionView:
    """Describe a layer's attention; the pool is met later."""
    return AttentionView(heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim, window=layer.window or 0)


class _Pools:
    """Points a layer's attention to the tensors of the pool that a step brings: nearly always the one of the step before."""

    def __init__(self, shape: AttentionView, layer: LayerPlan) -> None:
        self.shape, self.layer = shape, layer
        self.met: Pool | None = None

    def meet(self, pool: Pool) -> None:
        if pool is self.met:
            return
        keys, values = pool.storage(self.layer.kv_layer)
        assert keys.is_contiguous()
        assert values.is_contiguous()
        self.shape.k, self.shape.v, self.shape.dtype = keys.data_ptr(), values.data_ptr(), CODES[keys.dtype]
        self.met = pool


# ---- a layer's sentences ----


class _Bound:
    """One layer's `gc_layer`, filled with what some of its sentences need."""

    def __init__(
        self, plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words, lines: Sequence[str]
    ) -> None:
        self.layer, self.params = layer, params
        self.alive: list[Any] = []  # what the struct points to beside the parameters
        self.view = LayerView(
            attention=attention_view(layer),
            hidden=plan.hidden,
            ple_dim=layer.ple_dim,
            eps=plan.eps,
            feed_scale=1.0,
            inject_scale=1.0,
            has_v_norm=layer.has_v_norm,
            activations=ACTIVATIONS[words.numerics.activations],
        )
        self.is_last_writer = layer.index == plan.first_reader - 1
        self.pools, self.view_of = _Pools(self.view.attention, layer), Viewer(layer.window, layer.rope)
        for line in lines:
            getattr(self, f"_fill_{line}")()
        self.address = ctypes.addressof(self.view)

    def keep(self, keep_M: Tensor | None) -> int | None:
        """Give where the kept rows are listed; None keeps all, so that an empty list, which lies nowhere, needs some address."""
        return None if keep_M is None else keep_M.data_ptr() or self.address

    def _norm(self, name: str) -> int:
        found = rows_of(vector(self.params, name))
        self.alive.append(found)
        return found.data_ptr()

    def _whole(self, name: str) -> Matrix:
        return whole_matrix(matrix(self.params, name))

    def _halves(self, name: str) -> tuple[Weight, Weight]:
        """Give gate and up: as they are stored, or cut in the middle."""
        weight = matrix(self.params, name)
        if len(weight.parts) == 2:
            return Weight(weight.parts[:1]), Weight(weight.parts[1:])
        return weight.slice(0, weight.rows // 2), weight.slice(weight.rows // 2, weight.rows)

    def _fill_project(self) -> None:
        weight, names = matrix(self.params, "attn.in"), [name for name, _ in self.layer.attn_parts()]
        for place, name in enumerate(("q", "k", "v")):
            if name in names:
                self.view.attn_in[place] = whole_matrix(weight.part(name) if weight.names else weight)
        self.view.attn_norm, self.view.q_norm = self._norm("attn.norm"), self._norm("attn.q_norm")
        if self.layer.writes:
            self.view.k_norm = self._norm("attn.k_norm")

    def _fill_attend(self) -> None:
        """Attention has no parameters."""

    def _fill_mix(self) -> None:
        self.view.attn_out, self.view.attn_post_norm = self._whole("attn.out"), self._norm("attn.post_norm")

    def _fill_feed(self) -> None:
        gate, up = self._halves("mlp.in")
        self.alive += (gate, up)
        self.view.gate, self.view.up, self.view.down = whole_matrix(gate), whole_matrix(up), self._whole("mlp.out")
        self.view.mlp_norm, self.view.mlp_post_norm = self._norm("mlp.norm"), self._norm("mlp.post_norm")
        self.view.feed_scale = closing_scale(self.layer, self.params, "feed")
        if self.layer.moe is not None:
            self.view.experts = ctypes.addressof(self._experts())

    def _fill_inject(self) -> None:
        self.view.ple_gate, self.view.ple_out = self._whole("ple.gate"), self._whole("ple.out")
        self.view.ple_post_norm = self._norm("ple.post_norm")
        self.view.inject_scale = closing_scale(self.layer, self.params, "inject")

    def _experts(self) -> ExpertsView:
        moe = self.layer.moe
        assert moe is not None
        halves, w_out = self._halves("moe.in"), matrix(self.params, "moe.out")
        stacks = [[stack.expert(index) for index in range(moe.experts)] for stack in (*halves, w_out)]
        gate, up, down = (array_of([part for expert in stack for part in expert.parts]) for stack in stacks)
        router_scale = rows_of(vector(self.params, "moe.router_scale") * self.view.hidden**-0.5)
        found = ExpertsView(
            experts=moe.experts,
            top_k=moe.top_k,
            width=moe.width,
            router=self._whole("moe.router"),
            gate=ctypes.addressof(gate),
            up=ctypes.addressof(up),
            down=ctypes.addressof(down),
            router_scale=router_scale.data_ptr(),
            expert_scale=self._norm("moe.expert_scale"),
            norm=self._norm("moe.norm"),
            dense_branch_norm=self._norm("mlp.branch_norm"),
            expert_branch_norm=self._norm("moe.branch_norm"),
        )
        self.alive += (stacks, gate, up, down, router_scale, found)
        return found


def build_project(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Callable[..., Tensor]:
    """Build norm, in-projection, q/k/v norms, RoPE and cache write."""
    bound, call = _Bound(plan, layer, params, words, ("project",)), entry("gc_project")

    def project(x_ND: Tensor, step: Step, pool: Pool) -> Tensor:
        if layer.writes:
            bound.pools.meet(pool)
        x, keep = rows_of(x_ND), step.keep_M if bound.is_last_writer else None
        rows = step.num_rows if keep is None else keep.numel()
        q_MHE = torch.empty(rows, layer.heads, layer.head_dim)
        here = bound.view_of(step)
        call(bound.address, here.address, x.data_ptr(), bound.keep(keep), rows, q_MHE.data_ptr())
        return q_MHE

    return project


def build_attend(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Attention:
    """Build attention over the pages of the layer's `kv_layer`."""
    return build_attention(layer)


def build_mix(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the out-projection of the attention, its norm and the residual."""
    bound, call = _Bound(plan, layer, params, words, ("mix",)), entry("gc_mix")

    def mix(x_MD: Tensor, o_MHE: Tensor) -> Tensor:
        x, o = rows_of(x_MD), rows_of(o_MHE)
        out = torch.empty_like(x)
        call(bound.address, x.data_ptr(), o.data_ptr(), x.shape[0], out.data_ptr())
        return out

    return mix


def build_feed(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor], Tensor]:
    """Build the feed-forward, dense or dense and experts."""
    bound, call = _Bound(plan, layer, params, words, ("feed",)), entry("gc_feed")

    def feed(x_MD: Tensor) -> Tensor:
        x = rows_of(x_MD)
        out = torch.empty_like(x)
        call(bound.address, x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    return feed


def build_inject(
    plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words
) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the per-layer-embedding gate."""
    bound, call = _Bound(plan, layer, params, words, ("inject",)), entry("gc_inject")

    def inject(x_MD: Tensor, ple_MP: Tensor) -> Tensor:
        x, ple = rows_of(x_MD), _strided(ple_MP)
        out = torch.empty_like(x)
        call(bound.address, x.data_ptr(), ple.data_ptr(), ple.stride(0), x.shape[0], out.data_ptr())
        return out

    return inject


def _strided(ple_MP: Tensor) -> Tensor:
    """Give float32 rows whose elements follow each other; the rows may lie apart."""
    return ple_MP if ple_MP.dtype == torch.float32 and ple_MP.stride(1) == 1 else rows_of(ple_MP)


def build_layer(plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words) -> Callable[..., Tensor]:
    """Build all sentences of a layer as one call: [N, D] to [M, D], M the kept rows in the last writer."""
    lines = ("project", "attend", "mix", "feed", *(["inject"] if layer.ple_dim else []))
    bound, call = _Bound(plan, layer, params, words, lines), entry("gc_layer_forward")

    def forward(x_ND: Tensor, step: Step, pool: Pool, ple_MP: Tensor | None) -> Tensor:
        bound.pools.meet(pool)
        x, keep = rows_of(x_ND), step.keep_M if bound.is_last_writer else None
        here = bound.view_of(step)
        there = here if keep is None else bound.view_of(step.kept())
        out = torch.empty_like(x) if keep is None else torch.empty(keep.numel(), x.shape[1])
        ple = None if ple_MP is None else _strided(ple_MP)
        rows, apart = (None, 0) if ple is None else (ple.data_ptr(), ple.stride(0))
        call(bound.address, here.address, there.address, bound.keep(keep), x.data_ptr(), rows, apart, out.data_ptr())
        return out

    return forward


# ---- the model's ends ----


def build_embed(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor], Tensor]:
    """Build the token embedding."""
    weight, scale, call = matrix(params, "embed.tokens"), rounded_root(plan.hidden, words), entry("gc_embed")
    table = whole_matrix(weight)
    address = ctypes.addressof(table)

    def embed(ids_N: Tensor, table: Matrix = table) -> Tensor:
        out = torch.empty(ids_N.shape[0], plan.hidden)
        call(address, ids_N.data_ptr(), ids_N.shape[0], scale, out.data_ptr())
        return out

    return embed


def build_ple(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[..., Tensor]:
    """Build the per-layer embeddings of a span of layers.

    Rows of a table that stays as its file packs it are laid out one by one, or widened here where the library does not know the
    scheme.
    """
    table, project, norm = matrix(params, "embed.ple"), matrix(params, "ple.in"), rows_of(vector(params, "ple.norm"))
    token_scale, dim, call = rounded_root(plan.ple_dim, words), plan.ple_dim, entry("gc_ple_rows")
    spans: dict[tuple[int, int], tuple[PleView, Weight, Weight]] = {}
    alive: list[Any] = []

    def bind(first: int, last: int) -> tuple[PleView, Weight, Weight]:
        some, rows = table.span(first * dim, last * dim), project.slice(first * dim, last * dim)
        bound = PleView(
            project=whole_matrix(rows),
            norm=norm.data_ptr(),
            dim=dim,
            eps=plan.eps,
            token_scale=token_scale,
            context_scale=plan.hidden**-0.5,
            activations=ACTIVATIONS[words.numerics.activations],
        )
        (held,) = some.parts
        if isinstance(held, Tensor | CpuPackedWeight):
            bound.table = matrix_of(held)
        elif source := row_source(held):
            bound.table, bound.source = source[0], ctypes.addressof(source[1])
            alive.append(source)
        return bound, some, rows

    def ple(x_ND: Tensor, ple_ids_N: Tensor, first: int, last: int) -> Tensor:
        found = spans.get((first, last)) or spans.setdefault((first, last), bind(first, last))
        bound, some, _ = found
        x = rows_of(x_ND)
        tokens = None if bound.table.rows else rows_of(some.gather(ple_ids_N, torch.float32))
        out = torch.empty(x.shape[0], last - first, dim)
        given = None if tokens is None else tokens.data_ptr()
        call(ctypes.addressof(bound), x.data_ptr(), ple_ids_N.data_ptr(), given, x.shape[0], out.data_ptr())
        return out

    return ple


def build_norm(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor], Tensor]:
    """Build the norm after the last layer."""
    norm, call = rows_of(vector(params, "norm")), entry("gc_norm")

    def final(x_MD: Tensor) -> Tensor:
        x = rows_of(x_MD)
        out = torch.empty_like(x)
        call(x.data_ptr(), norm.data_ptr(), plan.eps, x.shape[0], plan.hidden, out.data_ptr())
        return out

    return final


def build_head(plan: ModelPlan, params: Mapping[str, Param], words: Words) -> Callable[[Tensor], Tensor]:
    """Build the head: normed rows [R, D] to soft-capped logits [R, V]."""
    weight, call = matrix(params, "embed.tokens" if plan.tied_head else "head"), entry("gc_head")
    table, activations = whole_matrix(weight), ACTIVATIONS[words.numerics.activations]

    def head(h_RD: Tensor) -> Tensor:
        h = rows_of(h_RD)
        out = torch.empty(h.shape[0], weight.rows)
        call(ctypes.addressof(table), h.data_ptr(), h.shape[0], activations, plan.softcap or 0.0, out.data_ptr())
        return out

    return head
