"""Rotary tables: cosines and sines for a step's positions, one pair a distinct RopeSpec.

Owns the angles, computed in float32 as the models were trained and cast to the compute dtype; refuses to know layers.
Source: transformers' default and proportional rope of gemma4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemcutter.ops.reference import elementwise
from gemcutter.plan import RopeSpec


class Rope:
    """The frequencies of one RopeSpec on one device."""

    def __init__(self, spec: RopeSpec, device: torch.device, dtype: torch.dtype) -> None:
        exponents = torch.arange(0, 2 * spec.pairs, 2, dtype=torch.float32) / spec.head_dim
        rotated = 1.0 / (spec.theta**exponents) / spec.factor
        still = torch.zeros(spec.head_dim // 2 - spec.pairs)
        self.frequencies_C = torch.cat((rotated, still)).to(device)  # radians per position
        self.dtype = dtype

    def tables(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the rows' angles, [N, 1, E/2] each."""
        angles = positions_N.float().view(-1, 1, 1) * self.frequencies_C
        return elementwise(torch.cos, angles).to(self.dtype), elementwise(torch.sin, angles).to(self.dtype)
