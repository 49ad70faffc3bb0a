"""What all packed schemes promise alike: cuts and gathers are those of the dequantized matrix, and copy no more than asked.

Knows no scheme's arithmetic: `test_quant_affine.py`, `_micro`, `_blocks` and `_integer` compare that with the formats' own tools.
"""

from __future__ import annotations

import mmap
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor, MappedFile
from gemcutter.quant import affine, gguf_blocks, microscaling, scaled_int
from gemcutter.quant.packed import Packed, Stack, stack

ROWS, COLUMNS, EXPERTS = 16, 512, 3
WORD, BYTE = torch.int32, torch.uint8


def random_bytes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Make random integers of any dtype from random bytes."""
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


def make_samples() -> dict[str, tuple[Packed, int]]:
    """Make one weight of each scheme and layout, with the number of columns at whose multiples it can be cut."""
    torch.manual_seed(0)
    found: dict[str, tuple[Packed, int]] = {}
    for lead in ((ROWS,), (EXPERTS, ROWS)):
        suffix = "" if len(lead) == 1 else " of experts"
        for bits, group in ((1, 8), (2, 64), (3, 64), (4, 32), (5, 128), (6, 64), (8, 16)):
            words = random_bytes(*lead, COLUMNS * bits // 32, dtype=WORD)
            scales, biases = torch.randn(2, *lead, COLUMNS // group).bfloat16()
            weight = affine.from_arrays(words, scales, biases, COLUMNS)
            found[f"{weight.scheme}{suffix}"] = (weight, group)
        for bits, group in ((4, 32), (8, 32), (4, 16)):
            words, scales = random_bytes(*lead, COLUMNS * bits // 32, dtype=WORD), random_bytes(*lead, COLUMNS // group)
            layout = microscaling.from_mlx(words, scales, COLUMNS)
            found[f"{layout.scheme}{suffix}"] = (layout, group)
        half, factor = random_bytes(*lead, COLUMNS // 2), torch.rand(lead[:-1] or (1,))
        dialect = microscaling.from_compressed(half, random_bytes(*lead, COLUMNS // 16), factor)
        found[f"compressed-tensors nvfp4{suffix}"] = (dialect, 16)
        for kind in gguf_blocks.TYPES.values():
            data = random_bytes(*lead, kind.row_bytes(COLUMNS))
            found[f"{kind.name}{suffix}"] = (gguf_blocks.from_arrays(data, kind.name, (*lead, COLUMNS)), kind.values)
        for bits in (2, 3, 8):
            words = random_bytes(*lead, COLUMNS * bits // 32, dtype=WORD)
            scaled = scaled_int.from_packed(words, torch.rand(*lead, COLUMNS // 64), bits, COLUMNS)
            found[f"{scaled.scheme}{suffix}"] = (scaled, 64)
        values, block_scales = random_bytes(*lead, COLUMNS, dtype=torch.int8), torch.rand(*lead[:-1], 2, 4)
        found[f"int8{suffix}"] = (scaled_int.from_values(values, torch.rand(*lead, 1)), 1)
        fp8 = scaled_int.from_values(values.view(torch.float8_e4m3fn), block_scales, block=(12, 128))
        found[f"fp8 in blocks{suffix}"] = (fp8, 128)
    return found | make_integer_oddities()


def make_integer_oddities() -> dict[str, tuple[Packed, int]]:
    """Make integer layouts that only single matrices have."""
    words, scales = random_bytes(ROWS, -(-COLUMNS // 10), dtype=WORD), torch.rand(ROWS, COLUMNS // 64)
    zeros = random_bytes(2, COLUMNS // 64, dtype=WORD)
    columns_first = random_bytes(COLUMNS // 8, ROWS, dtype=WORD), random_bytes(4, ROWS // 8, dtype=WORD), torch.rand(4, ROWS)
    shuffled = torch.randperm(COLUMNS) // 128
    rows_in_words = random_bytes(COLUMNS, ROWS // 8, dtype=WORD), random_bytes(4, ROWS // 8, dtype=WORD), torch.rand(4, ROWS)
    gemma = random_bytes(ROWS, COLUMNS // 4)
    return {
        "words3": (scaled_int.from_packed(words, scales[:, :1], 3, COLUMNS), 10),
        "packed4 with zero points": (
            scaled_int.from_packed(random_bytes(ROWS, 64, dtype=WORD), scales, 4, COLUMNS, zeros=zeros),
            64,
        ),
        "packed2 of a row": (scaled_int.from_packed(gemma, scales[:, :1], 2, COLUMNS), 4),
        "gptq4": (scaled_int.from_gptq(*columns_first, 4), 128),
        "gptq4 indexed": (scaled_int.from_gptq(*columns_first, 4, group_of=shuffled), 8),
        "awq4": (scaled_int.from_awq(*rows_in_words), 128),
    }


SAMPLES = make_samples()
every_scheme = pytest.mark.parametrize("name", SAMPLES)


def same(one: Tensor, other: Tensor) -> bool:
    """Say whether two float32 tensors are equal bit for bit, all NaN taken for one."""
    bits = [torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in (one, other)]
    return torch.equal(*bits)


@every_scheme
def test_dequantize_gives_float32_in_the_logical_shape(name: str) -> None:
    weight, _ = SAMPLES[name]
    values = weight.dequantize()
    assert values.dtype == torch.float32
    assert values.shape == weight.shape
    assert weight.shape[-2:] == (ROWS, COLUMNS)
    assert values.is_contiguous()


@every_scheme
def test_cuts_are_slices_of_the_dequantized_matrix(name: str) -> None:
    weight, run = SAMPLES[name]
    values, ids = weight.dequantize(), torch.tensor([7, 0, 7, 15])
    assert same(weight.rows(3, 9).dequantize(), values[..., 3:9, :])
    assert same(weight.gather(ids).dequantize(), values[..., ids, :])
    for start, stop in ((0, run), (run, 2 * run), (run, COLUMNS), (0, COLUMNS)):
        if start < stop <= COLUMNS:
            cut = weight.columns(start, stop)
            assert cut.shape == (*weight.shape[:-1], stop - start)
            assert same(cut.dequantize(), values[..., start:stop])
    cut = weight.rows(1, 16).columns(0, run).rows(4, 10).gather(torch.tensor([5, 1]))
    assert same(cut.dequantize(), values[..., [10, 6], :run])
    assert cut.scheme == weight.scheme


@every_scheme
def test_experts_are_slices_or_refused(name: str) -> None:
    weight, run = SAMPLES[name]
    if len(weight.shape) == 2:
        with pytest.raises(ValueError, match="single matrix"):
            weight.expert(0)
        return
    values = weight.dequantize()
    assert same(weight.expert(2).dequantize(), values[2])
    assert same(weight.columns(0, run).expert(1).rows(2, 4).dequantize(), values[1, 2:4, :run])


@every_scheme
def test_columns_are_cut_at_boundaries_only(name: str) -> None:
    weight, run = SAMPLES[name]
    wrong = [(0, COLUMNS + run), (-run, run), (run, run), (2 * run, run)]
    if run > 1:
        wrong += [(1, COLUMNS), (0, run - 1), (run, 2 * run - 1), (run // 2, COLUMNS)]
    for start, stop in wrong:
        with pytest.raises(ValueError, match=f"^columns {start} to {stop}: multiples of {run} up to {COLUMNS} expected$"):
            weight.columns(start, stop)


@every_scheme
def test_views_copy_nothing(name: str) -> None:
    weight, run = SAMPLES[name]
    owned = {array.untyped_storage().data_ptr() for array in tensors(weight)}
    views = [weight.rows(3, 9), weight.columns(run, COLUMNS) if run < COLUMNS else weight]
    if len(weight.shape) == 3:
        views.append(weight.expert(1))
    for view in views:
        assert {array.untyped_storage().data_ptr() for array in tensors(view)} <= owned


@every_scheme
def test_nbytes_add_up(name: str) -> None:
    weight, _ = SAMPLES[name]
    extra = weight.group_of.nbytes if isinstance(weight, scaled_int.ScaledInt) and weight.group_of is not None else 0
    parts = weight.rows(0, 6).nbytes + weight.rows(6, 16).nbytes
    assert parts >= weight.nbytes - extra > 0
    assert parts - weight.nbytes <= max(extra, 4 * EXPERTS)  # what belongs to no row is in both parts
    assert weight.gather(torch.arange(4)).nbytes < weight.nbytes


@every_scheme
def test_nothing_can_be_gathered(name: str) -> None:
    weight, run = SAMPLES[name]
    none = torch.empty(0, dtype=torch.int64)
    assert weight.gather(none).dequantize().shape == (*weight.shape[:-2], 0, COLUMNS)
    assert weight.columns(0, run).gather(none).dequantize().shape == (*weight.shape[:-2], 0, run)


def test_stacked_matrices_are_one_weight() -> None:
    whole, _ = SAMPLES["affine4g32 of experts"]
    joined = stack([whole.expert(index) for index in range(EXPERTS)])
    values = whole.dequantize()
    assert (joined.shape, joined.scheme, joined.nbytes) == (whole.shape, whole.scheme, whole.nbytes)
    assert same(joined.dequantize(), values)
    assert same(joined.rows(2, 5).dequantize(), values[:, 2:5])
    assert same(joined.columns(32, 96).dequantize(), values[..., 32:96])
    assert same(joined.expert(1).dequantize(), values[1])
    assert same(joined.gather(torch.tensor([4, 2])).dequantize(), values[:, [4, 2]])


def test_dense_matrices_are_stacked_without_a_copy() -> None:
    items = [torch.randn(ROWS, COLUMNS).bfloat16() for _ in range(EXPERTS)]
    joined, values = stack(items), torch.stack(items).float()
    assert (joined.shape, joined.scheme, joined.nbytes) == ((EXPERTS, ROWS, COLUMNS), "bfloat16", values.nbytes // 2)
    assert same(joined.dequantize(), values)
    assert same(joined.rows(2, 5).columns(1, 4).dequantize(), values[:, 2:5, 1:4])
    assert same(joined.gather(torch.tensor([4, 2])).dequantize(), values[:, [4, 2]])
    assert joined.expert(1) is items[1]
    cut = joined.rows(2, 5).columns(3, 9).expert(2)
    assert isinstance(cut, Tensor)
    assert cut.untyped_storage().data_ptr() == items[2].untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=f"columns 3 to {COLUMNS + 1}: multiples of 1 up to {COLUMNS} expected"):
        joined.columns(3, COLUMNS + 1)


def test_unlike_matrices_are_not_stacked() -> None:
    matrix, other, experts = (SAMPLES[name][0] for name in ("affine4g32", "Q8_0", "Q8_0 of experts"))
    dense = matrix.dequantize()
    unlike_dense = [[matrix, dense], [dense, dense.half()], [dense, dense[:2]], [dense[None], dense[None]]]
    for items in ([], [matrix, other], [matrix, matrix.rows(0, 2)], [experts, experts], *unlike_dense):
        with pytest.raises(ValueError, match="matrices of one scheme and shape expected, found"):
            stack(items)


# ---- memory: a table stays in its file ----

TABLE_ROWS, TABLE_COLUMNS = 32768, 2560  # ten layers of 256 columns: 40 MB at 4 bits


def map_zeros(path: Path, dtype: str, shape: tuple[int, ...], itemsize: int) -> Tensor:
    """Map a sparse file of zeros as the loader maps a table that is only gathered from."""
    nbytes = shape[0] * shape[1] * itemsize
    with open(path, "wb") as file:
        file.truncate(nbytes)
    mapped = MappedFile(path)
    array = LazyTensor(path.name, dtype, shape, nbytes, 0, mapped).torch()
    mapped.expect_scattered_reads(0, nbytes)
    return array


def resident_bytes(path: Path) -> int:
    """Count the bytes of a mapped file that this process has touched."""
    text = Path("/proc/self/smaps").read_text()
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    sizes = [re.search(r"^Rss:\s+(\d+) kB", each, re.MULTILINE) for each in mappings if str(path) in each.split("\n", 1)[0]]
    assert sizes, "the file is not mapped"
    return sum(int(size[1]) * 1024 for size in sizes if size)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
@pytest.mark.parametrize("scheme", ["affine", "micro", "blocks", "integer"])
def test_gathering_from_a_mapped_table_touches_what_it_needs(scheme: str, tmp_path: Path) -> None:
    path, rows, columns = tmp_path / "table.bin", TABLE_ROWS, TABLE_COLUMNS
    table: Packed
    if scheme == "affine":
        scales = torch.ones(rows, columns // 64)
        table = affine.from_arrays(map_zeros(path, "U32", (rows, columns // 8), 4), scales, scales, columns)
    elif scheme == "micro":
        table = microscaling.from_mlx(map_zeros(path, "U32", (rows, columns // 8), 4), random_bytes(rows, columns // 32), columns)
    elif scheme == "blocks":
        data = map_zeros(path, "U8", (rows, columns // 256 * 144), 1)
        table = gguf_blocks.from_arrays(data, "Q4_K", (rows, columns))
    else:
        data = map_zeros(path, "U8", (rows, columns // 2), 1)
        table = scaled_int.from_packed(data, torch.ones(rows, columns // 256), 4, columns)
    ids = torch.arange(100, rows, rows // 8)
    before = resident_bytes(path)
    values = table.columns(3 * 256, 5 * 256).gather(ids).dequantize()
    touched = resident_bytes(path) - before
    assert values.shape == (8, 512)
    assert 0 < touched <= 2 * len(ids) * mmap.PAGESIZE  # a row's cut straddles two pages at most
    assert table.nbytes > 40_000_000


def tensors(weight: Packed) -> list[Tensor]:
    """List the tensors of a weight."""
    if isinstance(weight, Stack):
        return [array for item in weight.items for array in tensors(item)]
    held = [getattr(weight, each.name) for each in fields(weight)]  # type: ignore[arg-type]
    return [array for array in held if isinstance(array, Tensor)]
