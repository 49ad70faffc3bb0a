"""The bytes of GGUF's super-blocks: 256 values in 8 or 16 runs, whose small integer scales share one or two float16.

Owns one decoder per type, uint8 [B, bytes] to float32 [B, 256]. B blocks are computed at once. Source: the decoders of ggml,
whose order of operations is kept, so that results are equal bit for bit. Read `gguf_blocks_short.py` for what they share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemcutter.quant.bits import in_runs, look_up, planes, unpack
from gemcutter.quant.gguf_blocks_short import NONLINEAR, half


def decode_q2_k(blocks: Tensor) -> Tensor:
    """Compute (d * scale) * q - (dmin * minimum) in 16 runs: scales and minima [16], 2-bit q [64], d, dmin."""
    scales = half(blocks, 80) * (blocks[:, :16] & 15).float()
    minima = half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return _runs(scales, planes(blocks[:, 16:80], 2, 32).float(), minima)


def decode_q3_k(blocks: Tensor) -> Tensor:
    """Compute (d * (scale - 32)) * (q - 4 unless its high bit is set), 16 runs: high bits [32], 2-bit q [64], scales [12], d."""
    scales = planes(blocks[:, 96:104], 4, 8) | planes(blocks[:, 104:108], 2, 4) << 4
    q = planes(blocks[:, 32:96], 2, 32).float() - (planes(blocks[:, :32], 1, 32) ^ 1).float() * 4
    return _runs(half(blocks, 108) * (scales.float() - 32), q)


def decode_q4_k(blocks: Tensor) -> Tensor:
    """Compute (d * scale) * q - (dmin * minimum) in 8 runs: d, dmin, scales and minima [12], 4-bit q [128]."""
    return _runs(*_scales_minima(blocks, planes(blocks[:, 16:], 4, 32)))


def decode_q5_k(blocks: Tensor) -> Tensor:
    """Compute as Q4_K with a fifth bit: d, dmin, scales and minima [12], fifth bits [32], nibbles [128]."""
    return _runs(*_scales_minima(blocks, planes(blocks[:, 48:], 4, 32) | planes(blocks[:, 16:48], 1, 32) << 4))


def decode_q6_k(blocks: Tensor) -> Tensor:
    """Compute (d * scale) * (q - 32) in 16 runs: nibbles [128], upper two bits [64], signed scales [16], d."""
    q = planes(blocks[:, :128], 4, 64) | planes(blocks[:, 128:192], 2, 32) << 4
    return _runs(half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float(), q.float() - 32)


def decode_iq4_xs(blocks: Tensor) -> Tensor:
    """Compute (d * (scale - 32)) * level in 8 runs: d, upper bits of the scales [2], their nibbles [4], 4-bit levels [128]."""
    scales = unpack(blocks[:, 4:8], 4, dtype=torch.uint8) | unpack(blocks[:, 2:4], 2, dtype=torch.uint8) << 4
    return _runs(half(blocks, 0) * (scales.float() - 32), look_up(NONLINEAR, planes(blocks[:, 8:], 4, 16)))


def _runs(scales: Tensor, q: Tensor, minima: Tensor | None = None) -> Tensor:
    """Multiply each run of q with its scale, and subtract its minimum."""
    out = in_runs(q, q.shape[-1] // scales.shape[-1]).mul_(scales.unsqueeze(-1))
    return (out if minima is None else out.sub_(minima.unsqueeze(-1))).flatten(1)


def _scales_minima(blocks: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read the 6-bit scales and minima of Q4_K and Q5_K: scales [B, 8], q as given but float32, minima [B, 8].

    The first four scales and minima have a byte each; those bytes' top bits go with the nibbles of the last four bytes.
    """
    scale_bytes, minimum_bytes, nibbles = blocks[:, 4:16].chunk(3, dim=-1)
    scales = torch.cat((scale_bytes & 63, nibbles & 15 | scale_bytes >> 2 & 48), dim=-1)
    minima = torch.cat((minimum_bytes & 63, nibbles >> 4 | minimum_bytes >> 2 & 48), dim=-1)
    return half(blocks, 0) * scales.float(), q.float(), half(blocks, 2) * minima.float()
