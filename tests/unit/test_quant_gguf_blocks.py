"""GGUF's blocks against the formulas of a few types and, where gguf is installed, against its reference, bit for bit."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from gemcutter.quant.gguf_blocks import TYPES, Blocks, from_arrays, quantize
from gemcutter.quant.gguf_codebooks import codebook

# Where the float16 numbers of a block lie.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "MXFP4": (),
    "NVFP4": (),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
    "IQ3_XXS": (0,),
    "IQ2_S": (0,),
    "IQ2_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ1_M": (),  # a quarter in each of four words
    "IQ1_S": (0,),
    "TQ2_0": (64,),
    "TQ1_0": (52,),
}
EXTREMES = (0.0, -0.0, 6e-8, -6e-8, 6e-5, 65504.0, -65504.0, 1.0, -0.3, math.inf, -math.inf, math.nan)


@pytest.fixture(scope="module")
def gguf() -> ModuleType:
    """Return the gguf package, or skip."""
    return pytest.importorskip("gguf", reason="needs the gguf package for comparison: pip install gguf")


def random_blocks(name: str, num_blocks: int) -> Tensor:
    """Make random bytes of blocks, of which the first have extreme scales, [blocks, bytes]."""
    torch.manual_seed(0)
    data = torch.randint(0, 256, (num_blocks, TYPES[name].nbytes), dtype=torch.uint8)
    for order, start in enumerate(HALVES[name]):
        extremes = torch.tensor(EXTREMES if order == 0 else EXTREMES[::-1]).half().view(torch.uint8).view(-1, 2)
        data[: len(EXTREMES), start : start + 2] = extremes
    if name == "IQ1_M":
        spread(data[: len(EXTREMES)], torch.tensor(EXTREMES))
    elif not HALVES[name]:
        data[:256, 0] = torch.arange(256)  # every scale of a byte
    return data


def spread(data: Tensor, scales: Tensor) -> None:
    """Write float16 scales into blocks of IQ1_M: a quarter each into the upper halves of four bytes."""
    bits = scales.half().view(torch.int16).int()
    for quarter, at in enumerate(range(49, 56, 2)):
        data[:, at] = data[:, at] & 15 | (bits >> 4 * quarter & 15).to(torch.uint8) << 4


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two float32 tensors are equal bit for bit, all NaN taken for one."""
    bits = [torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in (one, other)]
    return torch.equal(*bits)


