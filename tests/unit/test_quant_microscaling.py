"""Microscaling floats against the standard's formulas and, where they are installed, against mlx and compressed-tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from gemcutter.quant.microscaling import Micro, from_compressed, from_mlx, from_modelopt

MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@pytest.fixture(scope="module")
def mx() -> ModuleType:
    """Return mlx.core, or skip."""
    return pytest.importorskip("mlx.core", reason="needs MLX for comparison: pip install 'mlx[cpu]'")


@pytest.fixture(scope="module")
def ct() -> ModuleType:
    """Return compressed_tensors, or skip."""
    return pytest.importorskip("compressed_tensors", reason="needs compressed-tensors for comparison")


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two float32 tensors are equal bit for bit, all NaN taken for one."""
    bits = [torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in (one, other)]
    return torch.equal(*bits)


def e2m1(code: int) -> float:
    return math.copysign([0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7], -1 if code & 8 else 1)


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.copysign(value, -1 if byte & 128 else 1)


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def float32(value: float) -> float:
    return float(np.float32(value))


def plain_values(scheme: str, codes: list[int], scales: list[float]) -> Tensor:
    """Compute a row: products of a code's value with its group's scale, rounded once."""
    group = MODES[scheme][1]
    numbers = [e4m3(byte) for byte in codes] if scheme == "mxfp8" else [e2m1(c) for byte in codes for c in (byte & 15, byte >> 4)]
    return torch.tensor([number * scales[index // group] for index, number in enumerate(numbers)], dtype=torch.float64).float()


@pytest.mark.parametrize("scheme", MODES)
def test_dequantize_is_the_formula(scheme: str) -> None:
    bits, group = MODES[scheme]
    every_byte = torch.arange(256, dtype=torch.uint8)
    scales = every_byte.view(256, 1).repeat(1, 256 // group)
    codes = torch.stack([every_byte.roll(row)[: 256 * bits // 8] for row in range(256)])
    weight = from_mlx(codes.view(torch.uint32), scales, 256)
    assert (weight.scheme, weight.shape) == (scheme, (256, 256))
    values = weight.dequantize()
    for row in range(256):
        scale = (e4m3 if scheme == "nvfp4" else e8m0)(row)
        assert same(values[row], plain_values(scheme, codes[row].tolist(), [scale] * (256 // group)))


@pytest.mark.parametrize("scheme", MODES)
def test_dequantize_equals_mlx(mx: ModuleType, scheme: str) -> None:
    bits, group = MODES[scheme]
    words = random_bytes(64, 512 * bits // 8).view(torch.uint32)
    scales = random_bytes(64, 512 // group)
    if scheme != "nvfp4":
        scales = scales.clamp(max=254)  # E8M0's 255 is NaN by the standard, and infinity in MLX
    arrays = mx.array(words.numpy()), mx.array(scales.numpy())
    expected = mx.dequantize(*arrays, group_size=group, bits=bits, mode=scheme, dtype=mx.float32)
    assert same(from_mlx(words, scales, 512).dequantize(), torch.from_numpy(np.array(expected)))


def test_global_scale_equals_mlx(mx: ModuleType) -> None:
    words, scales, amax = random_bytes(64, 256).view(torch.uint32), random_bytes(64, 32), torch.tensor(3.7)
    arrays, factor = (mx.array(words.numpy()), mx.array(scales.numpy())), mx.array(amax.numpy())
    expected = mx.dequantize(*arrays, group_size=16, bits=4, mode="nvfp4", global_scale=factor, dtype=mx.float32)
    assert same(from_mlx(words, scales, 512, amax).dequantize(), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("scheme", MODES)
def test_what_mlx_quantized_comes_back(mx: ModuleType, scheme: str) -> None:
    bits, group = MODES[scheme]
    x = torch.randn(16, 256)
    words, scales = mx.quantize(mx.array(x.numpy()), group_size=group, bits=bits, mode=scheme)
    weight = from_mlx(torch.from_numpy(np.array(words)), torch.from_numpy(np.array(scales)), 256)
    error = (weight.dequantize() - x).norm() / x.norm()
    assert error < (0.05 if bits == 8 else 0.15)


def test_compressed_tensors_divides_and_modelopt_multiplies() -> None:
    codes, scales = random_bytes(4, 32), random_bytes(4, 4)
    expected_by = {
        "divide": [[float32(e4m3(s) / 3) for s in row] for row in scales.tolist()],
        "multiply": [[float32(e4m3(s) * float32(0.3)) for s in row] for row in scales.tolist()],
    }
    divided = from_compressed(codes, scales.view(torch.float8_e4m3fn), torch.tensor([3.0]))
    multiplied = from_modelopt(codes, scales.view(torch.float8_e4m3fn), torch.tensor(0.3))
    assert divided.scheme == multiplied.scheme == "nvfp4"
    for row in range(4):
        for weight, how in ((divided, "divide"), (multiplied, "multiply")):
            assert same(weight.dequantize()[row], plain_values("nvfp4", codes[row].tolist(), expected_by[how][row]))


def test_nvfp4_equals_compressed_tensors(ct: ModuleType) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    codes, factor = random_bytes(32, 128), torch.tensor([731.5])
    scales = random_bytes(32, 16).view(torch.float8_e4m3fn)
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    numbers = unpack_fp4_from_uint8(codes, 32, 256, dtype=torch.float32)
    expected = dequantize(x_q=numbers, scale=scales.float(), args=args, global_scale=factor, dtype=torch.float32)
    assert same(from_compressed(codes, scales, factor).dequantize(), expected)


def test_mxfp4_equals_compressed_tensors(ct: ModuleType) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    state = {"weight_packed": random_bytes(32, 128), "weight_scale": random_bytes(32, 8).clamp(1, 251)}  # finite in bfloat16
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    expected = compressor.decompress(dict(state), QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    weight = from_compressed(state["weight_packed"], state["weight_scale"])
    assert weight.scheme == "mxfp4"
    assert same(weight.dequantize(), expected.float())


def test_each_expert_may_have_a_factor_of_its_own() -> None:
    codes, scales, factor = random_bytes(3, 4, 32), random_bytes(3, 4, 4) & 0x3F, torch.tensor([1.0, 2.0, 8.0])
    for build in (from_compressed, from_modelopt):
        weight = build(codes, scales, factor)
        for index in range(3):
            alone = build(codes[index], scales[index], factor[index])
            assert same(weight.expert(index).dequantize(), alone.dequantize())
            assert same(weight.dequantize()[index], alone.dequantize())


def test_a_factor_is_stored_once() -> None:
    codes, scales = random_bytes(1000, 32), random_bytes(1000, 4)
    assert from_modelopt(codes, scales, torch.tensor(2.0)).nbytes == 36_000 + 4


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: from_mlx(random_bytes(4, 32), random_bytes(4, 4), 128), "words: uint32 or int32 expected, found uint8"),
        (lambda: from_mlx(random_bytes(4, 64).view(torch.int32), random_bytes(4, 2), 128), "found 4 bits in groups of 64"),
        (lambda: from_mlx(random_bytes(4, 64).view(torch.int32), random_bytes(4, 0), 128), "found 4 bits in groups of 128"),
        (lambda: from_mlx(random_bytes(4, 64).view(torch.int32), torch.ones(4, 4), 128), "scales: uint8 expected, found float32"),
        (lambda: from_mlx(random_bytes(4, 64).view(torch.int32), random_bytes(5, 4), 128), r"scales: shape \[4, 4\] expected"),
        (lambda: from_mlx(random_bytes(4, 64).view(torch.int32), random_bytes(), 128), r"scales: shape \[rows, ...\]"),
        (
            lambda: from_mlx(random_bytes(4, 64).view(torch.int32), random_bytes(4, 4), 128, torch.ones(1)),
            "global scale: only nvfp4 has one, and this is mxfp4",
        ),
        (
            lambda: from_mlx(random_bytes(4, 64).view(torch.int32), random_bytes(4, 8), 128, torch.ones(3)),
            r"global scale: float32 \[\] or \[1\] expected, found float32 \[3\]",
        ),
        (
            lambda: from_compressed(random_bytes(4, 64), random_bytes(4, 4).float()),
            "weight_scale: uint8 or float8_e8m0fnu expected",
        ),
        (
            lambda: from_compressed(random_bytes(4, 64), random_bytes(4, 8)),
            r"weight_scale: shape \[4, 4\] expected, found \[4, 8\]",
        ),
        (lambda: from_compressed(random_bytes(4, 60), random_bytes(4, 3)), "columns: a multiple of 32 expected, found 120"),
        (lambda: from_compressed(random_bytes(64), random_bytes(4)), r"weight: shape \[rows, ...\]"),
        (lambda: from_compressed(random_bytes(4, 64).view(torch.int8), random_bytes(4, 4)), "weight: uint8 expected, found int8"),
        (
            lambda: from_modelopt(random_bytes(2, 4, 64), random_bytes(2, 4, 8), torch.ones(3)),
            r"weight_scale_2: float32 \[\] or \[1\] or \[2\] expected, found float32 \[3\]",
        ),
        (
            lambda: from_modelopt(random_bytes(4, 64), random_bytes(4, 8), torch.ones(1).bfloat16()),
            "weight_scale_2: .* found bfloat16",
        ),
    ],
)
def test_wrong_arrays_are_refused(build: Callable[[], Micro], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build()
