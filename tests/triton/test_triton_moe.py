"""Experts on Triton against a loop over rows in the reference's words: each way through, dense and packed stacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gemcutter.errors import KernelError
from gemcutter.ops import reference
from gemcutter.ops.triton import linear as linear_kernels
from gemcutter.ops.triton import moe
from gemcutter.ops.triton.moe import PAIR_ROWS, SCAN_ROWS, block_rows, experts, list_blocks
from gemcutter.quant import Weight
from gemcutter.quant.gpu_packing import adjoin, pack_for_gpu
from gemcutter.quant.packed import Stack
from tests.triton.packed import MAKERS, small

EXPERTS, CHOICES, HIDDEN, WIDTH = 5, 3, 64, 32


@pytest.fixture(autouse=True)
def _usual_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the small matrices of these tests for usual ones, whose tiles hold several rows."""
    monkeypatch.setattr(linear_kernels, "NARROW_MATRIX", 4)


def packed_stack(name: str, rows: int, columns: int, device: torch.device, first: int = 0) -> tuple[Weight, Tensor]:
    """Make a stack of matrices that differ, repacked, and its values."""
    whole = MAKERS[name](rows * EXPERTS + first, columns)
    items = tuple(whole.rows(first + rows * index, first + rows * (index + 1)) for index in range(EXPERTS))
    found = pack_for_gpu(Stack(items), device)
    assert found is not None
    return Weight((found,)), torch.stack([item.dequantize() for item in items]).to(device)