@pytest.mark.parametrize("name", TYPES)
def test_dequantize_equals_gguf(gguf: ModuleType, name: str) -> None:
    kind, data = TYPES[name], random_blocks(name, 600)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.values, kind.nbytes)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data.view(200, -1).numpy(), gguf.GGMLQuantizationType[name])
    weight = from_arrays(data, name, (200, 3 * kind.values))
    assert weight.scheme == name
    assert same(weight.dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("name", TYPES)
def test_a_block_alone_and_none_are_read_too(name: str) -> None:
    kind, data = TYPES[name], random_blocks(name, 300)
    together = from_arrays(data, name, (300, kind.values))
    assert same(together.rows(133, 134).dequantize(), together.dequantize()[133:134])
    assert together.rows(7, 7).dequantize().shape == (0, kind.values)


@pytest.mark.parametrize("name", ["IQ1", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_codebooks_are_those_of_gguf(gguf: ModuleType, name: str) -> None:
    library = getattr(gguf.quants, name.replace("IQ1", "IQ1_S"))
    library.init_grid()
    _, places = np.unique(library.grid, return_inverse=True)
    assert codebook(name).tolist() == places.reshape(library.grid_shape).tolist()


# ---- formulas, one value after the other ----


def half_at(block: bytes, start: int) -> float:
    return float(struct.unpack_from("<e", block, start)[0])


def plain_q4_0(block: bytes) -> list[float]:
    return [half_at(block, 0) * (q - 8) for q in [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]]


def plain_q5_1(block: bytes) -> list[float]:
    d, m, fifths = half_at(block, 0), half_at(block, 2), int.from_bytes(block[4:8], "little")
    nibbles = [byte & 15 for byte in block[8:]] + [byte >> 4 for byte in block[8:]]
    return [float(np.float32(d * (q | (fifths >> index & 1) << 4))) + m for index, q in enumerate(nibbles)]


def plain_q4_k(block: bytes) -> list[float]:
    d, dmin, sc, qs = half_at(block, 0), half_at(block, 2), block[4:16], block[16:]
    out = []
    for index in range(256):
        sub, place = divmod(index, 32)
        if sub < 4:
            scale, minimum = sc[sub] & 63, sc[sub + 4] & 63
        else:
            scale = sc[sub + 4] & 15 | sc[sub - 4] >> 6 << 4
            minimum = sc[sub + 4] >> 4 | sc[sub] >> 6 << 4
        q = qs[sub // 2 * 32 + place] >> 4 * (sub % 2) & 15
        out.append(float(np.float32(np.float32(d * scale) * np.float32(q))) - float(np.float32(dmin * minimum)))
    return out


def plain_q6_k(block: bytes) -> list[float]:
    d, out = half_at(block, 208), []
    for index in range(256):
        part, place = divmod(index, 128)
        quarter, place = divmod(place, 32)
        low = block[64 * part + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
        high = block[128 + 32 * part + place] >> 2 * quarter & 3
        (scale,) = struct.unpack_from("b", block, 192 + index // 16)
        out.append(float(np.float32(d * scale)) * ((low | high << 4) - 32))
    return out


def plain_iq4_nl(block: bytes) -> list[float]:
    levels = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    return [half_at(block, 0) * levels[q] for q in [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]]


def plain_iq3_s(block: bytes) -> list[float]:
    d, low, ninth, signs, scales = half_at(block, 0), block[2:66], block[66:74], block[74:106], block[106:]
    out = []
    for index in range(256):
        four, place = divmod(index, 4)
        pattern = low[four] | (ninth[four // 8] >> four % 8 & 1) << 8
        magnitude = 2 * int(codebook("IQ3_S")[pattern][place]) + 1
        scale = 2 * (scales[index // 64] >> 4 * (index // 32 % 2) & 15) + 1
        out.append(d * scale * (-magnitude if signs[index // 8] >> index % 8 & 1 else magnitude))
    return out


def plain_tq1_0(block: bytes) -> list[float]:
    digits = []
    for start, stop, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        digits += [block[at] * 3**place % 256 * 3 // 256 for place in range(count) for at in range(start, stop)]
    return [half_at(block, 52) * (digit - 1) for digit in digits]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Q4_0", plain_q4_0),
        ("Q5_1", plain_q5_1),
        ("Q4_K", plain_q4_k),
        ("Q6_K", plain_q6_k),
        ("IQ4_NL", plain_iq4_nl),
        ("IQ3_S", plain_iq3_s),
        ("TQ1_0", plain_tq1_0),
    ],
)
def test_dequantize_is_the_formula(name: str, plain: Callable[[bytes], list[float]]) -> None:
    data = random_blocks(name, 60)
    values, num_judged = from_arrays(data, name, (60, TYPES[name].values)).dequantize(), 0
    for row, block in enumerate(bytes(each) for each in data.tolist()):
        if all(math.isfinite(half_at(block, start)) for start in HALVES[name]):  # the others are left to gguf
            assert torch.equal(values[row], torch.tensor(plain(block), dtype=torch.float64).float())
            num_judged += 1
    assert num_judged > 40


# ---- quantizers ----


def varied_rows(scale: float) -> Tensor:
    torch.manual_seed(2)
    rows = torch.randn(32, 256) * scale
    rows[3] = 0
    rows[4] = scale
    rows[5] = (rows[5] / scale * 2).round() / 2 * scale  # many ties
    rows[6, ::2] = -rows[6, 1::2]  # the largest magnitude with both signs
    rows[7, :32] = 0
    return rows


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("scale", [1, 1e-6, 1e-9, 1e4, 1e36])
def test_quantize_equals_gguf(gguf: ModuleType, name: str, scale: float) -> None:
    x = varied_rows(scale)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(quantize(x, name).data, torch.from_numpy(expected))
    stacked = quantize(x.view(4, 8, 256), name)
    assert stacked.shape == (4, 8, 256)
    assert torch.equal(stacked.data.view(32, -1), torch.from_numpy(expected))


@pytest.mark.parametrize(("name", "steps"), [("Q8_0", 127), ("Q4_0", 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_comes_back_within_a_step(name: str, steps: int, dtype: torch.dtype) -> None:
    x = varied_rows(1).to(dtype)
    largest = x.float().abs().view(32, 8, 32).amax(-1, keepdim=True).expand(32, 8, 32).reshape(32, 256)
    error = (quantize(x, name).dequantize() - x.float()).abs()
    # Rounding 127 steps' width to float16 moves the last of them by a sixteenth.
    assert (error <= largest / steps * (0.57 if name == "Q8_0" else 1.01)).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_values_too_small_for_a_scale_become_zero(name: str) -> None:
    assert not quantize(varied_rows(1e-40), name).dequantize().any()


# ---- refusals ----


def a_block(name: str, *shape: int) -> Tensor:
    return torch.zeros(*shape, TYPES[name].nbytes, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: from_arrays(a_block("Q4_0", 2), "Q9_9", (2, 32)), "block type: one of Q4_0, .* expected, found Q9_9"),
        (lambda: from_arrays(a_block("Q4_0", 2), "Q4_0", (2, 33)), "Q4_0: a multiple of 32 columns expected, found 33"),
        (lambda: from_arrays(a_block("Q4_K", 2), "Q4_K", (2, 704)), "Q4_K: a multiple of 256 columns expected, found 704"),
        (lambda: from_arrays(a_block("Q4_0", 2), "Q4_0", (3, 32)), r"Q4_0: 54 bytes expected for \[3, 32\], found 36"),
        (lambda: from_arrays(a_block("Q4_0", 2), "Q4_0", (64,)), r"\[rows, columns\] or .* expected, found \[64\]"),
        (lambda: from_arrays(a_block("Q4_0", 2), "Q4_0", (1, 1, 2, 32)), r"expected, found \[1, 1, 2, 32\]"),
        (lambda: from_arrays(a_block("Q4_0", 2).float(), "Q4_0", (2, 32)), r"Q4_0: bytes \(uint8\) expected, found float32"),
        (lambda: quantize(torch.ones(2, 256), "Q4_K"), "block type: one of Q4_0, Q8_0 expected, found Q4_K"),
        (lambda: quantize(torch.ones(2, 40), "Q8_0"), "Q8_0: a multiple of 32 columns expected, found 40"),
        (lambda: quantize(torch.full((2, 32), math.inf), "Q8_0"), "Q8_0: finite float32, float16 or bfloat16 values expected"),
        (lambda: quantize(torch.ones(2, 32, dtype=torch.int32), "Q8_0"), "values expected"),
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], Blocks], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build()


def test_bytes_are_taken_in_any_shape_and_not_copied() -> None:
    data = random_blocks("Q8_0", 24)
    for given in (data, data.flatten(), data.view(2, 3, 4, 34)):
        weight = from_arrays(given, "Q8_0", (2, 3, 128))
        assert weight.data.data_ptr() == data.data_ptr()
        assert weight.nbytes == 24 * 34
