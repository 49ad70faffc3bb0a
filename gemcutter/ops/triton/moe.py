"""The mixture of experts on Triton: gated products in, products out, and each row's weighted sum, over dense or packed stacks.

Owns `experts` and what its three ways share. A few rows: every (row, choice) pair is a program of its own, no matter which expert
it meets. Up to 16 rows: every expert looks for its rows itself, and its weights are read once. More: pairs are sorted by expert
into blocks of rows. The host never learns what was chosen, so each way has fixed launch shapes. A row adds its
experts up in the order of its choices. Refuses to know the router. Shape letters as in `reference.py`, with M rows, T choices
of each, P = M * T pairs, B blocks of R pairs; read `dequant.py` for the inner loops.
"""

# ruff: noqa: RET505  # what branches on a constant needs its `else`: Triton compiles one of the two

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcutter.errors import KernelError
from gemcutter.ops.triton.dequant import Operand, gelu, multiply_few, multiply_many, operand
from gemcutter.ops.triton.linear import Tile, choose_tile, describe
from gemcutter.ops.triton.variant import Variant
from gemcutter.quant import Weight
from gemcutter.quant.cpu_layout import F32, PackedLayout
from gemcutter.quant.cpu_packing import BLOCK_TYPES
from gemcutter.quant.gpu_packing import F4, allocate_gpu_packed, span_of

PAIR_ROWS = 4  # up to here few experts meet two rows, and pairs go their own ways
SCAN_ROWS = 16  # up to here one block holds all rows of an expert
COLUMNS = 1024  # of a row that one program adds up
SORT_PAIRS = 1024  # pairs that are looked through at once

# ---- kernels: one pair a program ----


