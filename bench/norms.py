"""The fused norm kernels of a GPU: checked against the reference, and timed against one launch for each thing they do.

Owns the grid of shapes (head dims, heads, rows, what a layer owns). Refuses to know whole models; read `gpu.py` for who calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gemcutter.gauge.presets import plan_of
from gemcutter.ops import reference
from gemcutter.plan import LayerPlan, Proj

HEAD_DIMS, HEADS, ROWS = (128, 256, 512), ((32, 16), (16, 8), (8, 1)), (1, 33, 4096)
TIMED_ROWS = (1, 32, 512, 4096)
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
    from gemcutter.ops import triton_fused

    given = (case.raw, case.layer, case.q_norm)
    if not case.layer.writes:
        return triton_fused.finish_q(*given, EPS, case.cos, case.sin)
    return triton_fused.finish_qkv(*given, case.k_norm, EPS, case.cos, case.sin, case.slots, k, v)


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


def time_norms(device: torch.device) -> Iterator[dict[str, Any]]:
    """Time the fused kernel, and the same work in separate launches, for the layers of 31B; beside the bytes that must move."""
    from triton.testing import do_bench

    from gemcutter.gauge.machine import read_rate

    rate = read_rate(device)
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
