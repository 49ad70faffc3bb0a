"""The reference's elementwise ops against float64: norm, rotary embedding, GELU and softcap, to their last rounding."""

from __future__ import annotations

import pytest
import torch

from gemcutter.model.rope import Rope
from gemcutter.ops import reference
from gemcutter.plan import RopeSpec
from tests.kernels.formulas import naive_gelu, naive_norm, naive_rope
from tests.kernels.test_ops import BF16, F32, assert_close, randn


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_rms_norm(dtype: torch.dtype, eps: float) -> None:
    weight = randn(48, seed=1)
    for x in (randn(5, 48, dtype=dtype), randn(2, 3, 48, dtype=dtype) * 1e-3, torch.zeros(2, 48, dtype=dtype)):
        for w in (weight, None):
            found = reference.rms_norm(x, w, eps)
            assert found.dtype == dtype
            # One rounding at the end: the nearest bfloat16 is within 2**-9 of every single value.
            assert torch.allclose(found.double(), naive_norm(x, w, eps), rtol=2**-8 if dtype == BF16 else 1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "spec",
    [
        RopeSpec(1e4, 64, 32),
        RopeSpec(1e4, 256, 128),
        RopeSpec(1e6, 128, 16),
        RopeSpec(1e6, 512, 64),
        RopeSpec(1e6, 64, 8, factor=8.0),
    ],
    ids=["default-64", "default-256", "proportional-128", "proportional-512", "factor-8"],
)
def test_rope(spec: RopeSpec) -> None:
    positions = [0, 1, 2, 63, 1000, 4095, 131071]
    x_NHE = randn(len(positions), 3, spec.head_dim)
    tables = Rope(spec, torch.device("cpu"), F32).tables(torch.tensor(positions))
    found, wanted = reference.rope(x_NHE, *tables), naive_rope(x_NHE, positions, spec)
    for row, position in enumerate(positions):  # angles are float32, as the models were trained: their error grows with position
        assert torch.allclose(found[row].double(), wanted[row], rtol=0, atol=1e-6 + position * 2**-21)
    still = [*range(spec.pairs, spec.head_dim // 2), *range(spec.head_dim // 2 + spec.pairs, spec.head_dim)]
    assert found[..., still].equal(x_NHE[..., still])  # untouched, bit for bit


def test_rope_rotates_in_the_compute_dtype() -> None:
    spec = RopeSpec(1e4, 8, 4)
    cos, sin = Rope(spec, torch.device("cpu"), BF16).tables(torch.tensor([7]))
    assert cos.dtype == sin.dtype == BF16
    assert reference.rope(randn(1, 2, 8, dtype=BF16), cos, sin).dtype == BF16


def test_gelu_mul() -> None:
    gate, up = torch.linspace(-9, 9, 101).view(1, -1), randn(1, 101)
    assert_close(reference.gelu_mul(gate, up), naive_gelu(gate) * up.double(), 1e-6)


def test_softcap() -> None:
    logits = torch.linspace(-400, 400, 81)
    assert_close(reference.softcap(logits, 30.0), 30 * torch.tanh(logits.double() / 30), 1e-6)
    assert reference.softcap(logits, None).equal(logits)
