"""The bytes of GGUF's IQ1, IQ2 and IQ3 blocks: 256 values, each one of a few levels, in 16 runs with small integer scales.

Owns what all of them come apart into: a 4-bit code for each value, which names one of at most 16 signed levels, a float16 and an
odd factor for each run. A value is float16 * 2^exponent * factor * level: 11 bits, at most 5 and at most 6, so float32 holds the
product exactly in any order, and it is ggml's bit for bit. What ggml adds to IQ1's values, an eighth up or down, is part of
their levels, in eighths. Refuses to know panels. Source: the decoders of ggml. Read `gguf_codebooks.py` for the patterns that
most bits of a block name, `gguf_blocks_k.py` for blocks with integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gemcutter.quant.bits import halves, in_runs, look_up, unpack
from gemcutter.quant.gguf_codebooks import codebook

Split = tuple[Tensor, Tensor, Tensor]  # codes uint8 [B, 256], float16 [B, 1], factors int8 [B, 16]


@dataclass(frozen=True, slots=True)
class LevelType:
    """A block type by what its codes stand for; `split` takes blocks, uint8 [B, bytes], apart."""

    split: Callable[[Tensor], Split]
    levels: tuple[int, ...]
    exponent: int = 0

    def decode(self, blocks: Tensor) -> Tensor:
        """Compute float16 * 2^exponent * factor * level, float32 [B, 256]."""
        codes, d, factors = self.split(blocks)
        scales = d.float() * 2.0**self.exponent * factors.float()
        return in_runs(look_up(self.levels, codes), 16).mul_(scales.unsqueeze(-1)).flatten(1)


def _with_signs(magnitudes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the levels of codes whose fourth bit is the sign."""
    padded = (*magnitudes, *(0 for _ in range(8 - len(magnitudes))))
    return (*padded, *(-each for each in padded))


# ---- what several types share ----


def _words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Read little-endian words, as int32; copied, since a block alone begins wherever the file has it."""
    return packed.clone(memory_format=torch.contiguous_format).view(dtype).int()


def _fields(words: Tensor, shifts: Sequence[int], mask: int) -> Tensor:
    """Read fields of words that begin at these bits: [B, words] to int32 [B, words * fields]."""
    return (words.unsqueeze(-1) >> torch.tensor(shifts, dtype=torch.int32, device=words.device) & mask).flatten(1)


def _odd(scales: Tensor, runs: int = 1) -> Tensor:
    """Return the factors 2 s + 1 of scales [B, n], each for so many runs: int8 [B, n * runs]."""
    return (2 * scales + 1).to(torch.int8).repeat_interleave(runs, -1)


def _patterns(name: str, numbers: Tensor) -> Tensor:
    """Look patterns up by number: [B, n] to digits uint8 [B, n * columns]."""
    return codebook(name).to(numbers.device)[numbers.int()].flatten(1)


def _signs_of_seven(fields: Tensor) -> Tensor:
    """Read the signs of eight values from seven bits, the eighth being their parity: int32 [B, n] to uint8 [B, 8 n]."""
    return _signs_by_seven().to(fields.device)[fields].flatten(1)


@cache
def _signs_by_seven() -> Tensor:
    seven = torch.arange(128).unsqueeze(-1) >> torch.arange(7) & 1
    return torch.cat((seven, seven.sum(-1, keepdim=True) & 1), dim=-1).to(torch.uint8)


def _signs_and_scales(words: Tensor) -> tuple[Tensor, Tensor]:
    """Read words of 32 values: four times seven bits of signs, and the scale in the top four."""
    return _signs_of_seven(_fields(words, (0, 7, 14, 21), 127)), _odd(words >> 28 & 15, 2)


# ---- one function a type: uint8 [B, bytes] to its codes, float16 and factors ----


def split_iq1_s(blocks: Tensor) -> Split:
    """d, low bytes of 32 patterns, a word for 32 values: four times three bits of patterns, scale, direction of the eighth."""
    words = _words(blocks[:, 34:50], torch.int16)
    digits = _patterns("IQ1", blocks[:, 2:34].int() | _fields(words, (0, 3, 6, 9), 7) << 8)
    is_down = (words >> 15 & 1).to(torch.uint8).repeat_interleave(32, -1)
    return digits + 3 * is_down, halves(blocks, 0), _odd(words >> 12 & 7, 2)


def split_iq1_m(blocks: Tensor) -> Split:
    """Low bytes of 32 patterns, for each three more bits and the eighth's direction, 16 scales of 3 bits with a quarter of d."""
    upper, words = unpack(blocks[:, 32:48], 4, dtype=torch.uint8), _words(blocks[:, 48:56], torch.int16)
    digits = _patterns("IQ1", blocks[:, :32].int() | (upper.int() & 7) << 8)
    quarters = blocks[:, 49:56:2] >> 4
    d = (quarters[:, ::2] | quarters[:, 1::2] << 4).view(torch.float16)
    return digits + 3 * (upper >> 3).repeat_interleave(8, -1), d, _odd(_fields(words, (0, 3, 6, 9), 7))


