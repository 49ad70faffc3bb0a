"""Native products with dense matrices against the reference, at every processor level that the library has here.

Owns the grid of stored types, columns and rows, and views into larger tensors. Read `test_native_packed.py` for the packed ones.
Shape letters: N rows, D columns, F outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.ops import reference
from gemcutter.quant import Weight

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

CODES = {torch.bfloat16: 3, torch.float16: 4, torch.float32: 5}
FLOAT_ROWS, BF16_ROWS = 2, 1
TOLERANCE = 3e-6  # largest difference over largest value
ROWS = (1, 2, 3, 4, 5, 8, 9, 14, 15, 31, 70)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(part: Tensor) -> native.Matrix:
    return native.Matrix(
        data=part.data_ptr(),
        rows=part.shape[0],
        columns=part.shape[1],
        stride=part.stride(0) * part.element_size(),
        codes=CODES[part.dtype],
    )


def linear(x_ND: Tensor, parts: Sequence[Tensor], activations: int = FLOAT_ROWS) -> Tensor:
    library = native.load_library()
    assert library is not None
    out = torch.full((x_ND.shape[0], sum(part.shape[0] for part in parts)), torch.nan)
    structs = (native.Matrix * len(parts))(*map(matrix, parts))
    x, to = ctypes.c_void_p(x_ND.data_ptr()), ctypes.c_void_p(out.data_ptr())
    assert library.gc_linear(structs, len(parts), x, ctypes.c_int64(x_ND.shape[0]), activations, to) == 0
    return out


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 37, 64, 256, 300, 1000, 3104])
@pytest.mark.usefixtures("level")
def test_linear(columns: int, dtype: torch.dtype) -> None:
    parts = tuple(randn(rows, columns, seed=rows).to(dtype) for rows in (16, 35, 3))
    for rows in ROWS:
        x_ND = randn(rows, columns, seed=100 + rows)
        assert_close(linear(x_ND, parts), reference.linear(x_ND, Weight(parts)))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("level")
def test_threads(threads: int) -> None:
    library = native.load_library()
    assert library is not None
    before = library.gc_threads()
    parts = (randn(333, 96, seed=1).bfloat16(),)
    library.gc_set_threads(threads)
    try:
        for rows in (1, 4, 300):
            x_ND = randn(rows, 96, seed=rows)
            assert_close(linear(x_ND, parts), reference.linear(x_ND, Weight(parts)))
    finally:
        library.gc_set_threads(before)


@pytest.mark.parametrize("columns", [101, 64])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.usefixtures("level")
def test_views_read_nothing_else(dtype: torch.dtype, columns: int) -> None:
    """A matrix may be some rows and columns of a larger tensor, at any offset; what lies around it is poison."""
    around = torch.full((60, 120), torch.nan).to(dtype)
    part = around[11:44, 3 : 3 + columns]
    part.copy_(randn(*part.shape))
    for rows in (1, 6, 20, 40):
        x_ND = randn(rows, columns, seed=rows)
        assert_close(linear(x_ND, (part,)), reference.linear(x_ND, Weight((part.contiguous(),))))


@pytest.mark.usefixtures("level")
def test_rows_rounded_to_bfloat16() -> None:
    parts = (randn(40, 64, seed=1).bfloat16(),)
    for rows in (1, 20):
        x_ND = randn(rows, 64, seed=rows)
        assert_close(linear(x_ND, parts, BF16_ROWS), reference.linear(x_ND.bfloat16().float(), Weight(parts)))


@pytest.mark.parametrize("columns", [32, 96, 1536, 4352, 12_288])
def test_tiles_where_the_matrix_lies(columns: int, level: str) -> None:
    """Panels that are whole and not, one to six blocks of rows; by tiles a row's result is that beside others, bit for bit."""
    parts = tuple(randn(rows, columns, seed=rows).bfloat16() for rows in (16, 35, 3))
    most = {4352: 96, 12_288: 32}.get(columns, 48)  # in one go; more rows are multiplied otherwise
    x_ND = randn(most + 1, columns, seed=7).bfloat16().float()
    wanted, together = reference.linear(x_ND, Weight(parts)), linear(x_ND[:most], parts, BF16_ROWS)
    for rows in (1, 2, 15, 16, 17, 31, most - 1, most, most + 1):
        found = linear(x_ND[:rows], parts, BF16_ROWS)
        assert_close(found, wanted[:rows], TOLERANCE * max(1, columns / 4096))  # sums of 12,288 columns round more often
        assert level != "amx" or rows > most or found.equal(together[:rows])


@pytest.mark.usefixtures("level")
def test_no_number_stays_in_its_row() -> None:
    """What is no number in one row of either side is not met by other rows."""
    part, x_ND = randn(40, 96, seed=1).bfloat16(), randn(20, 96, seed=2)
    whole = linear(x_ND, (part,), BF16_ROWS)
    x_ND[3, 5], x_ND[19, 95], part[17, 0] = torch.nan, torch.inf, torch.nan
    for rows in (4, 16, 20):
        found = linear(x_ND[:rows], (part,), BF16_ROWS)
        assert found[:, 17].isnan().all()
        clean = [row for row in range(rows) if row not in (3, 19)]
        others = [column for column in range(40) if column != 17]
        assert_close(found[clean][:, others], whole[clean][:, others])
        assert not found[[row for row in (3, 19) if row < rows]].isfinite().any()


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.usefixtures("level")
def test_gather(dtype: torch.dtype) -> None:
    library = native.load_library()
    assert library is not None
    for columns in (5, 32, 77):
        table, ids = randn(30, columns).to(dtype), torch.tensor([29, 0, 3, 3])
        out = torch.empty(4, columns)
        pointers = [ctypes.c_void_p(ids.data_ptr()), ctypes.c_int64(4), ctypes.c_void_p(out.data_ptr())]
        assert library.gc_gather(ctypes.byref(matrix(table)), *pointers) == 0
        assert out.equal(table[ids].float())


@pytest.mark.usefixtures("level")
def test_float16_of_all_kinds() -> None:
    """Subnormals, zeros and the largest numbers convert exactly."""
    bits = torch.tensor([0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x5555], dtype=torch.int32).to(torch.int16)
    table = bits.view(torch.float16).repeat(20, 1)
    x_ND = torch.eye(9)
    for rows in (x_ND[:3], x_ND):
        assert linear(rows.contiguous(), (table,)).equal(rows @ table.float().T)
