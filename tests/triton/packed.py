"""Packed weights of every scheme with tame values, for tests of kernels that multiply with them."""

from __future__ import annotations

import torch
from torch import Tensor

from gemcutter.quant import affine
from gemcutter.quant.gguf_blocks import TYPES, Blocks
from gemcutter.quant.microscaling import from_compressed, from_mlx
from gemcutter.quant.packed import Packed
from gemcutter.quant.scaled_int import from_packed, from_values
from tests.unit.test_quant_gguf_blocks import HALVES, spread

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    """Make random bytes."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def small(*shape: int, seed: int = 1) -> Tensor:
    """Make random scales, of both signs."""
    found = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return found * torch.where(random_bytes(*shape, seed=seed) < 100, -0.01, 0.01)


def blocks(name: str, rows: int, columns: int) -> Blocks:
    """Make rows of random blocks whose scales are small."""
    kind = TYPES[name]
    data = random_bytes(rows * columns // kind.values, kind.nbytes)
    for start in HALVES[name]:
        data[:, start : start + 2] = small(len(data), 1, seed=start).half().view(torch.uint8)
    if name == "IQ1_M":
        spread(data, small(len(data)))
    if name in ("MXFP4", "NVFP4"):
        data[:, : 1 if name == "MXFP4" else 4] %= 8
        data[:, : 1 if name == "MXFP4" else 4] += 118 if name == "MXFP4" else 32
    return Blocks(data.view(rows, -1), kind)


def affine_weight(bits: int, group: int, dtype: torch.dtype, rows: int, columns: int) -> Packed:
    """Make an MLX matrix."""
    return affine.quantize(small(rows, columns).to(dtype), bits, group)


def integers(bits: int, group: int, dtype: torch.dtype, rows: int, columns: int) -> Packed:
    """Make a compressed-tensors matrix of packed integers."""
    words = random_bytes(rows, columns * bits // 8).view(torch.int32)
    return from_packed(words, small(rows, columns // group).to(dtype), bits, columns)


def floats(rows: int, columns: int) -> Packed:
    """Make a matrix of 8-bit floats with a scale for each row."""
    found = random_bytes(rows, columns)
    return from_values(torch.where((found & 0x7F) == 0x7F, 0x30, found).view(torch.float8_e4m3fn), small(rows) / 10)


def nvfp4(rows: int, columns: int) -> Packed:
    """Make a matrix of 4-bit floats with 8-bit scales of groups and one of the tensor."""
    scales = (random_bytes(rows, columns // 16) % 8 + 32).view(torch.float8_e4m3fn)
    return from_compressed(random_bytes(rows, columns // 2), scales, torch.tensor([3.7]))


def mxfp8(rows: int, columns: int) -> Packed:
    """Make a matrix of 8-bit floats with powers of two as scales of groups."""
    found = random_bytes(rows, columns)
    words = torch.where((found & 0x7F) == 0x7F, 0x30, found).view(torch.int32)
    return from_mlx(words, random_bytes(rows, columns // 32) % 4 + 118, columns)


MAKERS = {
    **{name: (lambda rows, columns, name=name: blocks(name, rows, columns)) for name in HALVES},
    "affine4g64": lambda rows, columns: affine_weight(4, 64, torch.bfloat16, rows, columns),
    "affine4g32 float32": lambda rows, columns: affine_weight(4, 32, torch.float32, rows, columns),
    "affine6g128": lambda rows, columns: affine_weight(6, 128, torch.float16, rows, columns),
    "affine8g64": lambda rows, columns: affine_weight(8, 64, torch.bfloat16, rows, columns),
    "W4A16g128": lambda rows, columns: integers(4, 128, torch.bfloat16, rows, columns),
    "W8A16, scale of a row": lambda rows, columns: integers(8, columns, torch.bfloat16, rows, columns),
    "fp8": floats,
    "mxfp8": mxfp8,
    "nvfp4": nvfp4,
}