def split_iq2_xxs(blocks: Tensor) -> Split:
    """d, then for 32 values each: four patterns, and a word of their signs and scale."""
    pairs = in_runs(blocks[:, 2:], 8)
    signs, factors = _signs_and_scales(_words(pairs[..., 4:], torch.int32).flatten(1))
    return _patterns("IQ2_XXS", pairs[..., :4].flatten(1)) | signs << 3, halves(blocks, 0), factors


def split_iq2_xs(blocks: Tensor) -> Split:
    """d, a word for eight values with nine bits of the pattern and seven of signs, 16 scales of 4 bits."""
    words = _words(blocks[:, 2:66], torch.int16)
    codes = _patterns("IQ2_XS", words & 511) | _signs_of_seven(words >> 9 & 127) << 3
    return codes, halves(blocks, 0), _odd(unpack(blocks[:, 66:], 4, dtype=torch.uint8))


def split_iq2_s(blocks: Tensor) -> Split:
    """d, low bytes of 32 patterns, all signs, two more bits of each pattern, 16 scales of 4 bits."""
    numbers = blocks[:, 2:34].int() | unpack(blocks[:, 66:74], 2, dtype=torch.int32) << 8
    codes = _patterns("IQ2_S", numbers) | unpack(blocks[:, 34:66], 1, dtype=torch.uint8) << 3
    return codes, halves(blocks, 0), _odd(unpack(blocks[:, 74:], 4, dtype=torch.uint8))


def split_iq3_xxs(blocks: Tensor) -> Split:
    """d, 64 patterns, then a word of the signs and the scale of 32 values each."""
    signs, factors = _signs_and_scales(_words(blocks[:, 66:], torch.int32))
    return _patterns("IQ3_XXS", blocks[:, 2:66]) | signs << 3, halves(blocks, 0), factors


def split_iq3_s(blocks: Tensor) -> Split:
    """d, low bytes of 64 patterns, their ninth bits, all signs, 8 scales of 4 bits."""
    numbers = blocks[:, 2:66].int() | unpack(blocks[:, 66:74], 1, dtype=torch.int32) << 8
    codes = _patterns("IQ3_S", numbers) | unpack(blocks[:, 74:106], 1, dtype=torch.uint8) << 3
    return codes, halves(blocks, 0), _odd(unpack(blocks[:, 106:], 4, dtype=torch.uint8), 2)


_EIGHTHS = (*(8 * digit + 1 for digit in (-1, 0, 1)), *(8 * digit - 1 for digit in (-1, 0, 1)), *(0 for _ in range(10)))
_IQ2 = _with_signs((8, 25, 43))

LEVEL_TYPES = {
    "IQ1_S": LevelType(split_iq1_s, _EIGHTHS, -3),
    "IQ1_M": LevelType(split_iq1_m, _EIGHTHS, -3),
    "IQ2_XXS": LevelType(split_iq2_xxs, _IQ2, -3),
    "IQ2_XS": LevelType(split_iq2_xs, _IQ2, -3),
    "IQ2_S": LevelType(split_iq2_s, _IQ2, -3),
    "IQ3_XXS": LevelType(split_iq3_xxs, _with_signs((4, 12, 20, 28, 36, 44, 52, 62)), -2),
    "IQ3_S": LevelType(split_iq3_s, _with_signs((1, 3, 5, 7, 9, 11, 13, 15))),
}
