"""GGUF's block formats: rows of blocks of 32 or 256 values, each with its own scales inside.

Owns `Blocks`, the table of block types under their GGUF names, and quantizers for Q8_0 and Q4_0. Refuses to know files and
names; F32, F16 and BF16 are dense tensors and not found here. Read `gguf_blocks_short.py`, `gguf_blocks_k.py`,
`gguf_blocks_iq.py` and `gguf_blocks_ternary.py` for the bytes of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.quant import gguf_blocks_k, gguf_blocks_short, gguf_blocks_ternary
from gemcutter.quant.gguf_blocks_iq import LEVEL_TYPES
from gemcutter.quant.packed import FLOATS, cut_columns, cut_expert, cut_rows, dtype_name, gather_rows, refuse, stored_bytes


@dataclass(frozen=True, slots=True)
class BlockType:
    """One format: so many values in so many bytes, decoded from uint8 [blocks, nbytes] to float32 [blocks, values]."""

    name: str
    values: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor] | None = None
    scales_at: tuple[int, ...] = ()  # bytes at which a block's float16 scales and minima begin; its codes are always finite

    def row_bytes(self, columns: int) -> int:
        """Count the bytes of a row. Raises ValueError where whole blocks do not fill it."""
        if columns % self.values:
            raise ValueError(f"{self.name}: a multiple of {self.values} columns expected, found {columns}")
        return columns // self.values * self.nbytes


TYPES = {
    each.name: each
    for each in (
        BlockType("Q4_0", 32, 18, gguf_blocks_short.decode_q4_0, gguf_blocks_short.encode_q4_0, scales_at=(0,)),
        BlockType("Q4_1", 32, 20, gguf_blocks_short.decode_q4_1, scales_at=(0, 2)),
        BlockType("Q5_0", 32, 22, gguf_blocks_short.decode_q5_0, scales_at=(0,)),
        BlockType("Q5_1", 32, 24, gguf_blocks_short.decode_q5_1, scales_at=(0, 2)),
        BlockType("Q8_0", 32, 34, gguf_blocks_short.decode_q8_0, gguf_blocks_short.encode_q8_0, scales_at=(0,)),
        BlockType("IQ4_NL", 32, 18, gguf_blocks_short.decode_iq4_nl, scales_at=(0,)),
        BlockType("MXFP4", 32, 17, gguf_blocks_short.decode_mxfp4),
        BlockType("NVFP4", 64, 36, gguf_blocks_short.decode_nvfp4),
        BlockType("Q2_K", 256, 84, gguf_blocks_k.decode_q2_k, scales_at=(80, 82)),
        BlockType("Q3_K", 256, 110, gguf_blocks_k.decode_q3_k, scales_at=(108,)),
        BlockType("Q4_K", 256, 144, gguf_blocks_k.decode_q4_k, scales_at=(0, 2)),
        BlockType("Q5_K", 256, 176, gguf_blocks_k.decode_q5_k, scales_at=(0, 2)),
        BlockType("Q6_K", 256, 210, gguf_blocks_k.decode_q6_k, scales_at=(208,)),
        BlockType("IQ4_XS", 256, 136, gguf_blocks_k.decode_iq4_xs, scales_at=(0,)),
        BlockType("IQ3_S", 256, 110, LEVEL_TYPES["IQ3_S"].decode, scales_at=(0,)),
        BlockType("IQ3_XXS", 256, 98, LEVEL_TYPES["IQ3_XXS"].decode, scales_at=(0,)),
        BlockType("IQ2_S", 256, 82, LEVEL_TYPES["IQ2_S"].decode, scales_at=(0,)),
        BlockType("IQ2_XS", 256, 74, LEVEL_TYPES["IQ2_XS"].decode, scales_at=(0,)),
        BlockType("IQ2_XXS", 256, 66, LEVEL_TYPES["IQ2_XXS"].decode, scales_at=(0,)),
        BlockType("IQ1_M", 256, 56, LEVEL_TYPES["IQ1_M"].decode),
        BlockType("IQ1_S", 256, 50, LEVEL_TYPES["IQ1_S"].decode, scales_at=(0,)),
        BlockType("TQ2_0", 256, 66, gguf_blocks_ternary.decode_tq2_0, scales_at=(64,)),
        BlockType("TQ1_0", 256, 54, gguf_blocks_ternary.decode_tq1_0, scales_at=(52,)),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A matrix whose rows are blocks of one type, one after the other: uint8 [..., rows, bytes of a row]."""

    data: Tensor
    kind: BlockType

    @property
    def scheme(self) -> str:
        """Name the block type."""
        return self.kind.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape."""
        return (*self.data.shape[:-1], self.data.shape[-1] // self.kind.nbytes * self.kind.values)

    @property
    def nbytes(self) -> int:
        """Count the stored bytes."""
        return stored_bytes(self)

    def rows(self, start: int, stop: int) -> Blocks:
        """Return rows start to stop - 1 of every expert without copying."""
        return cut_rows(self, start, stop)

    def columns(self, start: int, stop: int) -> Blocks:
        """Return columns start to stop - 1, whole blocks, without copying."""
        return cut_columns(self, start, stop, self.kind.values)

    def expert(self, index: int) -> Blocks:
        """Return one matrix of a stack without copying."""
        return cut_expert(self, index)

    def gather(self, ids_N: Tensor) -> Blocks:
        """Copy the rows that ids name."""
        return gather_rows(self, ids_N)

    def floats(self) -> list[Tensor]:
        """Return what is stored in floats, [..., rows, blocks] each; nothing where scales have another form."""
        blocks = self.data.view(*self.data.shape[:-1], -1, self.kind.nbytes)
        return [blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0] for at in self.kind.scales_at]

    def dequantize(self) -> Tensor:
        """Compute the values in float32, operation by operation as ggml's reference does."""
        return self.kind.decode(self.data.reshape(-1, self.kind.nbytes)).view(self.shape)


