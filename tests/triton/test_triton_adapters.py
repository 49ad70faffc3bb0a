"""Adapters chosen per request on Triton: the low-rank products follow the kernels' products, for the rows that asked for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemcutter.model.text import Decoder
from gemcutter.ops.types import Param
from gemcutter.quant import Weight
from gemcutter.quant.lora import Delta
from tests.triton.decoders import draw_params, plan_of, prompt, run

JOB = ((prompt(7), prompt(5, seed=1), prompt(3, seed=2)), (5,))
RANK = 3


def adapted_params(name: str, device: torch.device) -> dict[str, Param]:
    """Draw parameters whose matrices, but for tables and stacked experts, an adapter changes in all their rows."""
    generator, found = torch.Generator().manual_seed(3), draw_params(plan_of(name), torch.float32, device)
    for key, param in found.items():
        if isinstance(param, Weight) and param.parts[0].ndim == 2 and not key.startswith(("embed.", "head")):
            down = torch.randn(RANK, param.columns, generator=generator) / param.columns**0.5
            up = torch.randn(param.rows, RANK, generator=generator) / 2
            found[key] = replace(param, deltas=(Delta("a", 0, down.to(device), up.to(device)),))
    return found


@pytest.mark.parametrize("name", ["readers", "experts"])
def test_each_request_gets_its_own(name: str, device: torch.device) -> None:
    """Beside rows without an adapter, whose sequences lie before, between and behind; no op is left to the definitions."""
    params, adapters = adapted_params(name, device), (None, "a", None)
    wanted, found = (
        run(Decoder(plan_of(name), params, torch.float32, device, kernels), *JOB, keep_all=False, adapters=adapters)
        for kernels in ("reference", "triton")
    )
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-4 * float(wanted.logits.abs().max()))
    plain = run(Decoder(plan_of(name), params, torch.float32, device, "triton"), *JOB, keep_all=False)
    assert float((plain.logits - found.logits).abs().max()) > 0.01 * float(wanted.logits.abs().max())


def test_every_line_of_an_adapted_layer_is_tritons(device: torch.device) -> None:
    decoder = Decoder(plan_of("readers"), adapted_params("readers", device), torch.float32, device, "triton")
    assert {name for layer in decoder.adapted.layers for name in layer.kernels.values()} == {"triton"}
