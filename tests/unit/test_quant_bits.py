"""Bit streams, planes and tables, against the plainest statement of each: one Python integer, one bit after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.quant.bits import E2M1, as_bytes, float8, look_up, pack, planes, unpack

stable = settings(derandomize=True, deadline=None, max_examples=60)


def read_stream(row: bytes, bits: int) -> list[int]:
    """Read whole values from a little-endian bit stream."""
    stream = int.from_bytes(row, "little")
    return [stream >> start & (1 << bits) - 1 for start in range(0, len(row) * 8 // bits * bits, bits)]


@stable
@given(bits=st.integers(1, 8), row=st.binary(min_size=1, max_size=40))
def test_unpack_reads_a_bit_stream(bits: int, row: bytes) -> None:
    expected = read_stream(row, bits)
    values = unpack(torch.tensor(list(row), dtype=torch.uint8), bits)
    assert values[: len(expected)].tolist() == expected
    assert values.dtype == torch.float32


@stable
@given(bits=st.integers(1, 8), words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5))
def test_unpack_reads_words_that_no_value_straddles(bits: int, words: list[int]) -> None:
    expected = [word >> bits * index & (1 << bits) - 1 for word in words for index in range(32 // bits)]
    stream = b"".join(word.to_bytes(4, "little") for word in words)
    assert unpack(torch.tensor(list(stream), dtype=torch.uint8), bits, 4, torch.uint8).tolist() == expected


@stable
@given(bits=st.integers(1, 8), row=st.lists(st.integers(0, 255), min_size=32, max_size=32))
def test_pack_is_the_inverse_of_unpack(bits: int, row: list[int]) -> None:
    values = torch.tensor(row, dtype=torch.uint8).view(2, 16) & (1 << bits) - 1
    packed = pack(values, bits)
    assert packed.shape == (2, values.shape[-1] * bits // 8)
    assert torch.equal(unpack(packed, bits, dtype=torch.uint8), values)
    assert read_stream(bytes(packed[1].tolist()), bits) == values[1].tolist()


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_reads_strided_views_and_no_rows_at_all(bits: int) -> None:
    wide = torch.randint(0, 256, (5, 6 * bits), dtype=torch.uint8)
    cut = wide[:, bits : 3 * bits]
    assert torch.equal(unpack(cut, bits), unpack(cut.contiguous(), bits))
    assert unpack(wide[:0], bits).shape == (0, 48)


def test_as_bytes_lays_scattered_items_out() -> None:
    words = torch.randint(-(2**31), 2**31, (3, 5), dtype=torch.int32)
    for scattered in (words.t(), words[:1].t(), words[:, 1:2], words[:, ::2]):
        expected = [[byte for word in row for byte in (word & 0xFFFFFFFF).to_bytes(4, "little")] for row in scattered.tolist()]
        assert as_bytes(scattered).tolist() == expected
    assert as_bytes(words[:, 1:3]).data_ptr() == words[:, 1:].data_ptr()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes_hold_a_bit_field_of_all_bytes_each(bits: int) -> None:
    packed = torch.randint(0, 256, (3, 24), dtype=torch.uint8)
    expected = [
        [byte >> shift & (1 << bits) - 1 for start in (0, 12) for shift in range(0, 8, bits) for byte in row[start : start + 12]]
        for row in packed.tolist()
    ]
    assert planes(packed, bits, 12).tolist() == expected


def test_look_up_keeps_shape_and_the_sign_of_zero() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    found = look_up(E2M1, codes)
    assert found.tolist() == [list(E2M1[:8]), list(E2M1[8:])]
    assert found.signbit()[1].all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_float8_equals_the_conversion_of_torch(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(float8(codes, dtype), codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