def from_arrays(data: Tensor, name: str, shape: tuple[int, ...]) -> Blocks:
    """Take the stored bytes of a tensor, uint8 in any shape, whose logical shape is [rows, columns] or with experts in front.

    Raises ValueError for an unknown block type, and where bytes and shape do not fit together.
    """
    if name not in TYPES:
        raise ValueError(f"block type: one of {', '.join(TYPES)} expected, found {name}")
    kind, problems = TYPES[name], []
    if len(shape) not in (2, 3):
        raise ValueError(f"{name}: [rows, columns] or [experts, rows, columns] expected, found {list(shape)}")
    stored = (*shape[:-1], kind.row_bytes(shape[-1]))
    if data.dtype != torch.uint8:
        problems.append(f"{name}: bytes (uint8) expected, found {dtype_name(data.dtype)}")
    if data.numel() != math.prod(stored):
        problems.append(f"{name}: {math.prod(stored):,} bytes expected for {list(shape)}, found {data.numel():,}")
    refuse(problems)
    return Blocks(data.view(stored), kind)


def quantize(x: Tensor, name: str) -> Blocks:
    """Quantize values [..., rows, columns] to Q8_0 or Q4_0 as ggml's reference does. Rows do not depend on each other.

    Raises ValueError for other types, for columns that blocks do not fill, and for values that are not finite.
    """
    kind = TYPES.get(name)
    if kind is None or kind.encode is None:
        able = ", ".join(each.name for each in TYPES.values() if each.encode)
        raise ValueError(f"block type: one of {able} expected, found {name}")
    row_bytes = kind.row_bytes(x.shape[-1])
    if x.dtype not in FLOATS or not x.isfinite().all():
        raise ValueError(f"{name}: finite float32, float16 or bfloat16 values expected")
    return Blocks(kind.encode(x.float().reshape(-1, kind.values)).view(*x.shape[:-1], row_bytes), kind)
