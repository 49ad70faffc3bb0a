"""Small integers and floats in bytes: bit streams, planes of bits, tables of values.

Owns how numbers of less than a byte lie in bytes, whichever scheme they belong to; every function works on any leading axes, in
a few whole-tensor operations. Refuses to know scales and shapes of weights. Read `affine.py` and `gguf_blocks_short.py` for use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by 4-bit code
E2M1_DOUBLED = tuple(int(2 * value) for value in E2M1)  # as integers; scales are halved in return


def halves(blocks: Tensor, start: int) -> Tensor:
    """Read the float16 at a byte offset of blocks, uint8 [B, bytes]: [B, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def in_runs(x: Tensor, width: int) -> Tensor:
    """View the last axis as runs of `width`: [..., n * width] as [..., n, width]."""
    return x.view(*x.shape[:-1], x.shape[-1] // width, width)  # not -1, which is undefined for a tensor without elements


def as_bytes(x: Tensor) -> Tensor:
    """View the last axis as uint8, copied only where its items do not lie side by side."""
    return (x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def unpack(packed: Tensor, bits: int, span_bytes: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read unsigned values of 1 to 8 bits from bytes, lowest bits first: uint8 [..., bytes] to [..., values] of `dtype`.

    Values follow each other without gaps, unless `span_bytes` says in how many bytes whole values lie: 4 for 32-bit words that
    no value straddles, their top bits unused. Bytes that do not fill the last span are completed with zeros.
    """
    span = span_bytes or math.lcm(bits, 8) // 8
    missing = -packed.shape[-1] % span
    lanes = in_runs(pad(packed, (0, missing)) if missing else packed, span)
    out = torch.empty((*lanes.shape[:-1], span * 8 // bits), dtype=dtype, device=packed.device)
    mask = (1 << bits) - 1
    for lane in range(out.shape[-1]):
        byte, shift = divmod(lane * bits, 8)
        value = lanes[..., byte] >> shift
        if shift + bits > 8:
            value = value | lanes[..., byte + 1] << (8 - shift)
        out[..., lane] = value & mask
    return out.flatten(-2)


def pack(values: Tensor, bits: int) -> Tensor:
    """Write unsigned values of 1 to 8 bits as a bit stream, lowest bits first: uint8 [..., values] to [..., bytes].

    The number of values must fill whole bytes together: a multiple of 8 is always enough.
    """
    span = math.lcm(bits, 8) // 8
    lanes = in_runs(values, span * 8 // bits)
    out = values.new_zeros((*lanes.shape[:-1], span))
    for lane in range(lanes.shape[-1]):
        byte, shift = divmod(lane * bits, 8)
        out[..., byte] |= lanes[..., lane] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= lanes[..., lane] >> (8 - shift)
    return out.flatten(-2)


def planes(packed: Tensor, bits: int, width: int) -> Tensor:
    """Read values of 1, 2 or 4 bits that lie in planes: the lowest bits of `width` bytes, then their next bits, and so on.

    uint8 [..., bytes] to uint8 [..., values]; each run of `width` bytes is complete before the next begins.
    """
    runs = in_runs(packed, width)
    out = packed.new_empty((*runs.shape[:-1], 8 // bits, width))
    for plane in range(8 // bits):
        out[..., plane, :] = runs >> plane * bits & (1 << bits) - 1
    return out.flatten(-3)


def look_up(table: Sequence[float], codes: Tensor) -> Tensor:
    """Replace codes by the float32 values that a table has for them, in the shape of `codes`."""
    values = torch.tensor(table, dtype=torch.float32, device=codes.device)
    return values.index_select(0, codes.flatten().int()).view(codes.shape)


def float8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes as 8-bit floats of `dtype`, as float32."""
    return look_up(_float8_values(dtype), codes)  # on CPU a table is several times as fast as torch's conversion


@cache
def _float8_values(dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(torch.arange(256, dtype=torch.uint8).view(dtype).float().tolist())
