"""Products of a tile on Triton: some rows of the residual stream with some rows of one matrix, dense or packed.

Owns what the kernels of `linear.py` and `moe.py` share: `multiply_few` and `multiply_many`, which run inside
kernels and give float32 sums, and `Operand`, a matrix as those kernels take it. Few rows multiply in registers, in float32, and
nothing is rounded; more rows multiply on the tensor cores, for which packed weights are rounded to the rows' dtype. Weights are
read once, 16 bytes a thread. Refuses to know launch shapes. Shape letters as in `reference.py`, with R rows of a tile, F rows of
the matrix, W words, B columns.

A packed matrix is read as `quant/gpu_packing.py` lays it out: for each k, a tile [F, W] of words holds a tile of codes whose
columns are those of one tile [R, W] of x. A code becomes a float without a conversion: its bits are put into the mantissa of
2^23.
"""

# What branches on a constant needs its `else`, of which Triton compiles one; and it knows no starred tuples.
# ruff: noqa: RET505, RUF005

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from gemcutter.quant.cpu_layout import S8, SUPER16, SUPER32
from gemcutter.quant.gpu_packing import VECTOR_WORDS, GpuPackedWeight

DENSE = -1  # in place of a kind of codes
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's interpreter, which takes bfloat16 products for integers

# Where the kernels' arguments stand in the tuple `matrix`, which `Operand.arguments` fills but for its last.
WORDS, HIGH, SCALE, BIAS, FINE, FINE_BIAS, WORD_STRIDE, SCALE_STRIDE, FINE_STRIDE = (tl.constexpr(index) for index in range(9))

# ---- inside kernels: codes and scales ----


