"""MLX's affine scheme against its formula and, where mlx is installed, against MLX itself, bit for bit."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemcutter.quant.affine import BITS, Affine, from_arrays, infer, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def mx() -> ModuleType:
    """Return mlx.core, or skip."""
    return pytest.importorskip("mlx.core", reason="needs MLX for comparison: pip install 'mlx[cpu]'")


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32).view(torch.uint32)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two float32 tensors are equal bit for bit, all NaN taken for one."""
    bits = [torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in (one, other)]
    return torch.equal(*bits)


def varied_rows(columns: int) -> Tensor:
    """Make rows of every kind that a quantizer treats in its own way."""
    rows = torch.randn(24, columns)
    rows[0] = 0
    rows[1] = 1.5
    rows[2] = rows[2].abs()
    rows[3] = -rows[3].abs()
    rows[4] *= 1e-6
    rows[5] *= 1e3
    rows[6] = torch.arange(columns) / 16
    rows[7] = (rows[7] * 3).round()
    rows[8, ::64] = 20
    rows[9] = 1 + rows[9] * 1e-4
    rows[10] *= 1e-9
    rows[11, ::2] = -rows[11, 1::2]  # both edges of one magnitude
    return rows


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data(), bits=st.sampled_from(BITS), group=st.sampled_from((1, 2, 4, 8, 16, 32, 64, 96)))
def test_dequantize_is_the_formula(data: st.DataObject, bits: int, group: int) -> None:
    columns = group * 32
    words = random_words(2, columns * bits // 32)
    scales, biases = torch.randn(2, 2, 32).to(data.draw(st.sampled_from(DTYPES)))
    weight = from_arrays(words, scales, biases, columns)
    assert (weight.bits, weight.group, weight.scheme) == (bits, group, f"affine{bits}g{group}")
    values = weight.dequantize()
    for row in range(2):
        stream = int.from_bytes(words[row].numpy().tobytes(), "little")
        codes = torch.tensor([stream >> index * bits & (1 << bits) - 1 for index in range(columns)], dtype=torch.float32)
        by_group = torch.arange(columns) // group
        assert same(values[row], codes * scales[row].float()[by_group] + biases[row].float()[by_group])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_mlx(mx: ModuleType, bits: int, dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -6e-8, 6e4, -3e38])
    for group in (32, 64, 128):
        words = random_words(16, 512 * bits // 32)
        scales, biases = torch.randn(2, 16, 512 // group)
        scales[:9, 0], biases[:9, 1] = extremes, extremes
        scales, biases = scales.to(dtype), biases.to(dtype)
        arrays = (mx.array(array.numpy()) for array in (words, scales.float(), biases.float()))
        expected = torch.from_numpy(np.array(mx.dequantize(*arrays, group_size=group, bits=bits)))
        assert same(from_arrays(words, scales, biases, 512).dequantize(), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_mlx(mx: ModuleType, bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    x = varied_rows(512).to(dtype)
    for group in (32, 64, 128):
        foreign = mx.array(x.float().numpy()).astype(getattr(mx, str(dtype).removeprefix("torch.")))
        words, scales, biases = mx.quantize(foreign, group_size=group, bits=bits)
        ours = quantize(x, bits, group)
        assert torch.equal(ours.codes, torch.from_numpy(np.array(words)).view(torch.uint8))
        for own, other in ((ours.scales, scales), (ours.biases, biases)):
            assert own.dtype == dtype
            assert torch.equal(own.float(), torch.from_numpy(np.array(other.astype(mx.float32))))


@pytest.mark.parametrize("bits", BITS)
def test_quantize_comes_back_within_half_a_step(bits: int) -> None:
    torch.manual_seed(1)
    x = varied_rows(256)
    weight = quantize(x, bits, 64)
    step = weight.scales.abs().repeat_interleave(64, -1)
    # Choosing the scale so that zero is exact may shift the far edge out of reach by half a step more.
    assert ((weight.dequantize() - x).abs() <= step * 1.01 + x.abs() * 1e-6).all()
    inner = (weight.dequantize() - x).abs() <= step * 0.5001 + x.abs() * 1e-6
    assert inner.float().mean() > 0.9
    assert torch.equal(weight.dequantize()[0], torch.zeros(256))


def test_quantize_takes_experts_and_strided_values() -> None:
    x = torch.randn(3, 64, 8).transpose(1, 2)
    weight = quantize(x, 4, 32)
    assert weight.shape == (3, 8, 64)
    for index in range(3):
        alone = quantize(x[index].contiguous(), 4, 32)
        assert torch.equal(weight.expert(index).codes, alone.codes)
        assert torch.equal(weight.expert(index).dequantize(), alone.dequantize())


def test_a_negative_scale_is_no_fault() -> None:
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76]], dtype=torch.uint8)
    weight = from_arrays(codes.view(torch.uint32), torch.tensor([[-0.5]]), torch.tensor([[2.0]]), 8)
    assert weight.dequantize().tolist() == [[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]]


def test_infer_reads_bits_and_group_off_the_shapes() -> None:
    assert infer((262144, 1120), (262144, 140), 8960) == (4, 64)  # E2B's per-layer table
    assert infer((128, 704, 352), (128, 704, 44), 2816) == (4, 64)  # experts of 26B-A4B
    assert infer((2112, 704), (2112, 44), 2816) == (8, 64)


def faulty(**changes: Tensor | int) -> Affine:
    """Build a sound weight of 4 bits in groups of 64, but for some changes."""
    arrays: dict[str, Tensor | int] = {
        "words": random_words(4, 16),
        "scales": torch.ones(4, 2),
        "biases": torch.ones(4, 2),
        "columns": 128,
    }
    return from_arrays(**{**arrays, **changes})  # type: ignore[arg-type]


def test_what_faulty_changes_is_sound() -> None:
    assert faulty().shape == (4, 128)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"words": random_words(4, 15)}, "words: 15 of 32 bits do not hold 128 columns of 1, 2, 3, 4, 5, 6 or 8 bits"),
        ({"words": random_words(4, 28)}, "words: 28 of 32 bits do not hold 128 columns"),  # 7 bits
        ({"words": random_words(4, 16).float()}, "words: uint32 or int32 expected, found float32"),
        ({"words": random_words(16)}, r"found \[16\] and \[4, 2\]"),
        ({"scales": torch.ones(5, 2)}, r"alike but for the last axis, expected, found \[4, 16\] and \[5, 2\]"),
        ({"scales": torch.ones(())}, r"found \[4, 16\] and \[\]"),
        ({"scales": torch.ones(4, 3)}, "scales: 3 groups do not divide 128 columns"),
        ({"scales": torch.ones(4, 0)}, "scales: 0 groups do not divide 128 columns"),
        ({"scales": torch.ones(4, 2, dtype=torch.uint8)}, "scales: float32 or float16 or bfloat16 expected, found uint8"),
        ({"biases": torch.ones(4, 1)}, r"biases: shape \[4, 2\] expected, found \[4, 1\]"),
        ({"biases": torch.ones(4, 2, dtype=torch.float64)}, "biases: float32 or float16 or bfloat16 expected, found float64"),
        ({"columns": 130}, "words: 16 of 32 bits do not hold 130 columns"),
    ],
)
def test_wrong_arrays_are_refused(changes: dict[str, Tensor | int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        faulty(**changes)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"words: .*; scales: .*; biases: "):
        faulty(words=random_words(4, 16).float(), scales=torch.ones(4, 2).double(), biases=torch.ones(3, 2))


@pytest.mark.parametrize(
    ("x", "bits", "group", "problem"),
    [
        (torch.ones(2, 64), 7, 64, "bits: one of 1, 2, 3, 4, 5, 6, 8 expected, found 7"),
        (torch.ones(2, 64), 4, 16, "group: 32, 64 or 128 that divides 64 columns expected, found 16"),
        (torch.ones(2, 64), 4, 128, "group: 32, 64 or 128 that divides 64 columns expected, found 128"),
        (torch.full((2, 64), torch.nan), 4, 64, "values: finite"),
        (torch.ones(2, 64, dtype=torch.float64), 4, 64, "values: finite float32, float16 or bfloat16 expected"),
    ],
)
def test_quantize_refuses_what_has_no_layout(x: Tensor, bits: int, group: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        quantize(x, bits, group)
