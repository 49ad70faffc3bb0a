"""Weights packed for the CPU: all values survive the way to panels bit for bit, and panels are cut like any packed weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from gemcutter.quant import Weight, affine
from gemcutter.quant.cpu_layout import (
    E4M3,
    F16,
    F32,
    S8,
    SUPER16,
    SUPER32,
    U4,
    U6,
    PackedLayout,
    UnpackedWeight,
    from_panels,
    to_panels,
)
from gemcutter.quant.cpu_packed import CpuPackedWeight, one_order
from gemcutter.quant.cpu_packing import cpu_layout_of, join, pack_for_cpu
from gemcutter.quant.gguf_blocks import TYPES, Blocks
from gemcutter.quant.microscaling import Micro, from_mlx
from gemcutter.quant.packed import Packed, Stack
from gemcutter.quant.scaled_int import ScaledInt, from_awq, from_gptq, from_packed, from_values
from tests.unit.test_quant_gguf_blocks import HALVES, random_blocks

ROWS, COLUMNS = 37, 512  # the last of three panels is ragged
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def blocks(name: str, *experts: int) -> Blocks:
    """Make a matrix, or a stack, of random blocks that begins with extreme ones."""
    kind = TYPES[name]
    count = COLUMNS // kind.values
    data = random_blocks(name, (*experts, 1)[0] * ROWS * count)
    return Blocks(data.view(*experts, ROWS, count * kind.nbytes), kind)


def words(*shape: int) -> Tensor:
    """Make random words, int32."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=torch.Generator().manual_seed(1)).to(torch.int32)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) - 0.3