@triton.jit
def _pair_in_kernel(
    x, x_stride, chosen, hidden, num_out, step,
    words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride, width,
    T: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write gelu(gate) * up of one pair, F features, to `hidden` [P, num_out]."""
    matrix = (words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride)
    pair, feature = tl.program_id(1), tl.program_id(0) * F + tl.arange(0, F)
    expert = tl.load(chosen + pair)
    if expert >= 0:
        w_row, w_mask = expert.to(tl.int64) * step + feature.to(tl.int64)[:, None], feature[:, None] < num_out
        row = x + (pair // T).to(tl.int64) * x_stride
        gate = multiply_few(row, 0, 1, w_row, w_mask, matrix, width, 1, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS)
        w_row += num_out
        up = multiply_few(row, 0, 1, w_row, w_mask, matrix, width, 1, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS)
        tl.store(hidden + pair.to(tl.int64) * num_out + feature[None, :], gelu(gate) * up, feature[None, :] < num_out)


@triton.jit
def _pair_out_kernel(
    hidden, chosen, weights, out, num_in, num_out, step,
    words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride, width,
    T: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write F columns of one row: the weighted sum of its experts."""
    matrix = (words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride)
    row, feature = tl.program_id(1), tl.program_id(0) * F + tl.arange(0, F)
    w_mask = feature[:, None] < num_out
    total = tl.zeros([1, F], tl.float32)
    for choice in range(T):
        pair = row * T + choice
        expert = tl.load(chosen + pair)
        if expert >= 0:
            w_row = expert.to(tl.int64) * step + feature.to(tl.int64)[:, None]
            found = multiply_few(
                hidden + pair.to(tl.int64) * num_in, 0, 1, w_row, w_mask, matrix, width,
                1, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS,
            )  # fmt: skip
            total += found * tl.load(weights + pair).to(tl.float32)
    tl.store(out + row.to(tl.int64) * num_out + feature[None, :], total, feature[None, :] < num_out)


# ---- kernels: rows of one expert a program ----


@triton.jit
def _pairs_of(chosen, rows, owners, members, R: tl.constexpr, T: tl.constexpr, T_PADDED: tl.constexpr):
    """Return the expert of this program's block and its pairs [R], -1 where there are fewer."""
    block = tl.program_id(1)
    if members is None:  # the block of an expert is all rows that chose it
        row, choice = tl.arange(0, R)[:, None], tl.arange(0, T_PADDED)[None, :]
        found = tl.load(chosen + row * T + choice, (row < rows) & (choice < T), -1) == block
        return block, tl.max(tl.where(found, row * T + choice, -1), 1)
    else:
        return tl.load(owners + block).to(tl.int32), tl.load(members + block * R + tl.arange(0, R)).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def _block_kernel(
    x, x_stride, chosen, rows, owners, members, out, num_out, step,
    words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride, width,
    R: tl.constexpr, T: tl.constexpr, T_PADDED: tl.constexpr, IS_IN: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write F features of a block's pairs to `out` [P, num_out]: gelu(gate) * up of rows of x, or products of pairs' own rows."""
    expert, pair = _pairs_of(chosen, rows, owners, members, R, T, T_PADDED)
    if tl.max(pair, 0) >= 0:
        matrix = (words, high, scale, bias, fine, fine_bias, word_stride, scale_stride, fine_stride)
        feature = tl.program_id(0) * F + tl.arange(0, F)
        w_row = expert.to(tl.int64) * step + feature.to(tl.int64)[:, None]
        w_mask, x_mask = feature[:, None] < num_out, pair[:, None] >= 0
        x_at = (pair // T if IS_IN else pair).to(tl.int64)[:, None] * x_stride
        found = multiply_many(x, x_at, x_mask, w_row, w_mask, matrix, width, R, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS)
        if IS_IN:
            found = gelu(found) * multiply_many(
                x, x_at, x_mask, w_row + num_out, w_mask, matrix, width,
                R, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS,
            )  # fmt: skip
        at = pair.to(tl.int64)[:, None] * num_out + feature[None, :]
        tl.store(out + at, found, x_mask & (feature[None, :] < num_out))


@triton.jit(do_not_specialize=["pairs"])
def _sort_kernel(chosen, pairs, owners, members, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """List one expert's pairs, block by block.

    Its first block is number (pairs of all experts before) // SIZE + (number of experts before), whatever each of them has: no
    expert fills more blocks than that leaves room for. Pairs without an expert, -1, come before all and are in no block.
    """
    expert, lane = tl.program_id(0), tl.arange(0, CHUNK)
    before = 0
    for start in range(0, pairs, CHUNK):
        found = tl.load(chosen + start + lane, start + lane < pairs, expert)
        before += tl.sum((found < expert).to(tl.int32), 0)
    first, done = before // SIZE + expert, 0
    for start in range(0, pairs, CHUNK):
        is_mine = tl.load(chosen + start + lane, start + lane < pairs, -1) == expert
        place = done + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(members + first * SIZE + place, start + lane, is_mine)
        tl.store(owners + first + place // SIZE, tl.zeros_like(lane) + expert, is_mine & (place % SIZE == 0))
        done += tl.sum(is_mine.to(tl.int32), 0)


@triton.jit
def _sum_kernel(found, chosen, weights, out, size, T: tl.constexpr, BLOCK: tl.constexpr):
    """Add the weighted products of a row's pairs up; nothing was computed of those without an expert."""
    row, lane = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(T):
        there = tl.where(tl.load(chosen + row * T + choice) >= 0, size, 0)
        part = tl.load(found + (row * T + choice) * size + lane, lane < there, 0.0).to(tl.float32)
        total += part * tl.load(weights + row * T + choice).to(tl.float32)
    tl.store(out + row * size + lane, total, lane < size)


# ---- the word ----


def experts(x_MD: Tensor, weights_MT: Tensor, chosen_MT: Tensor, w_in: Weight, w_out: Weight) -> Tensor:
    """Return each row's sum of its chosen experts' outputs, weighted: [M, D].

    An expert multiplies with its gate and up matrices, [2 F, D] of `w_in`, and with its [D, F] of `w_out`; -1 is no expert, and
    adds nothing. Raises KernelError where the parts of a stack don't lie side by side, dense or packed.
    """
    gates, outs = _stack("gate and up", w_in), _stack("out", w_out)
    if not x_MD.shape[0]:
        return torch.empty_like(x_MD)
    weights_MT, chosen_MT = weights_MT.contiguous(), chosen_MT.contiguous()
    if x_MD.shape[0] <= PAIR_ROWS:
        return _by_pair(x_MD, weights_MT, chosen_MT, gates, outs)
    return _by_expert(x_MD, weights_MT, chosen_MT, gates, outs, w_in.parts[0].shape[0])


def _stack(name: str, weight: Weight) -> Operand:
    whole = span_of(weight.parts)
    if whole is None:
        raise KernelError(f"experts: {name} matrices in one stack, dense or packed, expected, found {weight.stored} ones apart")
    return operand(whole)


def _by_pair(x_MD: Tensor, weights_MT: Tensor, chosen_MT: Tensor, gates: Operand, outs: Operand) -> Tensor:
    (rows, choices), width = chosen_MT.shape, gates.rows // 2
    hidden, out = x_MD.new_empty(rows * choices, width), torch.empty_like(x_MD, memory_format=torch.contiguous_format)
    tile, grid = _pair_tile(width, rows * choices, gates)
    _pair_in_kernel[grid](
        x_MD, x_MD.stride(0), chosen_MT, hidden, width, gates.step, *gates.arguments, **_constants(tile, choices, gates)
    )
    tile, grid = _pair_tile(outs.rows, rows, outs)
    _pair_out_kernel[grid](
        hidden, chosen_MT, weights_MT, out, width, outs.rows, outs.step, *outs.arguments, **_constants(tile, choices, outs)
    )
    return out


def _pair_tile(features: int, count: int, matrix: Operand) -> tuple[Tile, tuple[int, int]]:
    """Choose a tile as for one matrix with the features of all programs' pairs."""
    tile = choose_tile(1, features * count, matrix, torch.float32)  # a single row has no use for the tensor cores
    return tile, (triton.cdiv(features, tile.features), count)


def _by_expert(
    x_MD: Tensor, weights_MT: Tensor, chosen_MT: Tensor, gates: Operand, outs: Operand, num_experts: int
) -> Tensor:  # fmt: skip
    (rows, choices), width = chosen_MT.shape, gates.rows // 2
    block = block_rows(rows * choices, num_experts)
    owners_B, members_BR = (None, None) if rows <= SCAN_ROWS else list_blocks(chosen_MT, num_experts, block)
    num_blocks = num_experts if owners_B is None else owners_B.shape[0]
    hidden, found = x_MD.new_empty(rows * choices, width), x_MD.new_empty(rows * choices, outs.rows)
    for is_in, source, target, matrix in ((True, x_MD, hidden, gates), (False, hidden, found, outs)):
        features = target.shape[1]
        tile = replace(choose_tile(max(block, SCAN_ROWS), features * num_experts, matrix, x_MD.dtype), rows=block)
        _block_kernel[(triton.cdiv(features, tile.features), num_blocks)](
            source, source.stride(0), chosen_MT, rows, owners_B, members_BR, target, features, matrix.step, *matrix.arguments,
            R=block, T_PADDED=triton.next_power_of_2(choices), IS_IN=is_in, **_constants(tile, choices, matrix),
        )  # fmt: skip
    out = torch.empty_like(x_MD, memory_format=torch.contiguous_format)
    _sum_kernel[(rows, triton.cdiv(outs.rows, COLUMNS))](found, chosen_MT, weights_MT, out, outs.rows, T=choices, BLOCK=COLUMNS)
    return out


def _constants(tile: Tile, choices: int, matrix: Operand) -> dict[str, Any]:
    shape = {"T": choices, "F": tile.features, "BLOCK": tile.block, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {**shape, **matrix.constants}


def block_rows(pairs: int, num_experts: int) -> int:
    """Choose how many rows of an expert are multiplied at once, from how many it has on average."""
    return 64 if pairs > 64 * num_experts else 32 if pairs > 16 * num_experts else 16


def list_blocks(chosen_MT: Tensor, num_experts: int, size: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert into blocks of `size`: each block's expert [B], and its pairs [B, size], -1 where there are fewer.

    B is enough for any choice; a block left over has no pairs, and its expert may be anything. Pairs of an expert keep order.
    """
    pairs, device = chosen_MT.numel(), chosen_MT.device
    owners_B = torch.empty(pairs // size + num_experts, dtype=torch.int32, device=device)
    members_BR = torch.full((owners_B.shape[0], size), -1, dtype=torch.int32, device=device)
    _sort_kernel[(num_experts,)](chosen_MT, pairs, owners_B, members_BR, SIZE=size, CHUNK=SORT_PAIRS, num_warps=4)
    return owners_B, members_BR


# ---- what is compiled ahead of time ----


def _variants() -> Iterator[Variant]:
    """List the products of 26B-A4B's experts."""
    hidden, width, num_experts, choices = 2816, 704, 128, 8
    for form, layout in (("bf16", None), ("Q4_0", BLOCK_TYPES["Q4_0"][0]), ("nvfp4", PackedLayout(F4, F32, 16))):
        x, inner = (torch.empty(8, size, dtype=torch.bfloat16, device="meta") for size in (hidden, width))
        shapes = ((num_experts, 2 * width, hidden), (num_experts, hidden, width))
        gates, outs = (
            operand(x.new_empty(shape) if layout is None else allocate_gpu_packed(layout, shape[:2], shape[2], "meta", form))
            for shape in shapes
        )
        chosen, weights = torch.empty(8, dtype=torch.int64, device="meta"), x.float()
        tile, _ = _pair_tile(width, choices, gates)
        given = (x, hidden, chosen, inner, width, gates.step, *gates.arguments)
        yield _variant(f"experts-in-{form}-1", _pair_in_kernel, given, tile, gates)
        tile, _ = _pair_tile(hidden, 1, outs)
        given = (inner, chosen, weights, x, width, hidden, outs.step, *outs.arguments)
        yield _variant(f"experts-out-{form}-1", _pair_out_kernel, given, tile, outs)
        blocks = torch.empty(8, dtype=torch.int32, device="meta")
        for rows, lists in ((16, (None, None)), (32, (blocks, blocks)), (64, (blocks, blocks))):
            for is_in, source, target, matrix in ((True, x, inner, gates), (False, inner, x, outs)):
                features = target.shape[1]
                tile = choose_tile(rows, features * num_experts, matrix, x.dtype)
                given = (source, source.shape[1], chosen, 5, *lists, target, features, matrix.step, *matrix.arguments)
                more = {"R": rows, "T_PADDED": choices, "IS_IN": is_in}
                name = f"experts-{'in' if is_in else 'out'}-{form}-{rows}"
                yield _variant(name, _block_kernel, given, tile, matrix, more)


def _variant(
    name: str, kernel: Any, given: tuple[Any, ...], tile: Tile, matrix: Operand, more: dict[str, Any] | None = None
) -> Variant:  # fmt: skip
    constants = {"T": 8, "F": tile.features, "BLOCK": tile.block, **(more or {}), **matrix.constants}
    return describe(name, kernel, given, constants, tile)


VARIANTS = tuple(_variants())