def dense_stack(rows: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (small(EXPERTS, rows, columns, seed=seed) * 10).to(device, dtype)


def choose(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Make rows, weights and choices; the last expert is never chosen."""
    generator = torch.Generator().manual_seed(count)
    x_MD = torch.randn(count, HIDDEN, generator=generator)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOICES] for _ in range(count)])
    return x_MD.to(device), torch.rand(count, CHOICES, generator=generator).to(device), chosen.to(device)


def expected(x_MD: Tensor, weights_MT: Tensor, chosen_MT: Tensor, gates: Tensor, outs: Tensor) -> Tensor:
    """Run each pair through the words of the reference, in float32."""
    out = torch.zeros(x_MD.shape, device=x_MD.device)
    for row in range(len(x_MD)):
        for weight, expert in zip(weights_MT[row], chosen_MT[row].tolist(), strict=True):
            gate, up = reference.linear(x_MD[row : row + 1].float(), Weight((gates[expert].float(),))).chunk(2, dim=1)
            found = reference.linear(reference.gelu_mul(gate, up), Weight((outs[expert].float(),)))
            out[row] += found[0] * weight
    return out


def check(found: Tensor, wanted: Tensor) -> None:
    assert found.isfinite().all()
    unit = 1e-5 if found.dtype == torch.float32 else 2**-5
    assert (found.float() - wanted).abs().max() <= unit * wanted.abs().max()


@pytest.mark.parametrize("count", [1, 2, PAIR_ROWS, PAIR_ROWS + 1, SCAN_ROWS, SCAN_ROWS + 1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_experts(count: int, dtype: torch.dtype, device: torch.device) -> None:
    x_MD, weights_MT, chosen_MT = choose(count, device)
    gates, outs = (dense_stack(*shape, dtype, device) for shape in ((2 * WIDTH, HIDDEN, 1), (HIDDEN, WIDTH, 2)))
    gates[-1] = outs[-1] = torch.nan  # never chosen, and never met
    rows = x_MD.to(dtype)
    found = experts(rows, weights_MT, chosen_MT, Weight((gates,)), Weight((outs,)))
    assert found.dtype == dtype
    check(found, expected(rows, weights_MT, chosen_MT, gates, outs))


@pytest.mark.parametrize("count", [1, PAIR_ROWS + 1, SCAN_ROWS + 1])
@pytest.mark.parametrize("name", ["Q4_0", "affine8g64", "nvfp4"])
def test_packed_experts(name: str, count: int, device: torch.device) -> None:
    hidden, width = HIDDEN, HIDDEN if name == "affine8g64" else WIDTH
    _, weights_MT, chosen_MT = choose(count, device)
    x_MD = torch.randn(count, hidden, generator=torch.Generator().manual_seed(7)).to(device)
    w_in, gates = packed_stack(name, 2 * width, hidden, device)
    w_out, outs = packed_stack(name, hidden, width, device, first=3)
    check(experts(x_MD, weights_MT, chosen_MT, w_in, w_out), expected(x_MD, weights_MT, chosen_MT, gates, outs))


@pytest.mark.parametrize("count", [1, PAIR_ROWS + 1, SCAN_ROWS + 1])
def test_gate_and_up_may_be_parts_of_one_stack(count: int, device: torch.device) -> None:
    x_MD, weights_MT, chosen_MT = choose(count, device)
    halves = [dense_stack(WIDTH, HIDDEN, seed, torch.float32, device) for seed in (3, 4)]
    outs = dense_stack(HIDDEN, WIDTH, 2, torch.float32, device)
    w_in = Weight(adjoin(halves), ("gate", "up"))
    found = experts(x_MD, weights_MT, chosen_MT.int(), w_in, Weight((outs,)))
    check(found, expected(x_MD, weights_MT, chosen_MT, torch.cat(halves, 1), outs))
    with pytest.raises(KernelError, match="gate and up"):
        experts(x_MD, weights_MT, chosen_MT, Weight(tuple(halves), ("gate", "up")), Weight((outs,)))


def test_all_rows_may_choose_one_expert(device: torch.device) -> None:
    x_MD, weights_MT, _ = choose(40, device)
    gates, outs = (dense_stack(*shape, torch.float32, device) for shape in ((2 * WIDTH, HIDDEN, 1), (HIDDEN, WIDTH, 2)))
    chosen_MT = torch.tensor([3, 0, 4], device=device).repeat(40, 1)
    found = experts(x_MD, weights_MT, chosen_MT, Weight((gates,)), Weight((outs,)))
    check(found, expected(x_MD, weights_MT, chosen_MT, gates, outs))


def test_no_rows_give_no_rows(device: torch.device) -> None:
    gates, outs = (dense_stack(*shape, torch.float32, device) for shape in ((2 * WIDTH, HIDDEN, 1), (HIDDEN, WIDTH, 2)))
    empty = torch.empty(0, CHOICES, device=device)
    x_MD = torch.empty(0, HIDDEN, device=device)
    assert experts(x_MD, empty, empty.long(), Weight((gates,)), Weight((outs,))).shape == (0, HIDDEN)


@pytest.mark.parametrize("size", [1, 2, 4, 16])
@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_blocks_hold_every_pair_once_beside_its_expert(
    count: int, size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many pairs are looked through bit by bit."""
    monkeypatch.setattr(moe, "SORT_PAIRS", 32)
    for chosen_MT in (choose(count, device)[2], *(torch.full((count, 1), expert, device=device) for expert in (0, 4))):
        owners_B, members_BR = list_blocks(chosen_MT, EXPERTS, size)
        blocks = zip(owners_B.tolist(), members_BR.tolist(), strict=True)
        found = [(owner, pair) for owner, pairs in blocks for pair in pairs if pair >= 0]
        assert sorted(pair for _, pair in found) == list(range(chosen_MT.numel()))
        assert all(chosen_MT.flatten()[pair] == owner for owner, pair in found)
        assert [pair for _, pair in found] == chosen_MT.flatten().sort(stable=True).indices.tolist()


def test_blocks_grow_with_the_rows_of_an_expert() -> None:
    assert [block_rows(pairs, 128) for pairs in (8, 16 * 128, 17 * 128, 64 * 128, 65 * 128)] == [16, 16, 32, 32, 64]


@pytest.mark.parametrize("count", [1, PAIR_ROWS, PAIR_ROWS + 1, SCAN_ROWS, SCAN_ROWS + 1, 33])
def test_no_expert_adds_nothing(count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that another tensor-parallel rank holds are -1; what memory held before does not come through."""
    x_MD, weights_MT, chosen_MT = choose(count, device)
    gates, outs = (dense_stack(*shape, torch.float32, device) for shape in ((2 * WIDTH, HIDDEN, 1), (HIDDEN, WIDTH, 2)))
    is_held_MT = chosen_MT % 2 == 0
    wanted = expected(x_MD, torch.where(is_held_MT, weights_MT, 0.0), chosen_MT, gates, outs)

    def spoilt(like: Tensor, *shape: int, **how: Any) -> Tensor:  # Triton's interpreter asks, too, for a device
        value = torch.nan if like.is_floating_point() else 0
        return torch.full(shape, value, **{"dtype": like.dtype, "device": like.device} | how)

    monkeypatch.setattr(Tensor, "new_empty", spoilt)
    found = experts(x_MD, weights_MT, torch.where(is_held_MT, chosen_MT, -1), Weight((gates,)), Weight((outs,)))
    check(found, wanted)
