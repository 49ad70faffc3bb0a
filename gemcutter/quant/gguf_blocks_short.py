"""The bytes of GGUF's short blocks: 32 values (64 in NVFP4) around one or two scales.

Owns one decoder per type, uint8 [B, bytes] to float32 [B, values], and the encoders of Q8_0 and Q4_0. B blocks are computed
at once. Source: the decoders of ggml, whose order of operations is kept, so that results are equal bit for bit. Read
`gguf_blocks_k.py` for blocks of 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemcutter.quant.bits import E2M1_DOUBLED, float8, halves, in_runs, look_up, planes, unpack

# IQ4_NL's sixteen levels, denser around zero.
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(blocks: Tensor, start: int) -> Tensor:
    """Read the float16 at a byte offset as float32, [B, 1]."""
    return halves(blocks, start).float()


def decode_q4_0(blocks: Tensor) -> Tensor:
    """Compute d * (q - 8), 4 bits."""
    return planes(blocks[:, 2:], 4, 16).float().sub_(8).mul_(half(blocks, 0))


def decode_q4_1(blocks: Tensor) -> Tensor:
    """Compute d * q + m, 4 bits."""
    return planes(blocks[:, 4:], 4, 16).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def decode_q5_0(blocks: Tensor) -> Tensor:
    """Compute d * (q - 16), 4 bits and a fifth."""
    return _five_bits(blocks[:, 2:]).sub_(16).mul_(half(blocks, 0))


def decode_q5_1(blocks: Tensor) -> Tensor:
    """Compute d * q + m, 4 bits and a fifth."""
    return _five_bits(blocks[:, 4:]).mul_(half(blocks, 0)).add_(half(blocks, 2))


def decode_q8_0(blocks: Tensor) -> Tensor:
    """Compute d * q, signed bytes."""
    return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def decode_iq4_nl(blocks: Tensor) -> Tensor:
    """Compute d * level, 4-bit numbers of levels."""
    return look_up(NONLINEAR, planes(blocks[:, 2:], 4, 16)).mul_(half(blocks, 0))


def decode_mxfp4(blocks: Tensor) -> Tensor:
    """Compute 2^(e - 127) * E2M1; unlike OCP's E8M0, e = 255 is finite here."""
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return look_up(E2M1_DOUBLED, planes(blocks[:, 1:], 4, 16)).mul_(bits.view(torch.float32))


def decode_nvfp4(blocks: Tensor) -> Tensor:
    """Compute E4M3 * E2M1 in four runs of 16; the sign of a scale means nothing, 0x7F is zero instead of NaN, and 0xFF is 480."""
    scales = float8(blocks[:, :4] & 0x7F, torch.float8_e4m3fn).nan_to_num_(480).mul_(0.5)
    scales = torch.where(blocks[:, :4] == 0x7F, 0.0, scales)
    values = look_up(E2M1_DOUBLED, planes(blocks[:, 4:], 4, 8))
    return in_runs(values, 16).mul_(scales.unsqueeze(-1)).flatten(1)


def encode_q8_0(values: Tensor) -> Tensor:
    """Scale the largest magnitude to 127 and round halves away from zero; float32 [B, 32] to uint8 [B, 34]."""
    scale = values.abs().amax(-1, keepdim=True) / 127
    scaled = values * _inverse(scale)
    whole = scaled.trunc()
    codes = whole + ((scaled - whole) * 2).trunc()
    return torch.cat((scale.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)), dim=-1)


def encode_q4_0(values: Tensor) -> Tensor:
    """Encode the first value of the largest magnitude the code 0, which stands for -8; float32 [B, 32] to uint8 [B, 18]."""
    scale = values.gather(-1, values.abs().argmax(-1, keepdim=True)) / -8
    codes = (values * _inverse(scale) + 8.5).trunc().clamp_(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    return torch.cat((scale.half().view(torch.uint8), low | high << 4), dim=-1)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, but 0 where that overflows: such a scale is 0 as float16, whatever the codes."""
    inverse = 1 / scale
    return torch.where(inverse.isinf(), 0.0, inverse)


def _five_bits(packed: Tensor) -> Tensor:
    """Join 32 fifth bits, in the first 4 bytes, with their nibbles."""
    return (planes(packed[:, 4:], 4, 16) | unpack(packed[:, :4], 1, dtype=torch.uint8) << 4).float()
