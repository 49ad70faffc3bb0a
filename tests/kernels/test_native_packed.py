"""Products with packed matrices, at every processor level of this machine, against float64 arithmetic on the same codes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from gemcutter import native
from gemcutter.quant.cpu_layout import PackedLayout, UnpackedWeight, to_panels
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.cpu_packing import pack_for_cpu
from gemcutter.quant.scaled_int import from_packed

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

U4, U6, S8, T4, E4M3 = 0, 1, 2, 6, 7
SPREAD = (-128, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 127)  # from end to end
HALF_RANGE = (-64, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, 63)
SMALL = (*range(-16, 14, 2), 15)
FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
F16, BF16, F32, SUPER32, SUPER16 = range(5)
INT8, BF16_ROWS, FLOAT_ROWS = range(3)
TILE_ROWS = 17  # from so many on, AMX takes rows as bfloat16
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Format:
    """One way to store a matrix; group 0 is a whole row."""

    name: str
    codes: int
    scales: int
    group: int
    has_bias: bool = False
    offset: int = 0
    levels: tuple[int, ...] = ()
    exponent: int = 0


FORMATS = (
    Format("q4_0", U4, F16, 32, offset=-8),
    Format("affine4-g64", U4, BF16, 64, has_bias=True),
    Format("affine4-g128", U4, F16, 128, has_bias=True),
    Format("affine4-g16", U4, F32, 16, has_bias=True),
    Format("biased-and-offset", U4, F16, 32, has_bias=True, offset=-8),
    Format("q4_k", U4, SUPER32, 32),
    Format("q3_k", U4, SUPER16, 16, offset=-4),
    Format("q6_k", U6, SUPER16, 16, offset=-32),
    Format("affine6-g64", U6, BF16, 64, has_bias=True),
    Format("offset6-g16", U6, F32, 16, offset=-32),
    Format("q8_0", S8, F16, 32),
    Format("affine8-g64", S8, BF16, 64, has_bias=True, offset=128),
    Format("row8", S8, F32, 0),
    Format("block8-g16", S8, F32, 16),
    Format("iq4_nl", T4, F16, 32, levels=SPREAD),
    Format("mxfp4", T4, BF16, 32, levels=FLOAT4),
    Format("nvfp4", T4, F32, 16, levels=FLOAT4),
    Format("iq4_xs", T4, SUPER16, 16, levels=SPREAD),
    Format("iq2_s", T4, SUPER16, 16, levels=FLOAT4, exponent=-3),
    Format("table-biased-g64", T4, BF16, 64, has_bias=True, offset=3, levels=SPREAD),
    Format("iq3_xxs", T4, SUPER16, 16, levels=HALF_RANGE, exponent=-2),
    Format("table-16", T4, F16, 32, levels=SMALL),
    Format("q4_k-units", U4, SUPER32, 32, exponent=-2),
    Format("mxfp8", E4M3, BF16, 32),
    Format("float8-g128", E4M3, F16, 128),
    Format("float8-row", E4M3, F32, 0),
)
CODES = {
    U4: range(16),
    T4: range(16),
    U6: range(64),
    S8: range(-128, 128),
    E4M3: [code for code in range(256) if code % 128 != 127],
}
EXTREMES = {U4: (0, 15), T4: (0, 15), U6: (0, 63), S8: (-128, 127), E4M3: (0x7E, 0xFE)}
BY_NAME = {each.name: each for each in FORMATS}


@dataclass
class Packed:
    """A packed matrix in memory, and its values in float64."""

    matrix: native.Matrix
    values: Array
    memory: Array


def to_bf16(x: Array) -> Array:
    """Round float32 to bfloat16 bits, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def stored(x: Array, scales: int) -> tuple[Array, Array]:
    """Round to a type of scales: the bytes [..., n * size], and the values they stand for."""
    if scales == F32:
        rounded = x.astype(np.float32)
    elif scales == BF16:
        bits = to_bf16(x)
        return bits.view(np.uint8), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        rounded = x.astype(np.float16)
    return rounded.view(np.uint8), rounded.astype(np.float64)


