"""Linear on Triton: rows times matrices, dense or packed, each read once.

Owns `linear` (the word), `gated` and `gate_mul` (a gate's product, its activation and what it opens, in one kernel), `logits_of`
and `gather_rows` (rows of a packed table). Up to MANY_ROWS rows meet kernels of this file; more take the library's product, over
packed weights that are dequantized a tile at a time. Launch shapes follow from row counts and matrix sizes alone. Refuses to know
layers. Shape letters as in `reference.py`; read `dequant.py` for the inner loops, `quant/gpu_packing.py` for the layout.
"""

# ruff: noqa: RET505  # what branches on a constant needs its `else`: Triton compiles one of the two

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcutter.ops.triton import elementwise
from gemcutter.ops.triton.dequant import (
    INTERPRETED,
    Operand,
    apply_softcap,
    decode_rows,
    gelu,
    multiply_few,
    multiply_many,
    operand,
)
from gemcutter.ops.triton.variant import Variant
from gemcutter.quant import Part, Weight, dequantize
from gemcutter.quant.cpu_layout import BF16, F32, U4, PackedLayout
from gemcutter.quant.cpu_packing import BLOCK_TYPES
from gemcutter.quant.gpu_packing import F4, F8, VECTOR_WORDS, GpuPackedWeight, allocate_gpu_packed, span_of

FEW_ROWS = 2  # up to here products in registers take fewer instructions than the way to the tensor cores
FEW_NARROW_ROWS = 8  # the same, half of it if packed, for a matrix too narrow to fill the chip with tiles for the tensor cores
MANY_ROWS = 64  # up to here every tile of a weight is read once, for all rows
NARROW_MATRIX = 1024
WIDE_MATRIX = 8192  # rows of a matrix from which tiles may be taller and still fill the chip
SCRATCH_ELEMENTS = 32 << 20  # of a packed weight that are dequantized at a time


