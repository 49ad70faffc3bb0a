"""Weights packed for GPUs: all values survive the way to words bit for bit, and words are cut like any packed weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.quant import Weight, affine
from gemcutter.quant.cpu_layout import S8, U4, U6
from gemcutter.quant.gpu_packing import (
    F4,
    F8,
    GpuPackedWeight,
    adjoin,
    from_words,
    gpu_layout_of,
    pack_for_gpu,
    place,
    span_of,
    to_words,
)
from gemcutter.quant.microscaling import from_mlx
from gemcutter.quant.packed import Packed, Stack
from gemcutter.quant.packing import GpuPacker
from gemcutter.quant.scaled_int import from_packed, from_values
from tests.unit.test_cpu_packing import COLUMNS, DTYPES, INTEGERS, ROWS, agree, blocks, check_cuts, scales, words
from tests.unit.test_quant_gguf_blocks import HALVES


def gpu_packed(part: Packed) -> GpuPackedWeight:
    found = pack_for_gpu(part, "cpu")
    assert found is not None
    return found


def floats(*shape: int) -> Tensor:
    """Make random bytes that are 8-bit floats other than NaN."""
    found = words(*shape).view(torch.uint8)
    return torch.where((found & 0x7F) == 0x7F, 0x30, found)


@pytest.mark.parametrize("name", HALVES)
def test_every_block_type_keeps_its_values(name: str) -> None:
    part = blocks(name)
    found = gpu_packed(part)
    assert agree(found.dequantize(), part.dequantize())
    assert (found.scheme, found.shape) == (f"gpu-packed-{name}", part.shape)


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_keeps_its_values(bits: int, dtype: torch.dtype) -> None:
    for group in (32, 64, 128):
        part = affine.quantize(scales(ROWS, 256).to(dtype), bits, group)
        assert agree(gpu_packed(part).dequantize(), part.dequantize())


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_keep_their_values(name: str) -> None:
    part = INTEGERS[name]()
    assert agree(gpu_packed(part).dequantize(), part.dequantize())


@pytest.mark.parametrize("factor", [None, torch.tensor([3.7])])
def test_four_bit_floats_keep_their_values_and_their_bits(factor: Tensor | None) -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(ROWS, 1)
    nvfp4 = from_mlx(words(ROWS, 512), every, 4096, factor)
    found = gpu_packed(nvfp4)
    assert agree(found.dequantize(), nvfp4.dequantize())
    assert (found.layout.codes, found.codes.nbytes) == (F4, ROWS * 4096 // 2)
    mxfp4 = from_mlx(words(ROWS, 1024), every, 8192)
    assert agree(gpu_packed(mxfp4).dequantize(), mxfp4.dequantize())


@pytest.mark.parametrize("scale", [scales(ROWS), scales(), scales(ROWS).bfloat16()])
def test_eight_bit_floats_keep_their_values(scale: Tensor) -> None:
    part = from_values(floats(ROWS, 16).view(torch.float8_e4m3fn), scale)
    found = gpu_packed(part)
    assert agree(found.dequantize(), part.dequantize())
    assert found.layout.codes == F8


def test_eight_bit_floats_with_scales_of_blocks_and_of_groups() -> None:
    blocked = from_values(floats(ROWS, 64).view(torch.float8_e4m3fn), scales(3, 4), block=(16, 64))
    mxfp8 = from_mlx(floats(ROWS, 16).view(torch.int32), torch.arange(120, 122, dtype=torch.uint8).expand(ROWS, 2), 64)
    for part in (blocked, mxfp8):
        assert agree(gpu_packed(part).dequantize(), part.dequantize())


def test_what_has_no_form_as_stripes_stays_as_it_is() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    indexed = from_packed(words(ROWS, 8), scales(ROWS, 2), 4, 64, group_of=order // 32)
    short = from_packed(words(ROWS, 10), scales(ROWS, 2), 4, 80, group=64)
    narrow = from_values(floats(ROWS, 12).view(torch.float8_e4m3fn), scales(ROWS))
    not_a_number = from_values(torch.full((2, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn), scales(2))
    assert [pack_for_gpu(part, "cpu") for part in (indexed, short, narrow, not_a_number)] == [None] * 4
    assert gpu_layout_of(not_a_number) is not None


@pytest.mark.parametrize(("kind", "top"), [(U4, 16), (U6, 64), (S8, 256), (F4, 16), (F8, 256)])
def test_words_hold_columns_where_kernels_look_for_them(kind: int, top: int) -> None:
    """Bits b * k and up of word j of a vector hold its column 4 k + j; the upper two of six bits lie at 2 k."""
    codes = torch.randint(0, top, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    found, high = to_words(codes, kind)
    bits, columns = (8, 16) if top == 256 else (4, 32)
    assert found.shape == (5, 64 * bits // 32)
    for row, stripe_, k, j in ((0, 0, 0, 0), (4, 1, 3, 2), (2, 1, columns // 4 - 1, 3)):
        low = int(found[row, 4 * stripe_ + j]) >> bits * k & (1 << bits) - 1
        upper = 0 if high is None else (int(high[row, 4 * stripe_ + j]) >> 2 * k & 3) << 4
        assert low | upper == codes[row, columns * stripe_ + 4 * k + j]
    assert torch.equal(from_words(found, high, kind), codes)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q5_1", "NVFP4", "Q2_K"])
def test_cuts_agree_with_those_of_the_scheme(name: str) -> None:
    part = blocks(name)
    found = gpu_packed(part)
    check_cuts(found, part, ((0, 16), (3, 30), (35, 36), (0, 0)))
    right = found.columns(256, 512)
    assert right.codes.untyped_storage().data_ptr() == found.codes.untyped_storage().data_ptr()


def test_stacks_are_packed_expert_by_expert() -> None:
    part = blocks("Q4_0", 3)
    apart = Stack(tuple(part.expert(index) for index in range(3)))
    for stacked in (part, apart):
        found = gpu_packed(stacked)
        assert agree(found.dequantize(), part.dequantize())
        assert agree(found.expert(2).dequantize(), part.expert(2).dequantize())
        assert agree(found.rows(5, 20).dequantize(), part.rows(5, 20).dequantize())


def test_mapped_pages_are_given_back_while_a_part_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemcutter.quant.gpu_packing.CHUNK_ELEMENTS", 10 * COLUMNS)
    part, calls = blocks("Q8_0"), list[int]()
    found = pack_for_gpu(part, "cpu", lambda: calls.append(1))
    assert len(calls) == 4
    assert found is not None
    assert agree(found.dequantize(), part.dequantize())


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q4_K"])
def test_parts_are_laid_out_as_one_matrix(name: str) -> None:
    part = blocks(name, 2)
    parts = adjoin([gpu_packed(part.rows(*rows)) for rows in ((0, 16), (16, 20), (20, ROWS))])
    whole = span_of(parts)
    assert isinstance(whole, GpuPackedWeight)
    assert agree(whole.dequantize(), part.dequantize())
    middle = span_of(parts[1:])
    assert isinstance(middle, GpuPackedWeight)
    assert agree(middle.dequantize(), part.rows(16, ROWS).dequantize())
    assert span_of((parts[0], parts[2])) is None
    assert span_of(parts[::-1]) is None
    assert span_of(parts[:1]) is parts[0]


def test_dense_parts_are_laid_out_as_one_matrix() -> None:
    each = [torch.rand(rows, 8) for rows in (3, 1, 5)]
    parts = adjoin(each)
    whole = span_of(parts)
    assert isinstance(whole, Tensor)
    assert torch.equal(whole, torch.cat(each))
    assert span_of(each) is None
    assert span_of((parts[0], parts[2])) is None


def test_parts_of_different_forms_stay_apart() -> None:
    one, other, dense = gpu_packed(blocks("Q4_0")), gpu_packed(blocks("Q8_0")), torch.rand(3, COLUMNS)
    for parts in ((one, other), (one, dense), (dense, dense.half()), (blocks("Q4_0"), one)):
        assert adjoin(parts) == parts
        assert span_of(parts) is None
    assert span_of((blocks("Q4_0"),)) is None


def test_packed_weights_of_all_kinds_move_to_a_device() -> None:
    for part in (blocks("Q4_0", 2), INTEGERS["AWQ"](), INTEGERS["2 bits, zero points"](), Stack((blocks("Q8_0"),) * 2)):
        moved = place(part, "meta")
        assert moved.shape == part.shape
        assert pack_for_gpu(part, "cpu") is not None
    assert place(gpu_packed(blocks("Q6_K")), "meta").device == torch.device("meta")


def test_a_packed_weight_is_used_like_any_other() -> None:
    part = blocks("Q6_K").rows(12, 37)  # no extreme scales
    packed, found = Weight((part,)), Weight((gpu_packed(part),))
    assert found.stored == "gpu-packed-Q6_K"
    assert found.nbytes == 25 * (COLUMNS * 6 // 8 + COLUMNS // 16 + COLUMNS // 256 * 2)
    assert agree(found.gather(torch.tensor([3, 1]), torch.float32), packed.gather(torch.tensor([3, 1]), torch.float32))
    tiles = [each.dequantize() for each in found.row_chunks(7 * COLUMNS) if not isinstance(each, Tensor)]
    assert agree(torch.cat(tiles), part.dequantize())


@pytest.mark.parametrize("quant", [None, "q4"])
def test_a_checkpoint_is_packed_while_it_is_loaded(quant: str | None) -> None:
    """Values stay; the parts of every matrix lie side by side, but for the rows-only table, which stays mapped."""
    checkpoint, cpu = open_checkpoint(DEMO_FOLDER), torch.device("cpu")
    plain, found = (
        load_params(checkpoint, torch.float32, cpu, quant=quant, packer=each) for each in (None, GpuPacker(cpu, torch.float32))
    )
    assert plain.keys() == found.keys()
    for name, param in found.items():
        wanted = plain[name]
        if isinstance(param, Tensor):
            assert torch.equal(param, wanted)
            continue
        assert isinstance(wanted, Weight)
        if name != "embed.ple":
            assert span_of(param.parts) is not None, name
            assert quant is None or "router" in name or param.stored.startswith("gpu-packed-affine"), name
        for one, other in zip(param.parts, wanted.parts, strict=True):
            assert agree(values(one), values(other)), name


def values(part: Tensor | Packed) -> Tensor:
    return part.float() if isinstance(part, Tensor) else part.dequantize()
