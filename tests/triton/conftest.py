"""Where the Triton kernels run in these tests: on the GPU if there is one, else under Triton's interpreter on the CPU.

`tests/conftest.py` chooses the interpreter before anything can import Triton.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from gemcutter.ops import reference
from gemcutter.quant import Weight, dequantize

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device that kernels run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def plain_products(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library multiply where Triton's interpreter would take seconds for a step; the kernels have tests of their own."""
    if device.type == "cuda":
        return
    triton_linear = pytest.importorskip("gemcutter.ops.triton.linear")

    def linear(x_ND: Tensor, weight: Weight) -> Tensor:
        return torch.cat([x_ND @ dequantize(part).t() for part in weight.parts], dim=1)

    def gated(x_ND: Tensor, weight: Weight) -> Tensor:
        return reference.gelu_mul(*linear(x_ND, weight).chunk(2, dim=1))

    monkeypatch.setattr(triton_linear, "linear", linear)

    def gate_mul(x_ND: Tensor, gate: Weight, times_NF: Tensor) -> Tensor:
        return reference.gelu_mul(linear(x_ND, gate), times_NF)

    def logits_of(x_RD: Tensor, weight: Weight, cap: float | None) -> Tensor:
        return reference.softcap(linear(x_RD, weight), cap)

    monkeypatch.setattr(triton_linear, "logits_of", logits_of)
    monkeypatch.setattr(triton_linear, "gated", gated)
    monkeypatch.setattr(triton_linear, "gate_mul", gate_mul)
