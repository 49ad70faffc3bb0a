"""Scaled integers and 8-bit floats against their formulas and, where it is installed, against compressed-tensors.

The packers here are written value by value from each layout's description, so that the code under test is not its own judge.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gemcutter.quant.scaled_int import Awq, ScaledInt, from_awq, from_gptq, from_packed, from_values

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring rows each nibble of a word holds


@pytest.fixture(scope="module")
def ct() -> ModuleType:
    """Give compressed_tensors, or skip."""
    return pytest.importorskip("compressed_tensors", reason="needs compressed-tensors for comparison")


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def pack_row(values: list[int], bits: int, itemsize: int = 4) -> list[int]:
    """Pack values as one little-endian bit stream, and cut it into words."""
    stream = sum(value << index * bits for index, value in enumerate(values))
    num_items = -(-len(values) * bits // (8 * itemsize))
    items = [stream >> 8 * itemsize * index & (1 << 8 * itemsize) - 1 for index in range(num_items)]
    return [signed(item) for item in items] if itemsize == 4 else items


def pack_rows(values: Tensor, bits: int) -> Tensor:
    return torch.tensor([pack_row(row, bits) for row in values.tolist()], dtype=torch.int32)


def pack_apart(values: Tensor, bits: int) -> Tensor:
    """Pack as many values into each word as fit whole."""
    count = 32 // bits
    rows = [
        [
            signed(sum(v << bits * place for place, v in enumerate(row[start : start + count])))
            for start in range(0, len(row), count)
        ]
        for row in values.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, (rows, columns))


def spread(by_group: Tensor, group: int, columns: int) -> Tensor:
    return by_group.float()[:, torch.arange(columns) // group]


def random_fp8(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


def same(one: Tensor, other: Tensor) -> bool:
    """Say whether two float32 tensors are equal bit for bit, all NaN taken for one."""
    bits = [torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in (one, other)]
    return torch.equal(*bits)


# ---- packed integers of compressed-tensors and Gemma ----


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [None, 64])
def test_packed_is_the_formula_in_both_layouts_of_words(bits: int, group: int | None) -> None:
    codes, scales = random_codes(4, 320, bits), torch.randn(4, 320 // (group or 320)).bfloat16()
    expected = (codes - (1 << bits - 1)).float() * spread(scales, group or 320, 320)
    dense = from_packed(pack_rows(codes, bits), scales, bits, 320)
    assert dense.scheme == f"packed{bits}" + ("g64" if group else "")
    assert same(dense.dequantize(), expected)
    apart = from_packed(pack_apart(codes, bits), scales, bits, 320)
    assert apart.kind == ("packed" if bits in (1, 2, 4, 8) else "words")
    assert same(apart.dequantize(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
def test_packed_equals_compressed_tensors(ct: ModuleType, bits: int, is_symmetric: bool, group: int | None) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    half, strategy = 1 << bits - 1, "group" if group else "channel"
    numbers = torch.randint(-half, half, (48, 192), dtype=torch.int8)
    scales = torch.randn(48, 192 // (group or 192))
    zeros = None if is_symmetric else torch.randint(-half, half, scales.shape, dtype=torch.int8)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=is_symmetric, strategy=strategy, group_size=group)
    expected = dequantize(x_q=numbers, scale=scales, zero_point=zeros, args=args)
    packed_zeros = None if zeros is None else pack_to_int32(zeros, bits, packed_dim=0)
    weight = from_packed(pack_to_int32(numbers, bits), scales, bits, 192, zeros=packed_zeros)
    assert torch.equal(weight.dequantize(), expected)


def test_zero_points_may_lie_apart_in_words_too() -> None:
    codes, zeros, scales = random_codes(64, 64, 3), random_codes(2, 64, 3), torch.randn(64, 2)
    weight = from_packed(pack_apart(codes, 3), scales, 3, 64, zeros=pack_apart(zeros, 3).t().contiguous())
    assert weight.scheme == "words3g32z"
    assert same(weight.dequantize(), (codes - spread(zeros.t(), 32, 64)) * spread(scales, 32, 64))


def test_experts_are_packed_one_by_one() -> None:
    codes, scales, zeros = random_codes(3 * 16, 64, 4), torch.randn(3, 16, 2), random_codes(3 * 2, 16, 4)
    words, zero_words = pack_rows(codes, 4).view(3, 16, 8), pack_rows(zeros, 4).view(3, 2, 2).transpose(1, 2)
    weight = from_packed(words, scales, 4, 64, zeros=zero_words)
    assert weight.shape == (3, 16, 64)
    for index in range(3):
        alone = from_packed(words[index], scales[index], 4, 64, zeros=zero_words[index])
        assert same(weight.expert(index).dequantize(), alone.dequantize())
        assert same(weight.dequantize()[index], alone.dequantize())


def test_a_short_last_group_needs_the_group_named() -> None:
    codes, scales = random_codes(4, 704, 4), torch.randn(4, 6)  # 26B-A4B's experts: 704 is five and a half times 128
    words = pack_rows(codes, 4)
    weight = from_packed(words, scales, 4, 704, group=128)
    assert same(weight.dequantize(), (codes - 8).float() * spread(scales, 128, 704))
    assert same(weight.columns(512, 704).dequantize(), weight.dequantize()[:, 512:])
    with pytest.raises(ValueError, match="scales: 6 groups do not divide 704 columns"):
        from_packed(words, scales, 4, 704)


def test_an_index_names_the_group_of_each_column() -> None:
    codes, scales, group_of = random_codes(4, 64, 4), torch.randn(4, 4), torch.randperm(64, dtype=torch.int32) // 16
    weight = from_packed(pack_rows(codes, 4), scales, 4, 64, group_of=group_of)
    assert weight.scheme == "packed4-indexed"
    assert same(weight.dequantize(), (codes - 8).float() * scales[:, group_of.long()])
    in_order = from_packed(pack_rows(codes, 4), scales, 4, 64, group_of=torch.arange(64) // 16)
    assert (in_order.scheme, in_order.group_of) == ("packed4g16", None)


@pytest.mark.parametrize("bits", [2, 4])
def test_gemma_packs_bytes_with_scales_of_rows_or_blocks(bits: int) -> None:
    codes = random_codes(4, 512, bits)
    stored = torch.tensor([pack_row(row, bits, 1) for row in codes.tolist()], dtype=torch.uint8)
    for groups in (1, 2):
        scales = torch.randn(4, groups)
        expected = (codes - (1 << bits - 1)).float() * spread(scales, 512 // groups, 512)
        assert same(from_packed(stored, scales, bits, 512).dequantize(), expected)


def test_one_block_of_columns_keeps_its_scheme() -> None:
    table = from_packed(torch.zeros(4, 128, dtype=torch.uint8), torch.ones(4, 2), 2, 512)
    assert table.columns(256, 512).scheme == table.scheme == "packed2g256"


# ---- plain values ----


def test_int8_is_the_formula() -> None:
    values, scales, zeros = (
        torch.randint(-128, 128, (4, 64), dtype=torch.int8),
        torch.randn(4, 1),
        torch.tensor([[-3], [0], [5], [127]]),
    )
    assert same(from_values(values, scales).dequantize(), values.float() * scales)
    assert same(from_values(values, scales[:, 0]).dequantize(), values.float() * scales)
    shifted = from_values(values, scales, zeros=zeros.to(torch.int8))
    assert shifted.scheme == "int8z"
    assert same(shifted.dequantize(), (values.float() - zeros) * scales)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_one_scale_stores_it_once(shape: tuple[int, ...]) -> None:
    values, scale = random_fp8(100, 64), torch.full(shape, 0.37)
    weight = from_values(values, scale)
    assert same(weight.dequantize(), values.float() * 0.37)
    assert (weight.scheme, weight.nbytes) == ("fp8", 6400 + 4)


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (200, 704)])
def test_fp8_in_blocks_equals_compressed_tensors(ct: ModuleType, rows: int, columns: int) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    state = {"weight": random_fp8(rows, columns), "weight_scale": torch.rand(-(-rows // 128), -(-columns // 128))}
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    expected = compressor.decompress(dict(state), QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    weight = from_values(state["weight"], state["weight_scale"], block=(128, 128))
    assert same(weight.dequantize(), expected)
    assert weight.nbytes <= rows * columns * 1.035


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_values_equal_compressed_tensors(ct: ModuleType, kind: str, strategy: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    values = random_fp8(32, 96) if kind == "float" else torch.randint(-128, 128, (32, 96), dtype=torch.int8)
    state = {"weight": values, "weight_scale": torch.rand(1) if strategy == "tensor" else torch.rand(32, 1)}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, type=kind, strategy=strategy))
    expected = BaseCompressor.get_value_from_registry(f"{kind}-quantized").decompress(dict(state), scheme)["weight"]
    assert same(from_values(values, state["weight_scale"]).dequantize(), expected)


def test_blocks_of_experts_are_repeated_for_each() -> None:
    values, scales = random_fp8(3, 200, 256), torch.rand(3, 2, 2)
    weight = from_values(values, scales, block=(128, 128))
    for index in range(3):
        assert same(weight.dequantize()[index], from_values(values[index], scales[index], block=(128, 128)).dequantize())
    each = from_values(values, torch.tensor([1.0, 2.0, 4.0]))
    assert same(each.dequantize()[2], values[2].float() * 4)


# ---- GPTQ and AWQ ----


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_v2", [False, True])
def test_gptq_is_the_formula(bits: int, is_v2: bool) -> None:
    codes, zeros, scales = random_codes(32, 192, bits), random_codes(4, 32, bits), torch.randn(4, 32).half()
    zeros[0, 0] = (1 << bits) - 1  # one more does not fit the field
    qweight, qzeros = pack_rows(codes, bits).t().contiguous(), pack_rows(zeros, bits)
    points = zeros.t() + (0 if is_v2 else 1)
    weight = from_gptq(qweight, qzeros, scales, bits, group=48, is_v2=is_v2)
    assert weight.codes.data_ptr() == qweight.data_ptr()
    assert same(weight.dequantize(), (codes - spread(points, 48, 192)) * spread(scales.t(), 48, 192))
    group_of = torch.randperm(192) // 48
    indexed = from_gptq(qweight, qzeros, scales, bits, group_of=group_of, is_v2=is_v2)
    assert same(indexed.dequantize(), (codes - points[:, group_of].float()) * scales.t().float()[:, group_of])


def test_gptq_takes_a_short_last_group_and_an_index_in_order() -> None:
    codes, zeros, scales = random_codes(8, 704, 4), torch.full((6, 8), 7), torch.randn(6, 8)
    arrays = pack_rows(codes, 4).t(), pack_rows(zeros, 4), scales
    expected = (codes - 8).float() * spread(scales.t(), 128, 704)
    for group_of in (None, (torch.arange(704) // 128).int()):
        weight = from_gptq(*arrays, 4, group=128, group_of=group_of)
        assert weight.scheme == "gptq4g128z"
        assert same(weight.dequantize(), expected)


def test_awq_is_the_formula() -> None:
    codes, zeros, scales = random_codes(32, 128, 4), random_codes(32, 4, 4), torch.randn(4, 32).half()

    def pack_words(values: Tensor) -> Tensor:
        rows = [
            [signed(sum(row[start + AWQ_ORDER[n]] << 4 * n for n in range(8))) for start in range(0, 32, 8)]
            for row in values.t().tolist()
        ]
        return torch.tensor(rows, dtype=torch.int32)

    weight = from_awq(pack_words(codes), pack_words(zeros), scales)
    assert (weight.scheme, weight.shape) == ("awq4g32", (32, 128))
    assert weight.nbytes == (128 + 4) * 4 * 4 + 4 * 32 * 2
    assert same(weight.dequantize(), (codes - spread(zeros, 32, 128)) * spread(scales.t(), 32, 128))


# ---- refusals ----

WORDS, ONES = torch.zeros(16, 8, dtype=torch.int32), torch.ones(16, 2)  # 64 columns of 4 bits in groups of 32
INT8, QZEROS = torch.zeros(16, 64, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: from_packed(WORDS, ONES, 9, 64), "bits: 1 to 8 expected, found 9"),
        (lambda: from_packed(WORDS[0], ONES, 4, 64), r"weight: shape \[rows, ...\]"),
        (lambda: from_packed(WORDS, ONES, 4, 72), "weight: 9 words expected for 72 values of 4 bits, found 8"),
        (lambda: from_packed(WORDS.to(torch.uint8), ONES, 4, 64), "weight: 32 bytes expected for 64 values of 4 bits, found 8"),
        (lambda: from_packed(WORDS.float(), ONES, 4, 64), "weight: int32 or uint8 expected, found float32"),
        (
            lambda: from_packed(WORDS, ONES[:8], 4, 64),
            r"scales: one for the tensor, for each of 16 rows expected, found \[8, 2\]",
        ),
        (lambda: from_packed(WORDS, ONES.int(), 4, 64), "scales: float32 or float16 or bfloat16 expected, found int32"),
        (lambda: from_packed(WORDS, ONES, 4, 64, group=16), "scales: 2 groups do not divide 64 columns into groups of 16"),
        (lambda: from_packed(WORDS, ONES[:, :1], 4, 64, group=32), "scales: 1 groups do not divide 64 columns into groups of 32"),
        (lambda: from_packed(WORDS, ONES, 4, 64, group=-1), "scales: 2 groups do not divide 64 columns into groups of -1"),
        (lambda: from_packed(WORDS, ONES[:, :0], 4, 64), "scales: 0 groups found for 64 columns"),
        (lambda: from_packed(WORDS, ONES, 4, 64, zeros=QZEROS[0]), "zero points: shape .* expected, found"),
        (
            lambda: from_packed(WORDS, ONES, 4, 64, zeros=QZEROS[:1]),
            "zero points: 2 words expected for 16 values of 4 bits, found 1",
        ),
        (lambda: from_packed(WORDS, ONES, 4, 64, zeros=QZEROS.float()), "zero points: int32 expected, found float32"),
        (lambda: from_packed(WORDS, ONES, 4, 64, group_of=torch.arange(64)), "g_idx: groups 0 to 1 expected, found 0 to 63"),
        (
            lambda: from_packed(WORDS, ONES, 4, 64, group_of=torch.full((64,), -1)),
            "g_idx: groups 0 to 1 expected, found -1 to -1",
        ),
        (lambda: from_packed(WORDS, ONES, 4, 64, group_of=torch.zeros(63).int()), r"g_idx: shape \[64\] expected, found \[63\]"),
        (lambda: from_packed(WORDS, ONES, 4, 64, group_of=torch.zeros(64)), "g_idx: int32 or int64 expected, found float32"),
        (lambda: from_values(INT8.short(), ONES[:, :1]), "weight: int8 or float8_e4m3fn expected, found int16"),
        (lambda: from_values(INT8[0], ONES[:, :1]), r"weight: shape \[rows, ...\]"),
        (lambda: from_values(INT8, torch.ones(2, 2), block=(4, 32)), "for each block of 4 rows expected, found"),
        (
            lambda: from_values(INT8, torch.ones(4, 2), block=(4, 16)),
            "scales: 2 groups do not divide 64 columns into groups of 16",
        ),
        (lambda: from_values(INT8, ONES, zeros=torch.zeros(16, 1, dtype=torch.int8)), "zero points: shape .16, 2. expected"),
        (lambda: from_gptq(WORDS, QZEROS, ONES.t(), 5), "bits: 2, 3, 4 or 8 expected, found 5"),
        (lambda: from_gptq(WORDS[0], QZEROS, ONES.t(), 4), "qweight and scales: two axes expected"),
        (lambda: from_gptq(WORDS, QZEROS, torch.ones(2, 8), 4), r"qzeros: shape \[2, 1\] expected, found \[2, 2\]"),
        (lambda: from_gptq(WORDS, QZEROS[:, :1], torch.ones(2, 9), 4), r"scales: shape \[2, 8\] expected, found \[2, 9\]"),
        (lambda: from_gptq(WORDS[:0], QZEROS[:, :1], torch.ones(2, 8), 4), "scales: 2 groups found for 0 columns"),
        (lambda: from_gptq(WORDS.float(), QZEROS[:, :1], torch.ones(2, 8).int(), 4), "qweight: int32 .*; scales: float32"),
        (lambda: from_awq(WORDS, QZEROS, torch.ones(2, 64)), r"qzeros: shape \[2, 8\] expected"),
        (lambda: from_awq(WORDS, WORDS[:3], torch.ones(3, 64)), "scales: 3 groups do not divide 16 columns"),
        (lambda: from_awq(WORDS, WORDS[:0], torch.ones(0, 64)), "qweight and scales: two axes expected"),
    ],
)
def test_wrong_arrays_are_refused(build: Callable[[], ScaledInt | Awq], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build()
