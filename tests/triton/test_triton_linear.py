"""Products on Triton against the reference: every scheme, row counts around the switches, parts apart and side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gemcutter.ops import reference
from gemcutter.ops.triton import linear as linear_kernels
from gemcutter.ops.triton.linear import FEW_NARROW_ROWS, MANY_ROWS, gate_mul, gated, gather_rows, linear, logits_of
from gemcutter.quant import Weight
from gemcutter.quant.gpu_packing import GpuPackedWeight, adjoin, pack_for_gpu, place
from gemcutter.quant.packed import Packed
from tests.triton.packed import DTYPES, MAKERS, blocks, small

ROWS = (1, 2, 3, FEW_NARROW_ROWS, FEW_NARROW_ROWS + 1, 15, 16, 17, 33)


@pytest.fixture(autouse=True)
def _usual_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the small matrices of these tests for usual ones, neither narrow nor wide."""
    monkeypatch.setattr(linear_kernels, "NARROW_MATRIX", 4)


def rows_of(count: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make rows with NaN behind the last one, which nothing may read."""
    generator = torch.Generator().manual_seed(count)
    room = torch.full((count + 3, columns), torch.nan)
    room[:count] = torch.randn(count, columns, generator=generator)
    return room.to(device, dtype)[:count]


def gpu_packed(part: Packed, device: torch.device) -> GpuPackedWeight:
    """Repack a part between rows and columns of NaN scales, which nothing may read."""
    found = pack_for_gpu(part, device)
    assert found is not None
    arrays = []
    for array in found.arrays:
        room = array.new_full((array.shape[0] + 2, array.shape[1] + 1), torch.nan if array.is_floating_point() else 77)
        room[1:-1, :-1] = array
        arrays.append(room[1:-1, :-1])
    return GpuPackedWeight(found.codes, found.high, tuple(arrays), found.num_columns, found.layout, found.origin)


def check(found: Tensor, wanted: Tensor, products: int = 1) -> None:
    """Compare within roundings of results and of packed weights; the interpreter cuts bfloat16 off instead."""
    assert found.dtype == wanted.dtype
    assert found.isfinite().all()
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[found.dtype]
    assert (found.float() - wanted.float()).abs().max() <= products * unit * max(1e-3, float(wanted.float().abs().max()))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("count", [*ROWS, MANY_ROWS, MANY_ROWS + 1])
def test_dense_products(count: int, dtype: torch.dtype, device: torch.device) -> None:
    for features, columns in ((13, 96), (3, 264)):
        matrix = small(features, columns).to(device, dtype)
        x_ND = rows_of(count, columns, dtype, device)
        check(linear(x_ND, Weight((matrix,))), reference.linear(x_ND, Weight((matrix,))))


@pytest.mark.parametrize("columns", [1152, 1536])
@pytest.mark.parametrize("count", [1, 9])
def test_dense_rows_longer_than_a_tile(count: int, columns: int, device: torch.device) -> None:
    matrix, x_ND = small(9, columns).to(device), rows_of(count, columns, torch.float32, device)
    check(linear(x_ND, Weight((matrix,))), reference.linear(x_ND, Weight((matrix,))))


@pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("count", [1, 6, MANY_ROWS + 1])
def test_a_router_in_float32_meets_weights_of_another_dtype(count: int, stored: torch.dtype, device: torch.device) -> None:
    matrix, x_ND = small(24, 64).to(device, stored), rows_of(count, 64, torch.float32, device)
    check(linear(x_ND, Weight((matrix,))), reference.linear(x_ND, Weight((matrix,))))


@pytest.mark.parametrize("name", MAKERS)
def test_packed_products(name: str, device: torch.device) -> None:
    """In float32, in which nothing is rounded, so that a wrong scale or column shows."""
    part = MAKERS[name](9, 768)
    weight, wanted = Weight((gpu_packed(part, device),)), Weight((place(part, device),))
    for count in (1, 2, 5, MANY_ROWS + 1):
        x_ND = rows_of(count, 768, torch.float32, device)
        check(linear(x_ND, weight), reference.linear(x_ND, wanted))


@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("name", ["affine4g64", "Q6_K", "fp8"])
def test_packed_products_of_half_precision_rows(name: str, count: int, device: torch.device) -> None:
    part = MAKERS[name](9, 256)
    weight, wanted = Weight((gpu_packed(part, device),)), Weight((place(part, device),))
    for dtype in (torch.bfloat16, torch.float16):
        x_ND = rows_of(count, 256, dtype, device)
        check(linear(x_ND, weight), reference.linear(x_ND, wanted))


@pytest.mark.parametrize("columns", [32, 96, 352, 2208])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0"])
def test_packed_rows_of_all_lengths(name: str, columns: int, device: torch.device) -> None:
    part = blocks(name, 5, columns)
    weight, wanted = Weight((gpu_packed(part, device),)), Weight((place(part, device),))
    for count in (1, 6):
        x_ND = rows_of(count, columns, torch.float32, device)
        check(linear(x_ND, weight), reference.linear(x_ND, wanted))


@pytest.mark.parametrize("count", [1, 5, MANY_ROWS + 1])
def test_matrices_with_many_rows(count: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Taller tiles, and dequantizing in several pieces."""
    monkeypatch.setattr(linear_kernels, "WIDE_MATRIX", 64)
    monkeypatch.setattr(linear_kernels, "SCRATCH_ELEMENTS", 30 * 64)
    part, x_ND = blocks("Q4_0", 70, 64), rows_of(count, 64, torch.float32, device)
    dense = small(70, 64).to(device)
    check(linear(x_ND, Weight((gpu_packed(part, device),))), reference.linear(x_ND, Weight((place(part, device),))))
    check(linear(x_ND, Weight((dense,))), reference.linear(x_ND, Weight((dense,))))


@pytest.mark.parametrize("count", [1, 3, FEW_NARROW_ROWS, FEW_NARROW_ROWS + 1])
def test_matrices_with_few_rows(count: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Each of their rows is a program of its own."""
    monkeypatch.setattr(linear_kernels, "NARROW_MATRIX", 64)
    x_ND, dense = rows_of(count, 64, torch.float32, device), small(5, 64).to(device)
    check(linear(x_ND, Weight((dense,))), reference.linear(x_ND, Weight((dense,))))
    for part in (blocks("Q4_0", 5, 64), blocks("Q5_1", 3, 64)):
        check(linear(x_ND, Weight((gpu_packed(part, device),))), reference.linear(x_ND, Weight((place(part, device),))))


@pytest.mark.parametrize("count", [1, 5, MANY_ROWS + 1])
def test_parts_fill_their_columns_wherever_they_lie(count: int, device: torch.device) -> None:
    x_ND = rows_of(count, 64, torch.float32, device)
    packed = [blocks(name, rows, 64) for name, rows in (("Q4_0", 5), ("Q4_0", 3), ("Q8_0", 4))]
    each = [pack_for_gpu(part, device) for part in packed]
    parts = tuple(part for part in each if part is not None)
    dense = (small(6, 64).to(device), small(2, 64, seed=3).to(device))
    joined = adjoin(parts[:2])
    for mixed in ((*parts, *dense), joined, joined[::-1], adjoin(dense), (place(packed[0], device), parts[2])):
        weight = Weight(tuple(mixed))
        check(linear(x_ND, weight), reference.linear(x_ND, weight))


def test_side_by_side_parts_are_one_launch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    launched, launch = list[int](), linear_kernels._launch

    def counting(x: Tensor, matrix: linear_kernels.Operand, out: Tensor) -> None:
        launched.append(out.shape[1])
        launch(x, matrix, out)

    monkeypatch.setattr(linear_kernels, "_launch", counting)
    parts = adjoin([small(rows, 64, seed=rows).to(device) for rows in (8, 4, 2)])
    weight = Weight(parts, ("q", "k", "v"))
    linear(rows_of(1, 64, torch.float32, device), weight)
    linear(rows_of(1, 64, torch.float32, device), weight.part("k", "v"))
    linear(rows_of(1, 64, torch.float32, device), weight.part("q", "v"))
    assert launched == [14, 6, 8, 2]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 17, MANY_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_products_are_joined(count: int, dtype: torch.dtype, device: torch.device) -> None:
    x_ND = rows_of(count, 64, dtype, device)
    packed = [blocks("Q4_0", 6, 64), blocks("Q4_0", 6, 64)]
    packed[1].data.view(-1, 18)[:, 2:] = 0x5A
    dense = [small(6, 64, seed=seed).to(device, dtype) * 10 for seed in (5, 6)]
    gpu_packed_parts = [part for each in packed if (part := pack_for_gpu(each, device)) is not None]
    for parts in (dense, adjoin(dense), adjoin(gpu_packed_parts), gpu_packed_parts):
        gate, up = (reference.linear(x_ND.float(), Weight((part,))) for part in parts)
        wanted = reference.gelu_mul(gate, up).to(dtype)
        found = gated(x_ND, Weight(tuple(parts), ("gate", "up")))
        assert found.shape == (count, 6)
        if count:
            check(found, wanted, products=2)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 17, MANY_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_opens_what_lies_apart(count: int, dtype: torch.dtype, device: torch.device) -> None:
    x_ND, ple = rows_of(count, 64, dtype, device), rows_of(count, 40, dtype, device)[:, 20:26]
    for part in (small(6, 64).to(device, dtype) * 10, gpu_packed(blocks("Q4_0", 6, 64), device)):
        wanted = reference.gelu_mul(reference.linear(x_ND.float(), Weight((part,))), ple.float()).to(dtype)
        found = gate_mul(x_ND, Weight((part,)), ple)
        assert found.shape == (count, 6)
        if count:
            check(found, wanted, products=2)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("count", [0, 1, 5, 17, MANY_ROWS + 1])
def test_logits_are_squashed_sums(count: int, cap: float | None, device: torch.device) -> None:
    """In float32, and not rounded to the rows' dtype on the way, unless the library multiplies."""
    x_ND = rows_of(count, 64, torch.bfloat16, device)
    for part in (small(9, 64).to(device, torch.bfloat16) * 10, gpu_packed(blocks("Q4_0", 9, 64), device)):
        wanted = reference.softcap(reference.linear(x_ND.float(), Weight((part,))), cap)
        found = logits_of(x_ND, Weight((part,)), cap)
        assert (found.shape, found.dtype) == ((count, 9), torch.float32)
        if 0 < count <= FEW_NARROW_ROWS // 2:  # products in registers, of what is packed too
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        elif count:
            check(found.bfloat16(), wanted.bfloat16(), products=2)


def test_no_rows_give_no_rows(device: torch.device) -> None:
    for part in (small(5, 32).to(device), gpu_packed(blocks("Q4_0", 5, 32), device)):
        assert linear(torch.empty(0, 32, device=device), Weight((part,))).shape == (0, 5)


@pytest.mark.parametrize("name", MAKERS)
def test_rows_of_a_table_are_gathered(name: str, device: torch.device) -> None:
    part = MAKERS[name](11, 768)
    ids = torch.tensor([7, 0, 10, 7], device=device)
    found = gather_rows(gpu_packed(part, device), ids, torch.float32, 0.5)
    assert torch.equal(found.cpu(), part.gather(ids.cpu()).dequantize() * 0.5)
    assert gather_rows(gpu_packed(part, device), ids[:0], torch.bfloat16).shape == (0, 768)


def test_rows_that_lie_apart_are_read_in_place(device: torch.device) -> None:
    wide = rows_of(3, 128, torch.float32, device)
    weight = Weight((small(9, 64).to(device),))
    check(linear(wide[:, 32:96], weight), reference.linear(wide[:, 32:96].contiguous(), weight))