def cpu_packed(part: Packed) -> CpuPackedWeight:
    found = pack_for_cpu(part)
    assert found is not None
    return found


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Return whether values are equal, NaN to NaN."""
    return found.shape == wanted.shape and bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())


def check_cuts(found: Packed, part: Packed, ranges: Iterable[tuple[int, int]]) -> None:
    """Hold rows, columns and gathered rows of a packed matrix [37, 512] against those of the scheme that it came from."""
    for rows in ranges:
        assert agree(found.rows(*rows).dequantize(), part.rows(*rows).dequantize())
    assert agree(found.columns(256, 512).dequantize(), part.columns(256, 512).dequantize())
    ids = torch.tensor([36, 0, 17, 17])
    assert agree(found.gather(ids).dequantize(), part.gather(ids).dequantize())
    with pytest.raises(ValueError, match="multiples of"):
        found.columns(0, 16)
    with pytest.raises(ValueError, match="single matrix"):
        found.expert(0)


@pytest.mark.parametrize("name", HALVES)
def test_every_block_type_keeps_its_values(name: str) -> None:
    part = blocks(name)
    found = cpu_packed(part)
    assert agree(found.dequantize(), part.dequantize())
    assert (found.scheme, found.shape) == (f"cpu-packed-{name}", part.shape)


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_keeps_its_values(bits: int, group: int, dtype: torch.dtype) -> None:
    part = affine.quantize(scales(ROWS, 256).to(dtype), bits, group)
    assert agree(cpu_packed(part).dequantize(), part.dequantize())


def test_affine_with_two_dtypes_keeps_its_values() -> None:
    part = affine.quantize(scales(ROWS, 64).half(), 4, 32)
    mixed = affine.Affine(part.codes, part.scales, part.biases.bfloat16(), 4, 32)
    assert agree(cpu_packed(mixed).dequantize(), mixed.dequantize())


def zero_points(bits: int, groups: int) -> Tensor:
    """Make packed zero points, int32 [words, groups], of ROWS rows."""
    return words(-(-ROWS * bits // 32), groups)


INTEGERS: dict[str, Callable[[], Packed]] = {
    **{
        f"{bits} bits": lambda bits=bits: from_packed(words(ROWS, 256 * bits // 32), scales(ROWS, 8), bits, 256)
        for bits in range(1, 9)
    },
    **{
        f"{bits} bits, zero points": lambda bits=bits: from_packed(
            words(ROWS, 256 * bits // 32), scales(ROWS, 8).half(), bits, 256, zeros=zero_points(bits, 8)
        )
        for bits in (2, 4, 8)
    },
    "no straddling": lambda: from_packed(words(ROWS, 320 // 6 + 1), scales(ROWS, 10).bfloat16(), 5, 320),
    "bytes, scale of a row": lambda: from_packed(words(ROWS, 32).view(torch.uint8), scales(ROWS, 1), 4, 256),
    "GPTQ": lambda: from_gptq(words(32, ROWS), words(2, -(-ROWS // 8)), scales(2, ROWS).half(), 4),
    "AWQ": lambda: from_awq(words(256, 5), words(4, 5), scales(4, 40).half()),
    "int8": lambda: from_values(words(ROWS, 64).view(torch.int8), scales(ROWS)),
    "int8, scale of the tensor": lambda: from_values(words(ROWS, 64).view(torch.int8), scales()),
    "int8, zero points": lambda: from_values(
        words(ROWS, 64).view(torch.int8), scales(ROWS).half(), zeros=words(ROWS, 1).to(torch.int8)[:, 0]
    ),
    "int8, blocks": lambda: from_values(words(ROWS, 64).view(torch.int8), scales(3, 4), block=(16, 64)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_keep_their_values(name: str) -> None:
    part = INTEGERS[name]()
    assert agree(cpu_packed(part).dequantize(), part.dequantize())


def test_zero_points_beside_float32_scales_cost_one_rounding() -> None:
    """The bias is rounded, and the sum: each by half a unit in the last place of at most 15 scales."""
    part = from_packed(words(ROWS, 32), scales(ROWS, 8), 4, 256, zeros=zero_points(4, 8))
    error = (cpu_packed(part).dequantize() - part.dequantize()).abs()
    largest = scales(ROWS, 8).abs().repeat_interleave(32, 1) * 15
    assert (error <= largest * 2.0**-23).all()
    assert error.any()


@pytest.mark.parametrize("factor", [None, torch.tensor([3.7])])
def test_four_bit_floats_keep_their_values(factor: Tensor | None) -> None:
    """Codes are doubled and scales halved, which is exact; NaN scales stay NaN."""
    every = torch.arange(256, dtype=torch.uint8).repeat(ROWS, 1)
    assert agree(cpu_packed(nvfp4 := from_mlx(words(ROWS, 512), every, 4096, factor)).dequantize(), nvfp4.dequantize())
    if factor is None:
        assert agree(cpu_packed(mxfp4 := from_mlx(words(ROWS, 1024), every, 8192)).dequantize(), mxfp4.dequantize())


def every_float8(columns: int) -> Tensor:
    """Make a matrix in which every code occurs, those that are not numbers among them."""
    return torch.arange(ROWS * columns, dtype=torch.int64).mul(7).to(torch.uint8).view(ROWS, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bit_floats_keep_their_values(dtype: torch.dtype) -> None:
    """One scale for the tensor, for each row, for blocks; and powers of two for 32 columns, NaN among them."""
    values = every_float8(COLUMNS).view(torch.float8_e4m3fn)
    for found in (
        from_values(values, scales(1).to(dtype)),
        from_values(values, scales(ROWS).to(dtype)),
        from_values(values, scales(3, 4).to(dtype), block=(16, 128)),
    ):
        packed = cpu_packed(found)
        assert packed.layout.codes == E4M3
        assert agree(packed.dequantize(), found.dequantize())
        if found.group:
            check_cuts(packed, found, ((0, 37), (16, 37), (5, 21), (36, 37)))
    powers = torch.arange(ROWS * 16, dtype=torch.int64).to(torch.uint8).view(ROWS, 16)
    mxfp8 = from_mlx(every_float8(COLUMNS).view(torch.int32), powers, COLUMNS)
    assert isinstance(mxfp8, Micro)
    packed = cpu_packed(mxfp8)
    assert packed.scheme == "cpu-packed-mxfp8"
    assert agree(packed.dequantize(), mxfp8.dequantize())
    check_cuts(packed, mxfp8, ((0, 37), (16, 37), (5, 21), (36, 37)))


def scattered(seed: int, columns: int = COLUMNS) -> ScaledInt:
    groups = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) // 128
    return from_gptq(words(columns // 8, 32), words(columns // 128, 4), scales(columns // 128, 32).half(), 4, group_of=groups)


def test_scattered_groups_keep_their_values() -> None:
    """Their columns lie sorted by group; rows, values and gathered rows come in the order of the file."""
    for found in (scattered(1), from_packed(words(ROWS, 64), scales(ROWS, 4), 4, 512, group_of=scattered(2).group_of)):
        packed = cpu_packed(found)
        assert packed.order is not None
        assert sorted(packed.order.tolist()) == list(range(COLUMNS))
        assert agree(packed.dequantize(), found.dequantize())
        assert agree(packed.rows(5, 21).dequantize(), found.rows(5, 21).dequantize())
        assert agree(packed.gather(torch.tensor([3, 0, 17])).dequantize(), found.gather(torch.tensor([3, 0, 17])).dequantize())
        with pytest.raises(ValueError, match="scattered"):
            packed.columns(0, 256)


def test_parts_that_are_sorted_otherwise_are_told_apart() -> None:
    one, same, other = (cpu_packed(scattered(seed)) for seed in (1, 1, 2))
    plain = cpu_packed(blocks("Q8_0"))
    assert [part.scheme for part in one_order([one, same])] == ["cpu-packed-gptq4-indexedz"] * 2
    assert [part.scheme for part in one_order([one, other])] == ["cpu-packed-gptq4-indexedz-apart"] * 2
    assert [part.scheme for part in one_order([plain, one])] == ["cpu-packed-Q8_0", "cpu-packed-gptq4-indexedz-apart"]
    assert one_order([plain, plain]) == (plain, plain)


def test_what_has_no_form_as_panels_stays_as_it_is() -> None:
    fp8 = from_values(words(ROWS, 12).view(torch.float8_e4m3fn), scales(ROWS))
    zeros = from_values(words(ROWS, 16).view(torch.float8_e4m3fn), scales(ROWS), zeros=torch.ones(ROWS, dtype=torch.int8))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    uneven = from_packed(words(ROWS, 8), scales(ROWS, 2), 4, 64, group_of=(order // 31).clamp(max=1))
    narrow = Blocks(torch.zeros(ROWS, 36, dtype=torch.uint8), TYPES["Q4_0"]).columns(0, 32)
    short = from_packed(words(ROWS, 10), scales(ROWS, 2), 4, 80, group=64)
    ungrouped = from_packed(words(ROWS, 6), scales(ROWS, 1), 4, 48)
    assert [pack_for_cpu(part) for part in (fp8, zeros, uneven, short, ungrouped)] == [None] * 5
    assert isinstance(fp8, ScaledInt)
    assert pack_for_cpu(cpu_packed(narrow)) is None


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q5_1", "NVFP4", "Q2_K"])
def test_cuts_agree_with_those_of_the_scheme(name: str) -> None:
    part = blocks(name)
    found = cpu_packed(part)
    check_cuts(found, part, ((0, 16), (16, 37), (16, 20), (3, 30), (35, 36), (0, 0), (30, 99)))
    assert found.rows(16, 37).data.data_ptr() == found.data[1].data_ptr()
    right = found.columns(256, 512)
    assert agree(right.rows(16, 37).dequantize(), part.columns(256, 512).rows(16, 37).dequantize())
    assert right.data.untyped_storage().data_ptr() == found.data.untyped_storage().data_ptr()


def test_stacks_are_packed_expert_by_expert() -> None:
    part = blocks("Q4_0", 3)
    apart = Stack(tuple(part.expert(index) for index in range(3)))
    for stacked in (part, apart):
        found = cpu_packed(stacked)
        assert agree(found.dequantize(), part.dequantize())
        assert agree(found.expert(2).dequantize(), part.expert(2).dequantize())
        assert agree(found.rows(5, 20).dequantize(), part.rows(5, 20).dequantize())
        assert agree(found.gather(torch.tensor([1, 36])).dequantize(), part.gather(torch.tensor([1, 36])).dequantize())
        with pytest.raises(ValueError, match="stack"):
            found.matrix()


def test_a_matrix_is_described_for_the_kernels() -> None:
    found = cpu_packed(affine.quantize(scales(ROWS, 256).bfloat16(), 8, 64))
    matrix = found.rows(16, 37).matrix()
    assert (matrix.data, matrix.rows, matrix.columns) == (found.data.data_ptr() + matrix.stride, 21, 256)
    assert (matrix.codes, matrix.scales, matrix.group, matrix.has_bias, matrix.offset) == (S8, 1, 64, 1, 128)
    assert matrix.stride % 64 == 0
    assert matrix.data % 64 == 0


@pytest.mark.parametrize(
    ("layout", "columns", "nbytes"),
    [
        (PackedLayout(U4, F16, 32), 64, 2 * (32 + 256)),
        (PackedLayout(U6, F32, 64, has_bias=True), 64, 64 + 64 + 2 * 384),
        (PackedLayout(S8, F16, 16, has_bias=True), 32, 64 + 64 + 512),
        (PackedLayout(U4, SUPER32, 32), 256, 64 + 8 * (32 + 256)),
        (PackedLayout(U6, SUPER16, 16), 512, 2 * (32 + 8 * (32 + 384))),
    ],
)
def test_panels_are_as_long_as_the_layout_says(layout: PackedLayout, columns: int, nbytes: int) -> None:
    assert layout.panel_bytes(columns) == nbytes
    assert layout.stride(columns) == -(-nbytes // 64) * 64


def test_the_first_bytes_of_a_panel_are_where_kernels_look_for_them() -> None:
    """Scales first, one a row; then, of row r, columns 4j.. in the low and 16 + 4j.. in the high nibbles at 64 j + 4 r."""
    codes = torch.randint(0, 16, (16, 32), dtype=torch.uint8)
    scale = torch.rand(16, 1).half()
    (panel,) = to_panels(UnpackedWeight(PackedLayout(U4, F16, 32), codes, (scale,)))
    assert torch.equal(panel[:32].view(torch.float16), scale[:, 0])
    for row, j, c in ((0, 0, 0), (5, 2, 3), (15, 3, 1)):
        assert panel[32 + 64 * j + 4 * row + c] == codes[row, 4 * j + c] + 16 * codes[row, 16 + 4 * j + c]


@pytest.mark.parametrize(("kind", "top"), [(U4, 16), (U6, 64), (S8, 256)])
def test_panels_come_apart_as_they_were_made(kind: int, top: int) -> None:
    codes = torch.randint(0, top, (20, 96), dtype=torch.uint8)
    grid = UnpackedWeight(PackedLayout(kind, F32, 16, has_bias=True), codes, (torch.rand(20, 6), torch.rand(20, 6)))
    found = from_panels(to_panels(grid), grid.layout, 96)
    assert torch.equal(found.codes[:20], codes)
    assert not found.codes[20:].any()
    assert all(torch.equal(one[:20], other) for one, other in zip(found.arrays, grid.arrays, strict=True))


def test_rows_that_come_in_pieces_are_joined() -> None:
    part = blocks("Q8_0", 2)
    pieces = [part.expert(index).rows(*rows) for index in range(2) for rows in ((0, 32), (32, ROWS))]
    assert torch.equal(join(pieces, part.shape).data, cpu_packed(part).data)


def test_a_packed_weight_is_used_like_any_other() -> None:
    part = blocks("Q6_K").rows(12, 37)  # no extreme scales
    packed, found = Weight((part,)), Weight((cpu_packed(part),))
    assert found.stored == "cpu-packed-Q6_K"
    assert agree(found.gather(torch.tensor([3, 1]), torch.float32), packed.gather(torch.tensor([3, 1]), torch.float32))
    assert agree(found.slice(5, 20).parts[0].dequantize(), packed.slice(5, 20).parts[0].dequantize())  # type: ignore[union-attr]
    tiles = [each.dequantize() for each in found.row_chunks(7 * COLUMNS) if not isinstance(each, Tensor)]
    assert agree(torch.cat(tiles), part.dequantize())
    assert cpu_layout_of(part) is not None
