"""The model ops on the native CPU kernels: embeddings before the first layer, norm and LM head after the last.

Owns what crosses the border for them; refuses arithmetic, as `layer_ops.py` does. Read `csrc/cpu/embed_head.cpp` for the other
side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gemcutter.native import Matrix, PleView
from gemcutter.ops.cpu.adapters import address_of, carry_deltas, numbers_of_rows
from gemcutter.ops.cpu.bindings import ACTIVATIONS, entry, matrix_of, rows_of, whole_matrix
from gemcutter.ops.step import NO_ADAPTERS, AdapterRows
from gemcutter.ops.types import OpContext, Param, matrix, rounded_root, vector
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.cpu_packing import row_source


def build_embed(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the token embedding."""
    weight, scale, call = matrix(params, "embed.tokens"), rounded_root(plan.hidden, ctx), entry("gc_embed")
    table = whole_matrix(weight)
    address = ctypes.addressof(table)

    def embed(ids_N: Tensor, table: Matrix = table) -> Tensor:
        out = torch.empty(ids_N.shape[0], plan.hidden)
        call(address, ids_N.data_ptr(), ids_N.shape[0], scale, out.data_ptr())
        return out

    return embed


def build_ple_embed(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[..., Tensor]:
    """Build the per-layer embeddings of a range of layers.

    Rows of a table that stays as its file packs it are laid out one by one, or dequantized here where the library does not
    know the scheme, or other ranks have some.
    """
    table, projection, norm = matrix(params, "embed.ple"), matrix(params, "ple.in"), rows_of(vector(params, "ple.norm"))
    token_scale, dim, call, gather_call = (
        rounded_root(plan.ple_dim, ctx),
        plan.ple_dim,
        entry("gc_ple_embed"),
        entry("gc_gather_ple"),
    )
    ranges: dict[tuple[int, int], tuple[PleView, Weight, Weight]] = {}
    alive: list[Any] = []

    def bind(first: int, last: int) -> tuple[PleView, Weight, Weight]:
        some, rows = table.span(first * dim, last * dim), projection.slice(first * dim, last * dim)
        bound = PleView(
            projection=whole_matrix(rows),
            norm=norm.data_ptr(),
            dim=dim,
            vocab=plan.ple_vocab,
            eps=plan.eps,
            token_scale=token_scale,
            context_scale=plan.hidden**-0.5,
            activations=ACTIVATIONS[ctx.precision.activations],
        )
        alive.append(carry_deltas(bound.projection, rows.deltas))
        (held,) = some.parts
        if not plan.ple_rows.is_whole:
            return bound, some, rows
        if isinstance(held, Tensor | CpuPackedWeight):
            bound.table = matrix_of(held)
        elif source := row_source(held):
            bound.table, bound.source = source[0], ctypes.addressof(source[1])
            alive.append(source)
        return bound, some, rows

    def ple_embed(x_ND: Tensor, ple_ids_N: Tensor, first: int, last: int, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        found = ranges.get((first, last)) or ranges.setdefault((first, last), bind(first, last))
        bound, some, _ = found
        x, wanted = rows_of(x_ND), numbers_of_rows(adapters, len(x_ND))
        out, tokens, address = torch.empty(x.shape[0], last - first, dim), None, ctypes.addressof(bound)
        if not bound.table.rows:
            gather = ctx.table_gatherer(lambda ids_N: some.gather(ids_N, torch.float32), plan.ple_rows)
            tokens = rows_of(gather(ple_ids_N))
        elif ctx.table_pages.release is not None:
            tokens = out
            for piece in ctx.table_pages.pieces(x.shape[0]):
                ids_N = ple_ids_N[piece]
                gather_call(address, ids_N.data_ptr(), len(ids_N), out[piece].data_ptr())
        given = None if tokens is None else tokens.data_ptr()
        call(address, x.data_ptr(), ple_ids_N.data_ptr(), given, x.shape[0], address_of(wanted), out.data_ptr())
        return out

    return ple_embed


def build_final_norm(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the norm after the last layer."""
    norm, call = rows_of(vector(params, "norm")), entry("gc_final_norm")

    def final(x_MD: Tensor) -> Tensor:
        x = rows_of(x_MD)
        out = torch.empty_like(x)
        call(x.data_ptr(), norm.data_ptr(), plan.eps, x.shape[0], plan.hidden, out.data_ptr())
        return out

    return final


def build_lm_head(plan: ModelPlan, params: Mapping[str, Param], ctx: OpContext) -> Callable[[Tensor], Tensor]:
    """Build the LM head: normed rows [R, D] to soft-capped logits [R, V]."""
    weight, call = matrix(params, "embed.tokens" if plan.tied_head else "head"), entry("gc_lm_head")
    table, activations = whole_matrix(weight), ACTIVATIONS[ctx.precision.activations]

    def lm_head(h_RD: Tensor) -> Tensor:
        h = rows_of(h_RD)
        out = torch.empty(h.shape[0], weight.rows)
        call(ctypes.addressof(table), h.data_ptr(), h.shape[0], activations, plan.softcap or 0.0, out.data_ptr())
        return out

    return lm_head