@triton.jit
def _decode(words, high, K: tl.constexpr, CODES: tl.constexpr, OFFSET: tl.constexpr):
    """Return code K of every word plus OFFSET, as float32, times 1 / `_unit`."""
    if CODES == 4:  # 8-bit floats are half floats whose exponents are 8 too small
        byte = words >> (8 * K)
        return _half(((byte & 128) << 8) | ((byte & 127) << 7))
    elif CODES == 3:  # 4-bit ones are doubled here, and 15 too small
        code = words >> (4 * K)
        return _half(((code & 8) << 12) | ((code & 7) << 9))
    elif CODES == 2:
        bits = ((words >> (16 * (K // 2))) & (255 << (8 * (K % 2)))) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - (8388608.0 - OFFSET * (1 << (8 * (K % 2))))
    else:
        SHIFT: tl.constexpr = 4 * (K % 4)
        bits = ((words >> (16 * (K // 4))) & (15 << SHIFT)) | 0x4B000000
        if CODES == 1:
            upper = (high >> (8 * (K // 4))) << (SHIFT // 2 + 4)
            bits = bits | (upper & (3 << (SHIFT + 4)))
        return bits.to(tl.float32, bitcast=True) - (8388608.0 - OFFSET * (1 << SHIFT))


@triton.jit
def _half(bits):
    """Read the lower 16 bits as a half float."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _times_unit(values, K: tl.constexpr, CODES: tl.constexpr):
    """Multiply with what `_decode` leaves out, a power of two."""
    if CODES == 4:
        return values * 256.0
    elif CODES == 3:
        return values * 32768.0
    elif CODES == 2:
        return values * (1.0 / (1 << (8 * (K % 2))))
    else:
        return values * (1.0 / (1 << (4 * (K % 4))))


@triton.jit
def _codes(matrix, w_row, word, mask, CODES: tl.constexpr):
    """Load words of rows [F, 1] at [1, W], and the upper two bits of codes that have six."""
    at = w_row * matrix[WORD_STRIDE] * 4 + word
    codes = tl.load(matrix[WORDS] + at, mask, 0)
    if CODES == 1:
        return codes, tl.load(matrix[HIGH] + tl.max_contiguous(at, [1, 4]), mask, 0).to(
            tl.int32
        )  # as many a thread as of the words
    else:
        return codes, codes


@triton.jit
def _scales(matrix, w_row, column, mask, SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Load the scales, and the biases (zeros where there are none), of rows [F, 1] at columns [1, B].

    A thread takes one of a run at a time, whatever lies beside it, so that scales come to the thread that has their codes.
    """
    if SCALES >= 3:  # of super-blocks, with 8-bit factors
        at = tl.max_contiguous(w_row * matrix[SCALE_STRIDE] + column // 256, [1, 1])
        fine_at = tl.max_contiguous(w_row * matrix[FINE_STRIDE] + column // GROUP, [1, 1])
        s = tl.load(matrix[SCALE] + at, mask, 0.0).to(tl.float32) * tl.load(matrix[FINE] + fine_at, mask, 0).to(tl.float32)
        if HAS_BIAS:
            least = tl.load(matrix[BIAS] + at, mask, 0.0).to(tl.float32)
            return s, -least * tl.load(matrix[FINE_BIAS] + fine_at, mask, 0).to(tl.float32)
    else:
        at = tl.max_contiguous(w_row * matrix[SCALE_STRIDE] + column // GROUP, [1, 1])
        s = tl.load(matrix[SCALE] + at, mask, 0.0).to(tl.float32)
        if HAS_BIAS:
            return s, tl.load(matrix[BIAS] + at, mask, 0.0).to(tl.float32)
    return s, tl.zeros_like(s)


# ---- inside kernels: few rows, in registers ----
#
# All tiles of a step through the columns lie in registers alike, a row of x as a row of the matrix, so that nothing is exchanged
# between threads until the sums are made. For that rows of x are taken one by one, and each has sums of its own.


@triton.jit
def _row(x, x_stride, rows, r: tl.constexpr, column, is_there):
    """Load row r of x at columns [1, B], in float32; there is a first row."""
    if r > 0:
        is_there = is_there & (tl.full([1, 1], r, tl.int32) < rows)
    return tl.load(x + r * x_stride + column, is_there, 0.0).to(tl.float32)


@triton.jit
def _in_fours(values, F: tl.constexpr, W: tl.constexpr):
    """Sum each vector of a tile [F, W]."""
    return tl.sum(tl.reshape(values, [F, W // 4, 4]), -1)


@triton.jit
def _collect(totals, R: tl.constexpr, F: tl.constexpr):
    """Add the sums [F, B] of each row up: [R, F]."""
    found = tl.zeros([R, F], tl.float32)
    for r in tl.static_range(R):
        found = tl.where(tl.arange(0, R)[:, None] == r, tl.sum(totals[r], 1)[None, :], found)
    return found


@triton.jit
def _zeros(R: tl.constexpr, F: tl.constexpr, B: tl.constexpr):
    """Begin the sums [F, B] of each row."""
    totals = (tl.zeros([F, B], tl.float32),)
    for _ in tl.static_range(R - 1):
        totals = totals + (tl.zeros([F, B], tl.float32),)  # type: ignore[assignment]
    return totals


@triton.jit
def _few_dense(x, x_stride, rows, w_row, w_mask, matrix, columns, R: tl.constexpr, F: tl.constexpr, B: tl.constexpr):
    totals = _zeros(R, F, B // 8)
    for start in range(0, columns, B):
        column = start + tl.arange(0, B)[None, :]
        w = tl.load(matrix[WORDS] + w_row * matrix[WORD_STRIDE] + column, w_mask & (column < columns), 0.0).to(tl.float32)
        added = ()
        for r in tl.static_range(R):
            dots = tl.reshape(_row(x, x_stride, rows, r, column, column < columns) * w, [F, B // 8, 8])
            added = added + (totals[r] + tl.sum(dots, -1),)  # type: ignore[assignment]
        totals = added
    return _collect(totals, R, F)


@triton.jit
def _few_packed(
    x, x_stride, rows, w_row, w_mask, matrix, vectors,
    R: tl.constexpr, F: tl.constexpr, W: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = 4 if CODES == 2 or CODES == 4 else 8  # codes of a word
    PARTS: tl.constexpr = 2 if COUNT == 8 and GROUP == 16 else 1  # groups of a vector
    lane, fours = tl.arange(0, W)[None, :], tl.arange(0, W // 4)[None, :]
    place = lane // 4 * (4 * COUNT) + lane % 4
    totals = _zeros(R, F, W // 4)
    for start in range(0, vectors * 4, W):
        is_there, is_vector = start + lane < vectors * 4, start // 4 + fours < vectors
        codes, upper = _codes(matrix, w_row, start + lane, w_mask & is_there, CODES)
        for part in tl.static_range(PARTS):
            column = (start // 4 + fours) * (4 * COUNT) + 16 * part
            s, b = _scales(matrix, w_row, column, w_mask & is_vector, SCALES, GROUP, HAS_BIAS)
            dots, sums = _zeros(R, F, W), _zeros(R, 1, W)
            for k in tl.static_range(part * (COUNT // PARTS), (part + 1) * (COUNT // PARTS)):
                w = _decode(codes, upper, k, CODES, OFFSET)
                next_dots, next_sums = (), ()
                for r in tl.static_range(R):
                    row = _row(x, x_stride, rows, r, start * COUNT + place + 4 * k, is_there)
                    next_dots = next_dots + (tl.fma(_times_unit(row, k, CODES), w, dots[r]),)  # type: ignore[assignment]
                    next_sums = next_sums + (sums[r] + row,)  # type: ignore[assignment]
                dots, sums = next_dots, next_sums
            added = ()
            for r in tl.static_range(R):
                total = tl.fma(_in_fours(dots[r], F, W), s, totals[r])
                added = added + (tl.fma(_in_fours(sums[r], 1, W), b, total) if HAS_BIAS else total,)  # type: ignore[assignment]
            totals = added
    return _collect(totals, R, F)


# ---- inside kernels: more rows, on the tensor cores ----


@triton.jit
def dot(rows, w, total):
    """Add rows [R, B] times w [F, B] to float32 sums [R, F]."""
    if INTERPRETED:
        return tl.dot(rows.to(tl.float32), tl.trans(w.to(tl.float32)), total, input_precision="ieee")
    else:
        return tl.dot(rows, tl.trans(w), total, input_precision="ieee")


@triton.jit
def _many_dense(x, x_at, x_mask, w_row, w_mask, matrix, columns, R: tl.constexpr, F: tl.constexpr, B: tl.constexpr):
    total = tl.zeros([R, F], tl.float32)
    for start in range(0, columns, B):
        column = start + tl.arange(0, B)[None, :]
        w = tl.load(matrix[WORDS] + w_row * matrix[WORD_STRIDE] + column, w_mask & (column < columns), 0.0).to(x.dtype.element_ty)
        rows = tl.load(x + x_at + column, x_mask & (column < columns), 0.0)
        total = dot(rows, w, total)
    return total


@triton.jit
def _many_packed(
    x, x_at, x_mask, w_row, w_mask, matrix, vectors,
    R: tl.constexpr, F: tl.constexpr, W: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = 4 if CODES == 2 or CODES == 4 else 8
    PARTS: tl.constexpr = 2 if COUNT == 8 and GROUP == 16 else 1
    lane = tl.arange(0, W)[None, :]
    first = lane // 4 * (4 * COUNT)
    place = tl.arange(0, COUNT * W)[None, :]  # code by code, as the planes are joined below
    place = place % W // 4 * (4 * COUNT) + place // W * 4 + place % 4
    total = tl.zeros([R, F], tl.float32)
    for start in range(0, vectors * 4, W):
        is_there = start + lane < vectors * 4
        codes, upper = _codes(matrix, w_row, start + lane, w_mask & is_there, CODES)
        planes = ()
        for part in tl.static_range(PARTS):
            s, b = _scales(matrix, w_row, start * COUNT + first + 16 * part, w_mask & is_there, SCALES, GROUP, HAS_BIAS)
            for k in tl.static_range(part * (COUNT // PARTS), (part + 1) * (COUNT // PARTS)):
                w = _times_unit(_decode(codes, upper, k, CODES, OFFSET), k, CODES) * s + b
                planes = planes + (w.to(x.dtype.element_ty),)  # type: ignore[assignment]
        column = tl.max_contiguous(tl.multiple_of(start * COUNT + place, [1, 4]), [1, 4])
        rows = tl.load(x + x_at + column, x_mask & (column < vectors * (4 * COUNT)), 0.0)
        total = dot(rows, _join(planes, F, W, COUNT), total)
    return total


@triton.jit
def _join(planes, F: tl.constexpr, W: tl.constexpr, COUNT: tl.constexpr):
    """Lay tiles [F, W] side by side: [F, COUNT * W]."""
    if COUNT == 4:
        joined = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
    else:
        even = tl.join(tl.join(planes[0], planes[4]), tl.join(planes[2], planes[6]))
        odd = tl.join(tl.join(planes[1], planes[5]), tl.join(planes[3], planes[7]))
        joined = tl.join(even, odd)
    return tl.reshape(tl.trans(tl.reshape(joined, [F, W, COUNT]), 0, 2, 1), [F, COUNT * W])


@triton.jit
def multiply_few(
    x, x_stride, rows, w_row, w_mask, matrix, width,
    R: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Multiply the first rows of x, R at most, with F rows `w_row` [F, 1] of a matrix: [R, F] in float32."""
    if CODES == -1:
        return _few_dense(x, x_stride, rows, w_row, w_mask, matrix, width, R, F, BLOCK)
    else:
        return _few_packed(x, x_stride, rows, w_row, w_mask, matrix, width, R, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS)


@triton.jit
def multiply_many(
    x, x_at, x_mask, w_row, w_mask, matrix, width,
    R: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Multiply R rows of x, which begin at `x_at` [R, 1], with F rows `w_row` [F, 1] of a matrix: [R, F] in float32."""
    if CODES == -1:
        return _many_dense(x, x_at, x_mask, w_row, w_mask, matrix, width, R, F, BLOCK)
    else:
        return _many_packed(x, x_at, x_mask, w_row, w_mask, matrix, width, R, F, BLOCK, CODES, SCALES, GROUP, OFFSET, HAS_BIAS)


@triton.jit
def decode_rows(
    out, out_at, scalar, w_row, w_mask, matrix, vectors, block,
    W: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write block number `block`, of W words, of packed rows `w_row` [F, 1] as numbers times a scalar, at `out_at` [F, 1]."""
    COUNT: tl.constexpr = 4 if CODES == 2 or CODES == 4 else 8
    word = block * W + tl.arange(0, W)[None, :]
    mask = w_mask & (word < vectors * 4)
    codes, upper = _codes(matrix, w_row, word, mask, CODES)
    for k in tl.static_range(COUNT):
        column = word // 4 * (4 * COUNT) + 4 * k + word % 4
        s, b = _scales(matrix, w_row, column, mask, SCALES, GROUP, HAS_BIAS)
        values = _times_unit(_decode(codes, upper, k, CODES, OFFSET), k, CODES) * s + b
        tl.store(out + out_at + column, values * scalar, mask)


@triton.jit
def gelu(x):
    """Compute the tanh-GELU: x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def apply_softcap(x, cap):
    """Compute cap * tanh(x / cap), without overflow."""
    small = tl.exp(-2.0 / cap * tl.abs(x))
    capped = cap * (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -capped, capped)


# ---- a matrix as kernels take it ----


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix, or a stack of them as one tall matrix: the kernels' arguments, and their constants by name.

    `arguments` are words (or the dense matrix), upper bits, scales, biases, fine scales, fine biases; how far rows lie apart in
    the first, in scales and in fine scales; and how wide a row is. Words count in vectors of 16 bytes.
    """

    arguments: tuple[Tensor | int | None, ...]
    constants: Mapping[str, int | bool]
    rows: int  # of one matrix
    step: int  # rows from one matrix of a stack to the next
    columns: int

    @property
    def is_dense(self) -> bool:
        """Return whether no code needs decoding."""
        return self.constants["CODES"] == DENSE

    @property
    def width(self) -> int:
        """Count the loads of a row: columns, or words."""
        width = self.arguments[-1]
        assert isinstance(width, int)
        return width if self.is_dense else width * VECTOR_WORDS


def operand(part: Tensor | GpuPackedWeight) -> Operand:
    """Describe a dense or a packed matrix, or a stack of them; valid as long as it lives."""
    *experts, rows, columns = part.shape
    first = part if isinstance(part, Tensor) else part.codes
    step = first.stride(0) // first.stride(-2) if experts else rows
    if isinstance(part, Tensor):
        constants = {"CODES": DENSE, "SCALES": 0, "GROUP": 0, "OFFSET": 0, "HAS_BIAS": False}
        return Operand((part, None, None, None, None, None, part.stride(-2), 0, 0, columns), constants, rows, step, columns)
    form, arrays = part.layout, list(part.arrays)
    is_super, has_bias = form.scales in (SUPER32, SUPER16), form.has_bias or form.scales == SUPER32
    scale, bias = arrays.pop(0), arrays.pop(0) if has_bias else None
    fine, fine_bias = (arrays.pop(0), arrays.pop(0) if has_bias else None) if is_super else (None, None)
    constants = {
        "CODES": form.codes,
        "SCALES": form.scales,
        "GROUP": form.group,
        "OFFSET": form.offset - 128 if form.codes == S8 else form.offset,
        "HAS_BIAS": has_bias,
    }
    strides = (first.stride(-2) // VECTOR_WORDS, scale.stride(-2), 0 if fine is None else fine.stride(-2))
    arguments = (first, part.high, scale, bias, fine, fine_bias, *strides, first.shape[-1] // VECTOR_WORDS)
    return Operand(arguments, constants, rows, step, columns)
