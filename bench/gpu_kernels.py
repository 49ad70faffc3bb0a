"""Single kernels of a GPU: fused norms checked against the reference; norms, attention and products timed beside what they move.

Owns the shapes: a grid of head dims, heads, rows and what a layer owns for the check, layers of E4B and 31B for the times. Caches
are flushed before each run, as `triton.testing.do_bench` does it. Refuses to know whole models; read `gpu.py` for who calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from gemcutter.benchmark.hardware import read_rate
from gemcutter.benchmark.synthetic import make_params, plan_of
from gemcutter.engine.memory import PAGE_TOKENS
from gemcutter.ops import reference
from gemcutter.ops.registry import select_backend
from gemcutter.ops.triton.attn_metadata import TritonAttnMetadata
from gemcutter.ops.types import matrix
from gemcutter.plan import LayerPlan, Proj

HEAD_DIMS, HEADS, ROWS = (128, 256, 512), ((32, 16), (16, 8), (8, 1)), (1, 33, 4096)
TIMED_ROWS, CONTEXTS = (1, 32, 512, 4096), (4096, 32768)
LIMIT = 2e-2  # of an element in bfloat16, whose values are a few units
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Case:
    """One layer's projected rows, and what they are normed with."""

    layer: LayerPlan
    raw: Tensor
    q_norm: Tensor
    k_norm: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor

    def pool(self) -> tuple[Tensor, Tensor]:
        """Make keys and values of as many slots as there are rows."""
        shape = (len(self.raw), self.layer.kv_heads, self.layer.head_dim)
        return self.raw.new_full(shape, torch.nan), self.raw.new_full(shape, torch.nan)