def numbers(codes: Array, kind: int) -> Array:
    """Return what codes stand for; 8-bit floats by their definition, NaN apart."""
    if kind != E4M3:
        return codes.astype(np.float64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(codes >> 7 & 1, -size, size)


def code_block(codes_RK: Array, kind: int) -> Array:
    """Lay out 16 rows x 32 columns of codes as layout.h says."""
    if kind == E4M3:
        return codes_RK.T.astype(np.uint8).reshape(-1)
    quads = codes_RK.reshape(16, 8, 4).transpose(1, 0, 2).reshape(8, 64)
    if kind == S8:
        return quads.astype(np.int8).view(np.uint8).reshape(-1)
    quads = quads.astype(np.uint8)
    low, high = quads & 15, quads >> 4
    lower = (low[:4] | low[4:] << 4).reshape(-1)
    if kind != U6:
        return lower
    upper = [sum((high[4 * half + k] << 2 * k for k in range(4)), np.zeros(64, np.uint8)) for half in range(2)]
    return np.concatenate([lower, *upper])


def make(kind: Format, rows: int, columns: int, seed: int = 0, code: int | None = None) -> Packed:
    """Make a packed matrix of random codes, or of one code; the scales of rows that do not exist are not numbers."""
    rng = np.random.default_rng(seed)
    padded, group = -(-rows // 16) * 16, kind.group or columns
    codes = rng.choice(CODES[kind.codes], (padded, columns)) if code is None else np.full((padded, columns), code)
    pieces, values, unit = [], np.zeros((padded, columns)), 2.0**kind.exponent
    counted = np.array(kind.levels)[codes] if kind.codes == T4 else numbers(codes, kind.codes)

    def put(x: Array, scales: int) -> Array:
        data, exact = stored(x, scales)
        pieces.append(data.copy())
        return exact

    def floats() -> Array:
        x = rng.standard_normal(16)
        x[rng.random(16) < 0.1] = 0
        x[max(0, rows - start) :] = np.nan
        return x

    for start in range(0, padded, 16):
        panel = slice(start, start + 16)
        scale, bias = np.zeros((16, columns)), np.zeros((16, columns))
        offset_bytes = sum(len(piece) for piece in pieces)
        for block in range(columns // 32):
            at = slice(32 * block, 32 * block + 32)
            halves = (slice(32 * block, 32 * block + 16), slice(32 * block + 16, 32 * block + 32))
            if kind.scales == SUPER32:
                if block % 8 == 0:
                    d, least = put(floats(), F16) * unit, put(floats(), F16) * unit
                fine = rng.integers(0, 64, (2, 16)).astype(np.uint8)
                pieces.append(fine.reshape(-1))
                scale[:, at], bias[:, at] = (d * fine[0])[:, None], -(least * fine[1])[:, None]
            elif kind.scales == SUPER16:
                if block % 8 == 0:
                    d = put(floats(), F16) * unit
                fine8 = rng.integers(-128, 128, (2, 16)).astype(np.int8)
                pieces.append(fine8.view(np.uint8).reshape(-1))
                for half in range(2):
                    scale[:, halves[half]] = (d * fine8[half])[:, None]
            elif group == 16:
                for target in (scale, bias)[: 1 + kind.has_bias]:
                    for sixteen in halves:
                        target[:, sixteen] = put(floats(), kind.scales)[:, None]
            elif 32 * block % group == 0:
                for target in (scale, bias)[: 1 + kind.has_bias]:
                    target[:, 32 * block : 32 * block + group] = put(floats(), kind.scales)[:, None]
            pieces.append(code_block(codes[panel, at], kind.codes))
        values[panel] = scale * (counted[panel] + kind.offset) + bias
        used = sum(len(piece) for piece in pieces) - offset_bytes
        pieces.append(np.full(-used % 64, 0xFF, np.uint8))
    data = np.concatenate(pieces)
    memory = np.zeros(len(data) + 64, np.uint8)
    shift = -memory.ctypes.data % 64
    memory[shift : shift + len(data)] = data
    matrix = native.Matrix(
        memory.ctypes.data + shift,
        rows,
        columns,
        len(data) * 16 // padded,
        kind.codes,
        kind.scales,
        group,
        kind.has_bias,
        kind.offset,
        kind.exponent,
        kind.levels,
    )
    return Packed(matrix, values[:rows], memory)


def exact_rows(count: int, columns: int, seed: int = 1) -> Array:
    """Make rows that int8 with a scale for every 32 columns holds exactly; some blocks are zero, a few are huge."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (count, columns // 32, 32))
    q[:, :, 7] = 127 * rng.choice([-1, 1], (count, columns // 32))
    scale = 2.0 ** rng.integers(-12, 4, (count, columns // 32, 1))
    scale[rng.random(scale.shape) < 0.1] = 0
    scale[rng.random(scale.shape) < 0.02] = 2.0**40
    return (q * scale).reshape(count, columns).astype(np.float32)


def multiply(parts: list[Packed], x: Array, activations: int) -> Array:
    """Multiply into poisoned memory, and see that nothing beyond the product's rows was written."""
    library = native.load_library()
    assert library is not None
    rows, guard = sum(part.matrix.rows for part in parts), 64
    out = np.full(len(x) * rows + guard, np.nan, np.float32)
    array = (native.Matrix * len(parts))(*(part.matrix for part in parts))
    answer = library.gc_linear(
        array,
        ctypes.c_int(len(parts)),
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_int64(len(x)),
        ctypes.c_int(activations),
        ctypes.c_void_p(out.ctypes.data),
    )
    assert answer == 0
    assert np.isnan(out[-guard:]).all()
    return out[:-guard].reshape(len(x), rows)


def check(out: Array, x: Array, values: Array, slack: Array | float = 0.0) -> None:
    """Compare with float64, relative to the sum of the terms' magnitudes. AMX rounds both factors to bfloat16, and no more."""
    expected = x.astype(np.float64) @ values.T
    size = np.abs(x.astype(np.float64)) @ np.abs(values).T
    error = np.abs(out - expected)
    allowed = (2.0**-8 if native.level() == "amx" and len(x) >= TILE_ROWS else 0.0) * size + 1e-5 * size + slack
    assert (error <= allowed).all(), f"worst {np.max(error / (allowed + 1e-300)):.3g} of the tolerance"


@pytest.fixture(params=(1, 2, 5))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Use so many threads."""
    library = native.load_library()
    assert library is not None
    before = library.gc_threads()
    library.gc_set_threads(request.param)
    yield request.param
    library.gc_set_threads(before)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (39, 512), (5, 768)])
def test_int8_products_are_exact_where_rows_are(kind: Format, rows: int, columns: int, level: str) -> None:
    packed = make(kind, rows, columns)
    for count in (1, 2, 3, 4, 5, 17, 64):
        x = exact_rows(count, columns, seed=count)
        check(multiply([packed], x, INT8), x, packed.values)


@pytest.mark.parametrize("activations", [INT8, FLOAT_ROWS])
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_many_rows_agree_bit_by_bit_with_one_row(kind: Format, activations: int, level: str) -> None:
    packed = make(kind, 21, 768 if kind.scales >= SUPER32 else 640)
    x = exact_rows(1100, packed.matrix.columns)
    all_rows = multiply([packed], x, activations)
    check(all_rows, x, packed.values)
    for start, stop in ((0, 1), (1, 3), (3, 6), (6, 10), (300, 600), (1093, 1100)):
        if level == "amx" and activations == INT8 and stop - start < TILE_ROWS:
            continue
        assert (multiply([packed], x[start:stop], activations) == all_rows[start:stop]).all(), f"rows {start} to {stop - 1}"


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_quantized_rows_cost_at_most_half_a_step(kind: Format, level: str) -> None:
    packed = make(kind, 48, 512)
    x = np.random.default_rng(3).standard_normal((9, 512)).astype(np.float32)
    step = np.abs(x.reshape(9, -1, 32)).max(-1, keepdims=True).repeat(32, -1).reshape(x.shape) / 127
    check(multiply([packed], x, INT8), x, packed.values, slack=0.501 * step @ np.abs(packed.values).T)


@pytest.mark.parametrize("activations", [BF16_ROWS, FLOAT_ROWS])
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_float_rows(kind: Format, activations: int, level: str) -> None:
    packed = make(kind, 39, 512)
    for count in (1, 2, 3, 4, 5, 17, 64):
        x = np.random.default_rng(count).standard_normal((count, 512)).astype(np.float32)
        seen = stored(x, BF16)[1] if activations == BF16_ROWS else x
        check(multiply([packed], x, activations), seen.astype(np.float32), packed.values)


@pytest.mark.parametrize("activations", [INT8, FLOAT_ROWS])
def test_parts_are_stacked_whatever_their_formats_and_the_threads(activations: int, threads: int, level: str) -> None:
    names = ("q4_0", "q6_k", "iq4_xs", "float8-row", "affine4-g64", "q4_k")
    parts = [make(BY_NAME[name], rows, 512, seed=rows) for name, rows in zip(names, (200, 16, 48, 7, 90, 33), strict=True)]
    values = np.concatenate([part.values for part in parts])
    for count in (1, 4, 17, 300):
        x = exact_rows(count, 512, seed=count)
        check(multiply(parts, x, activations), x, values)


@pytest.mark.parametrize("columns", [32, 96, 544, 1056])
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "offset6-g16", "iq4_nl", "mxfp8", "float8-row"])
def test_columns_that_fill_no_run(name: str, columns: int, level: str) -> None:
    packed = make(BY_NAME[name], 21, columns)
    for count in (1, 7, 33):
        x = exact_rows(count, columns)
        for activations in (INT8, FLOAT_ROWS):
            check(multiply([packed], x, activations), x, packed.values)


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "offset6-g16", "q4_k", "iq4_nl"])
def test_long_rows_and_many_panels(name: str, level: str) -> None:
    packed = make(BY_NAME[name], 150, 3328)
    for count in (17, 33, 545 if name == "q4_0" else 100):
        x = exact_rows(count, 3328)
        check(multiply([packed], x, INT8), x, packed.values)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_extreme_codes_and_rows_do_not_overflow(kind: Format, level: str) -> None:
    for code in EXTREMES[kind.codes]:
        packed = make(kind, 16, 256, code=code)
        for count, sign in ((1, -1), (1, 1), (5, -1), (5, 1)):
            x = np.full((count, 256), 127.0 * sign, np.float32)
            check(multiply([packed], x, INT8), x, packed.values)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_gather_gives_rows_in_the_order_asked(kind: Format, level: str, threads: int) -> None:
    library = native.load_library()
    assert library is not None
    packed = make(kind, 39, 512)
    ids = np.array([38, 0, 15, 16, 16, 7], np.int64)
    out = np.full((len(ids), 512), np.nan, np.float32)
    library.gc_gather(
        ctypes.byref(packed.matrix), ctypes.c_void_p(ids.ctypes.data), ctypes.c_int64(len(ids)), ctypes.c_void_p(out.ctypes.data)
    )
    np.testing.assert_allclose(out, packed.values[ids], rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 3e38, 1e-41, np.inf], ids=str)
def test_eight_bit_floats_are_read_exactly(scale: float, level: str) -> None:
    """Every code: subnormal ones, both zeros, and those that are not numbers; scales at both ends of float32."""
    library = native.load_library()
    assert library is not None
    codes = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
    grid = UnpackedWeight(PackedLayout(E4M3, F32, 32), codes, (torch.full((16, 8), scale),))
    whole = CpuPackedWeight(to_panels(grid), 16, 256, grid.layout, "fp8")
    wanted, out = whole.dequantize(), torch.empty(1, 256)
    assert torch.equal(wanted.nan_to_num(nan=7.0), (codes.view(torch.float8_e4m3fn).float() * scale).nan_to_num(nan=7.0))
    ids = torch.tensor([3])
    library.gc_gather(
        ctypes.byref(whole.matrix()), ctypes.c_void_p(ids.data_ptr()), ctypes.c_int64(1), ctypes.c_void_p(out.data_ptr())
    )
    same = out[0].view(torch.int32) == wanted[3].view(torch.int32)
    assert (same | (out[0].isnan() & wanted[3].isnan())).all()


@pytest.mark.parametrize("activations", [INT8, BF16_ROWS, FLOAT_ROWS])
def test_rows_meet_sorted_columns_in_their_order(activations: int, level: str) -> None:
    """Rows that every form holds exactly, whatever the order of their columns."""
    generator = torch.Generator().manual_seed(4)
    group_of = torch.randperm(256, generator=generator) // 64
    codes = torch.randint(-(2**31), 2**31, (39, 32), generator=generator, dtype=torch.int64).to(torch.int32)
    whole = pack_for_cpu(from_packed(codes, torch.rand(39, 4, generator=generator), 4, 256, group_of=group_of))
    assert whole is not None
    packed = Packed(whole.matrix(), whole.dequantize().double().numpy(), whole.data.numpy())
    for count in (1, 3, 17, 64):
        x = np.random.default_rng(count).choice([-127.0, 0.0, 127.0], (count, 256)).astype(np.float32)
        check(multiply([packed], x, activations), x, packed.values)