@triton.jit
def _product(
    x, x_stride, rows, w_row, w_mask, matrix, width,
    R: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, IS_FEW: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    if IS_FEW:
        return multiply_few(x, x_stride, rows, w_row, w_mask, matrix, width, R, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS)
    else:
        row = tl.arange(0, R)[:, None]
        return multiply_many(
            x, row.to(tl.int64) * x_stride, row < rows, w_row, w_mask, matrix, width,
            R, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x, x_stride, rows, out, out_stride, num_out, times, times_stride,
    words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride, width,
    R: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, IS_FEW: tl.constexpr, IS_GATED: tl.constexpr, CAP: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Multiply all rows with F rows of a matrix. Its GELU is multiplied with the product of F more, num_out rows below, where it
    is gated, and with `times` where that is given; it is softcapped into (-CAP, CAP) unless that is 0.
    """
    matrix = (words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride)
    feature = tl.program_id(0) * F + tl.arange(0, F)
    row = tl.arange(0, R)
    w_row, w_mask = feature.to(tl.int64)[:, None], feature[:, None] < num_out
    found = _product(x, x_stride, rows, w_row, w_mask, matrix, width, R, F, BLOCK, IS_FEW, CODES, SCALES, GROUP, OFFSET, HAS_BIAS)
    if IS_GATED:
        found = gelu(found) * _product(
            x, x_stride, rows, w_row + num_out, w_mask, matrix, width,
            R, F, BLOCK, IS_FEW, CODES, SCALES, GROUP, OFFSET, HAS_BIAS,
        )  # fmt: skip
    row, mask = row.to(tl.int64)[:, None], (row[:, None] < rows) & (feature[None, :] < num_out)
    if times is not None:
        found = gelu(found) * tl.load(times + row * times_stride + feature[None, :], mask, 0.0).to(tl.float32)
    if CAP > 0:
        found = apply_softcap(found, CAP)
    tl.store(out + row * out_stride + feature[None, :], found, mask)


@triton.jit(do_not_specialize=["first", "count"])
def _widen_kernel(
    ids, first, count, out, out_stride, scalar,
    words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride, width,
    F: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write rows of a packed matrix as numbers times a scalar: those that ids name, or `first` and up."""
    matrix = (words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride)
    place = tl.program_id(0) * F + tl.arange(0, F)
    w_mask = place[:, None] < count
    if ids is None:
        w_row = (first + place).to(tl.int64)[:, None]
    else:
        w_row = tl.load(ids + place, place < count, 0).to(tl.int64)[:, None]
    out_at = place.to(tl.int64)[:, None] * out_stride
    decode_rows(
        out, out_at, scalar, w_row, w_mask, matrix, width, tl.program_id(1), BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS
    )


# ---- launch shapes ----


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program multiplies: R rows with F matrix rows, BLOCK loads of each at a time."""

    rows: int
    features: int
    block: int
    is_few: bool
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int | bool]:
        """Return the kernels' constants."""
        return {"R": self.rows, "F": self.features, "BLOCK": self.block, "IS_FEW": self.is_few}


def choose_tile(rows: int, features: int, matrix: Operand, dtype: torch.dtype) -> Tile:
    """Choose a tile for so many rows (MANY_ROWS at most) of a dtype and matrix rows.

    Few rows: a thread loads 16 bytes of the matrix (64 of a dense one) at a time, and small tiles leave room for many programs on
    every processor, whose loads are in flight together. More rows: as many stages of loads as shared memory holds; of float32,
    which no tensor core takes unrounded, what registers hold.
    """
    few = FEW_ROWS if features >= NARROW_MATRIX else FEW_NARROW_ROWS // (1 if matrix.is_dense else 2)
    if rows <= few:
        lane = 8 if matrix.is_dense else 4
        warps = min(4, max(1, triton.next_power_of_2(matrix.width) // (32 * lane)))
        tall = 4 if features >= 2 * NARROW_MATRIX else 2 if features >= NARROW_MATRIX else 1
        if INTERPRETED.value:  # where a program costs the same whatever it multiplies
            tall *= 16
        return Tile(triton.next_power_of_2(max(1, rows)), tall, warps * 32 * lane, True, warps, 1)
    padded = max(16, triton.next_power_of_2(rows))
    if dtype == torch.float32:
        return Tile(padded, 16, 16 if matrix.is_dense else VECTOR_WORDS, False, 4, 1)
    tall = 32 if features >= WIDE_MATRIX or padded > 16 else 16
    block = min(128 if matrix.is_dense else 16, max(16, triton.next_power_of_2(matrix.width)))
    if matrix.is_dense:
        return Tile(padded, tall, block, False, 2 if tall == 16 else 4, 3 if padded == 32 else 4)  # none of these spills
    return Tile(padded, tall, block, False, 8 if padded == 64 else 4, 5 if tall == 16 else 3)


# ---- words ----


def linear(x_ND: Tensor, weight: Weight) -> Tensor:
    """Multiply rows with a matrix [F, D], sums in float32, one rounding to x's dtype: [N, F].

    Parts that lie one after the other in memory are one launch. Parts that are packed otherwise are dequantized, tile by tile.
    """
    whole = span_of(weight.parts)
    if whole is not None:
        return _multiply(x_ND, whole, x_ND.new_empty(x_ND.shape[0], weight.rows))
    out = x_ND.new_empty(x_ND.shape[0], weight.rows)
    for part, (start, stop) in zip(weight.parts, weight.edges(), strict=True):
        _multiply(x_ND, part, out[:, start:stop])
    return out


def gated(x_ND: Tensor, weight_in: Weight) -> Tensor:
    """Multiply rows with a gate and an up matrix, stacked as [2 F, D], and give gelu(gate) * up: [N, F]."""
    whole = span_of(weight_in.parts)
    if whole is None or not 0 < x_ND.shape[0] <= MANY_ROWS:
        return elementwise.gelu_mul(linear(x_ND, weight_in))
    out = x_ND.new_empty(x_ND.shape[0], weight_in.rows // 2)
    _launch(x_ND, operand(whole), out, is_gated=True)
    return out


def gate_mul(x_ND: Tensor, gate: Weight, times_NF: Tensor) -> Tensor:
    """Multiply rows with a gate's matrix [F, D], and give gelu(product) * times: [N, F]. The rows of `times` may lie apart."""
    whole = span_of(gate.parts)
    if whole is None or not 0 < x_ND.shape[0] <= MANY_ROWS:
        return elementwise.gate_mul(linear(x_ND, gate), times_NF)
    out = x_ND.new_empty(x_ND.shape[0], gate.rows)
    _launch(x_ND, operand(whole), out, times_NF=times_NF)
    return out


def logits_of(x_RD: Tensor, weight: Weight, cap: float | None) -> Tensor:
    """Multiply rows with the head's matrix [V, D], and softcap the products into (-cap, cap): [R, V] in float32.

    Products of up to MANY_ROWS rows are not rounded in between.
    """
    whole = span_of(weight.parts)
    if whole is None or not 0 < x_RD.shape[0] <= MANY_ROWS:
        return elementwise.softcap(linear(x_RD, weight), cap)
    out = torch.empty(x_RD.shape[0], weight.rows, dtype=torch.float32, device=x_RD.device)
    _launch(x_RD, operand(whole), out, cap=cap)
    return out


def gather_rows(table: GpuPackedWeight, ids_N: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return the rows that ids name times a number, dequantized: [N, columns]."""
    out = torch.empty((ids_N.shape[0], table.num_columns), dtype=dtype, device=ids_N.device)
    _widen(operand(table), ids_N, 0, out, scale)
    return out


def dequantize_rows(matrix: Operand, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return rows start to stop - 1 of a packed matrix (of a stack: of the one tall matrix) as numbers."""
    out = torch.empty((stop - start, matrix.columns), dtype=dtype, device=device)
    _widen(matrix, None, start, out, 1.0)
    return out


def _multiply(x_ND: Tensor, part: Part, out_NF: Tensor) -> Tensor:
    rows = x_ND.shape[0]
    if not rows:
        return out_NF
    if rows <= MANY_ROWS and isinstance(part, Tensor | GpuPackedWeight):
        _launch(x_ND, operand(part), out_NF)
        return out_NF
    if isinstance(part, Tensor) and part.dtype == x_ND.dtype:
        return torch.mm(x_ND, part.t(), out=out_NF)
    step = max(1, SCRATCH_ELEMENTS // part.shape[-1])
    for start in range(0, part.shape[-2], step):
        stop = min(start + step, part.shape[-2])
        torch.mm(x_ND, _widened(part, start, stop, x_ND).t(), out=out_NF[:, start:stop])
    return out_NF


def _widened(part: Part, start: int, stop: int, x_ND: Tensor) -> Tensor:
    if isinstance(part, GpuPackedWeight):
        return dequantize_rows(operand(part), start, stop, x_ND.dtype, x_ND.device)
    tile = part[start:stop] if isinstance(part, Tensor) else dequantize(part.rows(start, stop))
    return tile.to(x_ND.device, x_ND.dtype)


def _launch(
    x_ND: Tensor,
    matrix: Operand,
    out_NF: Tensor,
    *,
    is_gated: bool = False,
    times_NF: Tensor | None = None,
    cap: float | None = None,
) -> None:
    rows, features = out_NF.shape
    tile = choose_tile(rows, features, matrix, x_ND.dtype)
    times = (None, 0) if times_NF is None else (times_NF, times_NF.stride(0))
    _linear_kernel[(triton.cdiv(features, tile.features),)](
        x_ND, x_ND.stride(0), rows, out_NF, out_NF.stride(0), features, *times, *matrix.arguments,
        **tile.constants, **matrix.constants, IS_GATED=is_gated, CAP=cap or 0.0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _widen(matrix: Operand, ids_N: Tensor | None, first: int, out_ND: Tensor, scale: float) -> None:
    if not out_ND.shape[0]:
        return
    block = min(triton.next_power_of_2(matrix.width), 128)
    features = max(1, 512 // block)
    grid = (triton.cdiv(out_ND.shape[0], features), triton.cdiv(matrix.width, block))
    _widen_kernel[grid](
        ids_N, first, out_ND.shape[0], out_ND, out_ND.stride(0), scale, *matrix.arguments,
        F=features, BLOCK=block, **matrix.constants, num_warps=4,
    )  # fmt: skip


# ---- what is compiled ahead of time ----

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


def describe(name: str, kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any], tile: Tile) -> Variant:
    """Describe what a launch with these arguments, tensors without memory among them, would compile."""
    signature, fixed = dict[str, str](), dict[str, Any](constants)
    for argument, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, Tensor):
            signature[argument] = TYPES[value.dtype]
        elif value is None or value == 1:
            fixed[argument] = value
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32" if value % 16 else "i32:16"
    return Variant(kernel, signature, fixed, tile.num_warps, tile.num_stages, name)


def _variants() -> Iterator[Variant]:
    """List the products of E4B: all forms of one matrix, some of those with another course."""
    block, affine = BLOCK_TYPES, PackedLayout(U4, BF16, 64, True)
    forms = {"bf16": None, "Q4_0": block["Q4_0"][0], "Q8_0": block["Q8_0"][0], "affine4g64": affine}
    forms |= {
        "Q4_K": block["Q4_K"][0],
        "Q6_K": block["Q6_K"][0],
        "nvfp4": PackedLayout(F4, F32, 16),
        "fp8": PackedLayout(F8, F32, 10240),
    }
    yield from (_variant("mlp-out", (2560, 10240), *form, rows) for form in forms.items() for rows in (1, 2, 16, 32, 64))
    main = [(form, forms[form]) for form in ("bf16", "Q4_0")]
    yield from (_variant("mlp-in", (10240, 2560), *form, rows, is_gated=True) for form in main for rows in (1, 2, 16, 64))
    yield _variant("mlp-in-narrow", (6144, 1536), "Q4_0", forms["Q4_0"], 16, is_gated=True)  # E2B
    main += [("Q6_K", forms["Q6_K"]), ("Q8_0", forms["Q8_0"])]
    yield from (_variant("head", (262144, 2560), *form, rows) for form in main[:3] for rows in (1, 16, 32))
    yield from (_variant("ple-gate", (256, 2560), *form, rows) for form in main for rows in (1, 4))
    yield _variant("ple-gate", (256, 2560), "bf16", None, 8)
    for rows in (1, 16, 64):  # of 26B-A4B, whose router takes float32
        yield _variant("router", (128, 2816), "bf16", None, rows, dtype=torch.float32)
    yield from (_variant("mlp-out-float32", (2560, 10240), *form, 64, dtype=torch.float32) for form in main[:2])


def _variant(
    place: str, shape: tuple[int, int], form: str, layout: PackedLayout | None, rows: int, is_gated: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Variant:  # fmt: skip
    features, columns = shape
    x, out = (torch.empty((rows, width), dtype=dtype, device="meta") for width in (columns, features))
    lead = (2 * features if is_gated else features,)
    dense = torch.empty((*lead, columns), dtype=torch.bfloat16, device="meta")
    matrix = operand(dense if layout is None else allocate_gpu_packed(layout, lead, columns, "meta", form))
    tile = choose_tile(rows, features, matrix, dtype)
    times, cap = (out, 10752) if place == "ple-gate" else (None, 0), 0.0
    if place == "head":
        out, cap = out.float(), 30.0
    arguments = (x, columns, 3, out, features, features, *times, *matrix.arguments)
    constants = {**tile.constants, "IS_GATED": is_gated, "CAP": cap, **matrix.constants}
    return describe(f"linear-{place}-{form}-{rows}", _linear_kernel, arguments, constants, tile)


VARIANTS = tuple(_variants())
