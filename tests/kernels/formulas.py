"""Norm, GELU and rotary embedding in plain float64, written from the formulas of the family; no code is shared with `ops/`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gemcutter.plan import RopeSpec

EPS = 1e-6


def naive_norm(x: Tensor, weight: Tensor | None = None, eps: float = EPS) -> Tensor:
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight.double()


def naive_gelu(z: Tensor) -> Tensor:
    z = z.double()
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def naive_rope(x_NHE: Tensor, positions: Sequence[int], spec: RopeSpec) -> Tensor:
    """Rotate pair i with angle p * theta ** (-2i / E) / factor; pairs from `pairs` on stay."""
    out, half = x_NHE.double().clone(), spec.head_dim // 2
    for row, position in enumerate(positions):
        for pair in range(spec.pairs):
            angle = position * spec.theta ** (-2 * pair / spec.head_dim) / spec.factor
            low, high = x_NHE[row, :, pair].double(), x_NHE[row, :, pair + half].double()
            out[row, :, pair] = low * math.cos(angle) - high * math.sin(angle)
            out[row, :, pair + half] = high * math.cos(angle) + low * math.sin(angle)
    return out