def _case(proj: Proj, head_dim: int, heads: int, kv_heads: int, rows: int, device: torch.device) -> Case:
    layer = replace(plan_of("31B").layers[0], proj=proj, head_dim=head_dim, heads=heads, kv_heads=kv_heads)
    layer = replace(layer, rope=replace(layer.rope, head_dim=head_dim, pairs=head_dim // 2))
    width = sum(size for _, size in layer.attn_parts())
    draw = torch.Generator(device).manual_seed(rows + head_dim)
    angles = torch.rand(rows, 1, head_dim // 2, device=device, generator=draw) * 100
    norms = (torch.rand(head_dim, device=device, generator=draw) + 0.5 for _ in range(2))
    raw = torch.randn(rows, width, device=device, generator=draw).bfloat16()
    return Case(layer, raw, *norms, angles.cos().bfloat16(), angles.sin().bfloat16(), torch.randperm(rows, device=device))


def _fused(case: Case, k: Tensor, v: Tensor) -> Tensor:
    from gemcutter.ops.triton import fused_norm

    given = (case.raw, case.layer, case.q_norm)
    if not case.layer.writes:
        return fused_norm.finish_q(*given, EPS, case.cos, case.sin)
    return fused_norm.finish_qkv(*given, case.k_norm, EPS, case.cos, case.sin, case.slots, k, v)


def _apart(case: Case, k: Tensor, v: Tensor) -> Tensor:
    """Do the same in the words of the reference, each a launch or more."""
    layer, rows = case.layer, len(case.raw)
    parts = dict(
        zip((name for name, _ in layer.attn_parts()), case.raw.split([n for _, n in layer.attn_parts()], 1), strict=True)
    )
    q = parts["q"].reshape(rows, layer.heads, layer.head_dim)
    if layer.writes:
        raw_k = parts["k"].reshape(rows, layer.kv_heads, layer.head_dim)
        raw_v = parts["v"].reshape_as(raw_k) if "v" in parts else raw_k
        k[case.slots] = reference.rope(reference.rms_norm(raw_k, case.k_norm, EPS), case.cos, case.sin)
        v[case.slots] = reference.rms_norm(raw_v, None, EPS)
    return reference.rope(reference.rms_norm(q, case.q_norm, EPS), case.cos, case.sin)


def check_norms(device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare every kind of layer, head dim and number of heads with the reference in float32; on a GPU only."""
    if device.type != "cuda":
        return
    for proj in Proj:
        worst = 0.0
        for head_dim, (heads, kv_heads), rows in product(HEAD_DIMS, HEADS, ROWS):
            case = _case(proj, head_dim, heads, kv_heads, rows, device)
            wide = replace(case, raw=case.raw.float(), cos=case.cos.float(), sin=case.sin.float())
            found, wanted = case.pool(), wide.pool()
            q = (_fused(case, *found), _apart(wide, *wanted))
            pairs = [q, *(zip(found, wanted, strict=True) if case.layer.writes else ())]
            worst = max(worst, *(float(((a.float() - b) / b.abs().clamp(min=1)).abs().max()) for a, b in pairs))
        yield {"check": f"fused norms, {proj.name}", "error": worst, "limit": LIMIT, "is_good": worst <= LIMIT}


def paged_context(batch: int, context: int, device: torch.device) -> TritonAttnMetadata:
    """Describe one row of each of some sequences, all of which hold `context` positions in pages of their own."""
    pages, edges = -(-context // PAGE_TOKENS), torch.arange(batch + 1, dtype=torch.int32, device=device)
    return TritonAttnMetadata(
        positions_N=torch.full((batch,), context - 1, dtype=torch.int32, device=device),
        row_sequence_N=edges[:-1],
        query_start_S1=edges,
        pages_SP=torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages),
        first_S=torch.zeros(batch, dtype=torch.int32, device=device),
        page_tokens=PAGE_TOKENS,
        slot_mapping_N=None,
        max_rows=1,
    )


def attention_cases(device: torch.device) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """List single rows of sliding and global layers of E4B and 31B: what runs, and the bytes of keys and values that it reads."""
    from gemcutter.ops.triton.attention import paged_attention

    for preset, batch, context in product(("E4B", "31B"), (1, 8), CONTEXTS):
        layers = {layer.window: layer for layer in plan_of(preset).layers if layer.writes}
        for window, layer in layers.items():
            paged, heads = paged_context(batch, context, device), (layer.kv_heads, layer.head_dim)
            keys, values = torch.randn(2, paged.pages_SP.numel() * PAGE_TOKENS, *heads, device=device).bfloat16().unbind()
            q = torch.randn(batch, layer.heads, layer.head_dim, device=device).bfloat16()
            moved = 2 * batch * layer.visible(context) * layer.kv_heads * layer.head_dim * keys.itemsize
            name = f"attention of {preset}, {'global' if window is None else 'sliding'}, {batch} rows after {context}"
            yield name, moved, partial(paged_attention, q, keys, values, paged, window)


def product_cases(device: torch.device) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """List products of few rows with the MLP matrices of E4B and 31B: what runs, and the bytes of the matrix."""
    from gemcutter.ops.triton import linear as linear_kernels

    for preset, quant in product(("E4B", "31B"), ("bf16", "q4_0")):
        plan, dtype = plan_of(preset, 1), torch.bfloat16
        params = make_params(plan, quant, select_backend(device.type, "auto").packer(device, dtype), device)
        for name, rows in product(("layers.0.mlp.in", "layers.0.mlp.out"), (1, 2, 16, 64)):
            weight = matrix(params, name)
            x = torch.randn(rows, weight.columns, device=device).bfloat16()
            yield f"{name} of {preset}, {quant}, {rows} rows", weight.nbytes, partial(linear_kernels.linear, x, weight)


def time_kernels(device: torch.device) -> Iterator[dict[str, Any]]:
    """Time all single kernels: milliseconds, and those in which this device moves their bytes."""
    from triton.testing import do_bench

    rate = read_rate(device)
    for name, moved, work in chain(attention_cases(device), product_cases(device)):
        yield {"kernel": name, "ms": do_bench(work, quantiles=[0.5]), "floor_ms": 1e3 * moved / rate}
    yield from time_norms(device, rate)


def time_norms(device: torch.device, rate: float) -> Iterator[dict[str, Any]]:
    """Time the fused kernel, and the same work in separate launches, for the layers of 31B; beside the bytes that must move."""
    from triton.testing import do_bench

    for proj, rows in product(Proj, TIMED_ROWS):
        case = _case(proj, 256, 32, 16, rows, device)
        k, v = case.pool()

        def median_ms(work: Callable[[Case, Tensor, Tensor], Tensor], case: Case = case, k: Tensor = k, v: Tensor = v) -> float:
            found: float = do_bench(lambda: work(case, k, v), quantiles=[0.5])
            return found

        moved = 2 * case.raw.nbytes + case.cos.nbytes + case.sin.nbytes
        yield {
            "kernel": f"fused norms, {proj.name}, {rows} rows",
            "ms": median_ms(_fused),
            "apart_ms": median_ms(_apart),
            "floor_ms": 1e3 * moved / rate,
        }
