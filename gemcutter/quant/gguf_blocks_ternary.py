"""The bytes of GGUF's ternary blocks: 256 values of -1, 0 and 1 around one float16.

Owns what they come apart into and one decoder per type, uint8 [B, bytes] to float32 [B, 256]. Refuses to know panels. Source: the
decoders of ggml, bit for bit. Read `gguf_blocks_k.py` for blocks of 256 with more than one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemcutter.quant.bits import planes
from gemcutter.quant.gguf_blocks_short import half


def codes_tq1_0(blocks: Tensor) -> Tensor:
    """Read base-3 digits, five of a byte and four of the last bytes, plus 1: uint8 [B, 256].

    A byte is a number below 243 scaled to 256, so that times 3 the next digit stands above the byte.
    """
    parts = []
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        scaled = torch.stack([blocks[:, start:stop] * 3**digit for digit in range(digits)], dim=1)  # wraps
        parts.append((scaled.int() * 3 >> 8).to(torch.uint8).flatten(1))
    return torch.cat(parts, dim=-1)


def codes_tq2_0(blocks: Tensor) -> Tensor:
    """Read values plus 1 of two bits each: uint8 [B, 256]."""
    return planes(blocks[:, :64], 2, 32)


def decode_tq1_0(blocks: Tensor) -> Tensor:
    """Compute d * (digit - 1): five digits of a byte [48], four of a byte [4], d."""
    return codes_tq1_0(blocks).float().sub_(1).mul_(half(blocks, 52))


def decode_tq2_0(blocks: Tensor) -> Tensor:
    """Compute d * (q - 1): 2-bit q [64], d. The fourth q, which quantizers do not write, is 2."""
    return codes_tq2_0(blocks).float().sub_(1).mul_(half(blocks, 64))
