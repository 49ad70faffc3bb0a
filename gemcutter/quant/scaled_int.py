"""Numbers times scales: packed integers, plain int8 and 8-bit floats, as compressed-tensors, GPTQ, AWQ and Gemma's own QAT
files keep them.

Owns `ScaledInt`, which covers every layout whose rows lie apart, and `Awq`, where eight rows share each word. Refuses to know
files, names and activations: input and output scales are not weights. Read `packed.py` for the protocol, `bits.py` for streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemcutter.quant.bits import as_bytes, float8, unpack
from gemcutter.quant.packed import (
    FLOATS,
    check_cut,
    cut_expert,
    cut_rows,
    dtype_name,
    gather_rows,
    lead_axes,
    mismatches,
    refuse,
    stored_bytes,
)

_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # where each of eight neighbouring rows lies in a word


@dataclass(frozen=True, slots=True, eq=False)
class ScaledInt:
    """w = (number - zero) * scale, with one scale for a row or one for each group of columns.

    `kind` says what `codes` hold, [..., rows, columns] or as many words or bytes as that takes: "int" int8; "fp" float8_e4m3fn;
    "packed" unsigned integers of `bits` bits as a stream without gaps, in int32 or uint8; "words" the same in int32 words that
    no integer straddles; "gptq" the stream in int32 that lie columns first in memory.
    `scales` are [..., rows, groups]. `zeros`, of the same shape where there are any, add to `zero`. `group` is the columns of a
    group, of which the last may have fewer, or None for one scale a row; `group_of`, int64 [columns], names each column's group
    where groups are no runs of columns.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    bits: int
    num_columns: int
    group: int | None = None
    group_of: Tensor | None = None
    zero: int = 0
    zeros: Tensor | None = None

    @property
    def scheme(self) -> str:
        """Name the layout: packed4g32 has groups of 32 columns, packed4g32z zero points too, int8 one scale a row."""
        group = "-indexed" if self.group_of is not None else f"g{self.group}" if self.group else ""
        return f"{self.kind}{self.bits}{group}{'z' if self.zeros is not None else ''}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape."""
        return (*self.codes.shape[:-1], self.num_columns)

    @property
    def nbytes(self) -> int:
        """Count the stored bytes."""
        return stored_bytes(self)

    def rows(self, start: int, stop: int) -> ScaledInt:
        """Return rows start to stop - 1 of every expert without copying."""
        return cut_rows(self, start, stop)

    def columns(self, start: int, stop: int) -> ScaledInt:
        """Return columns start to stop - 1, whole groups in whole bytes or words, without copying."""
        values, items = self._run()
        check_cut(start, stop, self.num_columns, math.lcm(values, self.group or 1))
        codes = self.codes[..., start // values * items : -(-stop // values) * items]
        if self.group_of is not None:
            return replace(self, codes=codes, num_columns=stop - start, group_of=self.group_of[start:stop])
        groups = slice(start // self.group, -(-stop // self.group)) if self.group else slice(None)
        zeros = None if self.zeros is None else self.zeros[..., groups]
        return replace(self, codes=codes, num_columns=stop - start, scales=self.scales[..., groups], zeros=zeros)

    def expert(self, index: int) -> ScaledInt:
        """Return one matrix of a stack without copying."""
        return cut_expert(self, index)

    def gather(self, ids_N: Tensor) -> ScaledInt:
        """Copy the rows that ids name."""
        return gather_rows(self, ids_N)

    def dequantize(self) -> Tensor:
        """Compute (number - zero) * scale in float32, each operation rounded once."""
        zeros = self.zero if self.zeros is None else self._spread(self.zeros.float() + self.zero)
        return self._numbers().sub_(zeros).mul_(self._spread(self.scales.float()))

    def integers(self) -> Tensor:
        """Return the stored integers, [..., rows, columns]: int8 of kind "int", else uint8. Raises ValueError for floats."""
        if self.kind == "fp":
            raise ValueError(f"integers: {self.scheme} holds 8-bit floats")
        if self.kind == "int":
            return self.codes
        span_bytes = 4 if self.kind == "words" else None
        return unpack(as_bytes(self.codes), self.bits, span_bytes, torch.uint8)[..., : self.num_columns]

    def _numbers(self) -> Tensor:
        if self.kind == "fp":
            return float8(self.codes.view(torch.uint8), torch.float8_e4m3fn)
        return self.integers().float()

    def _spread(self, by_group: Tensor) -> Tensor:
        """Repeat numbers of groups for their columns; a number of the row is left to broadcasting."""
        if self.group_of is not None:
            return by_group.index_select(-1, self.group_of)
        if self.group is None:
            return by_group
        return by_group.repeat_interleave(self.group, -1)[..., : self.num_columns]

    def _run(self) -> tuple[int, int]:
        """Return the fewest values that fill whole items of `codes`, and how many items those are."""
        if self.kind == "words":
            return 32 // self.bits, 1
        item_bits = self.codes.itemsize * 8
        shared = math.gcd(item_bits, self.bits)
        return item_bits // shared, self.bits // shared


@dataclass(frozen=True, slots=True, eq=False)
class Awq:
    """w = (q - zero) * scale in AutoAWQ's layout, of which the rows `chosen` are seen.

    `words` int32 [columns, rows / 8], `zeros` int32 [groups, rows / 8], `scales` [groups, rows]: eight neighbouring rows lie in
    one word, so that rows can't be cut from the arrays; views keep them whole and name their rows instead.
    """

    words: Tensor
    zeros: Tensor
    scales: Tensor
    chosen: Tensor
    group: int

    @property
    def scheme(self) -> str:
        """Name the layout and its group."""
        return f"awq4g{self.group}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape."""
        return (self.chosen.shape[0], self.words.shape[0])

    @property
    def nbytes(self) -> int:
        """Count the bytes of the chosen rows' share in the arrays."""
        whole = sum(array.nbytes for array in (self.words, self.zeros, self.scales))
        return whole * self.chosen.shape[0] // self.scales.shape[1]

    def rows(self, start: int, stop: int) -> Awq:
        """Return rows start to stop - 1 without copying."""
        return replace(self, chosen=self.chosen[start:stop])

    def columns(self, start: int, stop: int) -> Awq:
        """Return columns start to stop - 1, whole groups, without copying."""
        check_cut(start, stop, self.words.shape[0], self.group)
        groups = slice(start // self.group, stop // self.group)
        return replace(self, words=self.words[start:stop], zeros=self.zeros[groups], scales=self.scales[groups])

    def expert(self, index: int) -> Awq:
        """Refuse: experts of this layout are stored apart."""
        raise ValueError(f"expert {index}: found a single matrix {list(self.shape)}")

    def gather(self, ids_N: Tensor) -> Awq:
        """Return the rows that ids name."""
        return replace(self, chosen=self.chosen[ids_N.to(self.chosen.device)])

    def dequantize(self) -> Tensor:
        """Compute (q - zero) * scale in float32, reading the chosen rows only."""
        scales = self.scales.index_select(1, self.chosen).float()
        codes, zeros = self._nibbles(self.words), self._nibbles(self.zeros)
        values = codes.sub_(zeros.repeat_interleave(self.group, 0)).mul_(scales.repeat_interleave(self.group, 0))
        return values.t().contiguous()

    def integers(self) -> tuple[Tensor, Tensor]:
        """Return codes, uint8 [rows, columns], and zero points, uint8 [rows, groups], of the chosen rows."""
        codes, zeros = (self._nibbles(words).to(torch.uint8).t() for words in (self.words, self.zeros))
        return codes, zeros

    def _nibbles(self, words: Tensor) -> Tensor:
        shifts = torch.tensor(_AWQ_SHIFTS, dtype=torch.int32, device=words.device)[self.chosen % 8]
        return (words.index_select(1, self.chosen // 8) >> shifts & 15).float()


def from_packed(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    columns: int,
    *,
    zeros: Tensor | None = None,
    group: int | None = None,
    group_of: Tensor | None = None,
) -> ScaledInt:
    """Take packed integers whose zero point is half their range, unless `zeros` gives others.

    compressed-tensors' pack-quantized: `weight_packed` int32, `weight_scale`, `weight_zero_point` int32 packed along the rows,
    `weight_g_idx` [columns]. Its releases before 0.20 let no integer straddle words; the width tells which layout it is
    (below 160 columns both may have one width, which is taken for the newer). Gemma's qat-mobile-transformers: uint8, 2 or 4
    bits, and the scales of rows or of blocks of columns. `group` is only needed where groups do not divide the columns. The
    zero points are unpacked to a byte each. Raises ValueError, naming what does not fit.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: 1 to 8 expected, found {bits}")
    lead = lead_axes("weight", codes)
    problems = mismatches("weight", codes, codes.shape, (torch.int32, torch.uint8))
    kind = _packing("weight", codes.shape[-1], codes.itemsize, columns, bits, problems)
    scales = _by_row("scales", scales, lead, FLOATS, problems)
    refuse(problems)
    own_zeros = None if zeros is None else _zero_points(zeros, bits, (*lead, scales.shape[-1]))
    group, group_of = _grouping(columns, scales.shape[-1], group, group_of, problems)
    refuse(problems)
    return ScaledInt(kind, codes, scales, bits, columns, group, group_of, 0 if zeros is not None else 1 << bits - 1, own_zeros)


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    *,
    group: int | None = None,
    group_of: Tensor | None = None,
    is_v2: bool = False,
) -> ScaledInt:
    """Take GPTQ's arrays, also AutoRound's, whose zero points are stored less one, except in version 2.

    `qweight` int32 [columns * bits / 32, rows], `qzeros` int32 [groups, rows * bits / 32], `scales` [groups, rows], `group_of`
    (g_idx) [columns]. `group` is only needed where groups do not divide the columns. The weights stay where they are; the zero
    points are unpacked to a byte each. Raises ValueError, naming what does not fit.
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits: 2, 3, 4 or 8 expected, found {bits}")
    if qweight.ndim != 2 or scales.ndim != 2:
        raise ValueError(f"qweight and scales: two axes expected, found {list(qweight.shape)} and {list(scales.shape)}")
    columns, rows, groups = qweight.shape[0] * 32 // bits, qweight.shape[1], scales.shape[0]
    problems = mismatches("qweight", qweight, qweight.shape, (torch.int32,))
    problems += mismatches("qzeros", qzeros, (groups, -(-rows * bits // 32)), (torch.int32,))
    problems += mismatches("scales", scales, (groups, rows), FLOATS)
    group, group_of = _grouping(columns, groups, group, group_of, problems)
    refuse(problems)
    zeros = _unpack_rows(qzeros, bits, rows)
    return ScaledInt("gptq", qweight.t(), scales.t(), bits, columns, group, group_of, 0 if is_v2 else 1, zeros)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Awq:
    """Take AutoAWQ's 4-bit arrays.

    `qweight` int32 [columns, rows / 8], `qzeros` int32 [groups, rows / 8], `scales` [groups, rows]. Raises ValueError, naming
    every array that does not fit.
    """
    if qweight.ndim != 2 or scales.ndim != 2 or not scales.shape[0]:
        raise ValueError(f"qweight and scales: two axes expected, found {list(qweight.shape)} and {list(scales.shape)}")
    (columns, words), groups = qweight.shape, scales.shape[0]
    problems = mismatches("qweight", qweight, (columns, words), (torch.int32,))
    problems += mismatches("qzeros", qzeros, (groups, words), (torch.int32,))
    problems += mismatches("scales", scales, (groups, words * 8), FLOATS)
    problems += [f"scales: {groups} groups do not divide {columns} columns"] if columns % groups else []
    refuse(problems)
    return Awq(qweight, qzeros, scales, torch.arange(words * 8, device=qweight.device), columns // groups)


def from_values(
    values: Tensor, scales: Tensor, *, zeros: Tensor | None = None, block: tuple[int, int] | None = None
) -> ScaledInt:
    """Take int8 or float8 values [..., rows, columns] with scales of the tensor, of rows, or of blocks of rows and columns.

    compressed-tensors' int-quantized and float-quantized, Gemma's 8-bit linears. Scales of blocks are repeated for the rows of a
    block (2 or 3 % of the weights' bytes for 128 x 128). Raises ValueError, naming what does not fit.
    """
    lead, columns = lead_axes("weight", values), values.shape[-1]
    block_rows, group = block or (None, None)
    problems = mismatches("weight", values, values.shape, (torch.int8, torch.float8_e4m3fn))
    scales = _by_row("scales", scales, lead, FLOATS, problems, block_rows)
    if zeros is not None:
        zeros = _by_row("zero points", zeros, lead, (torch.int8,), problems, block_rows)
        problems += mismatches("zero points", zeros, scales.shape, (torch.int8,))
    refuse(problems)
    group, _ = _grouping(columns, scales.shape[-1], group if scales.shape[-1] > 1 else None, None, problems)
    refuse(problems)
    return ScaledInt("int" if values.dtype == torch.int8 else "fp", values, scales, 8, columns, group, zeros=zeros)


def _packing(name: str, items: int, itemsize: int, values: int, bits: int, problems: list[str]) -> str:
    """Return whether, by the width, values form a stream without gaps or lie in words that none straddles."""
    dense, apart = -(-values * bits // (8 * itemsize)), -(-values // (32 // bits))
    if items != dense and (items != apart or itemsize != 4):
        unit = "words" if itemsize == 4 else "bytes"
        problems.append(f"{name}: {dense} {unit} expected for {values} values of {bits} bits, found {items}")
    return "packed" if items == dense else "words"


def _zero_points(zeros: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Read integers that are packed along the rows, int32 [..., words, groups], as uint8 [..., rows, groups]: `shape`."""
    *experts, rows, groups = shape
    words = zeros.shape[-2] if zeros.ndim == len(shape) else 0
    problems = mismatches("zero points", zeros, (*experts, words, groups), (torch.int32,))
    span_bytes = 4 if _packing("zero points", words, 4, rows, bits, problems) == "words" else None
    refuse(problems)
    return _unpack_rows(zeros.transpose(-1, -2), bits, rows, span_bytes)


def _unpack_rows(packed: Tensor, bits: int, rows: int, span_bytes: int | None = None) -> Tensor:
    """Read int32 [..., groups, words] as uint8 [..., rows, groups]."""
    return unpack(as_bytes(packed), bits, span_bytes, torch.uint8)[..., :rows].transpose(-1, -2)


def _by_row(
    name: str,
    array: Tensor,
    lead: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    problems: list[str],
    block_rows: int | None = None,
) -> Tensor:
    """Assign every row its numbers, [..., rows, groups], repeated without a copy where one serves the whole matrix."""
    shape = tuple(array.shape)
    if array.dtype not in dtypes:
        problems.append(f"{name}: {' or '.join(map(dtype_name, dtypes))} expected, found {dtype_name(array.dtype)}")
    if array.numel() == 1 or shape in (lead[:-1], (*lead[:-1], 1)):
        return array.reshape(-1, *(1 for _ in lead)).expand(*lead, 1)
    if shape == lead:
        return array.unsqueeze(-1)
    if shape[:-1] == lead:
        return array
    if block_rows and shape[:-1] == (*lead[:-1], -(-lead[-1] // block_rows)):
        return array.repeat_interleave(block_rows, -2)[..., : lead[-1], :]
    blocks = f" or for each block of {block_rows} rows" if block_rows else ""
    problems.append(f"{name}: one for the tensor, for each of {lead[-1]} rows{blocks} expected, found {list(shape)}")
    return array.new_empty((*lead, 1))


def _grouping(
    columns: int, groups: int, group: int | None, group_of: Tensor | None, problems: list[str]
) -> tuple[int | None, Tensor | None]:
    """Settle what the groups are: (None, None) for whole rows, (group, None) for runs of columns, or (None, group_of)."""
    if not columns or not groups:
        problems.append(f"scales: {groups} groups found for {columns} columns")
        return None, None
    size = group or -(-columns // groups)
    if group_of is not None:
        faults = _index_faults(columns, groups, group_of)
        if faults or not torch.equal(group_of.long(), torch.arange(columns, device=group_of.device) // size):
            problems += faults
            return None, group_of.long()
    if -(-columns // size) != groups or (not group and columns % groups):
        problems.append(
            f"scales: {groups} groups do not divide {columns} columns" + (f" into groups of {group}" if group else "")
        )
    return None if groups == 1 else size, None


def _index_faults(columns: int, groups: int, group_of: Tensor) -> list[str]:
    faults = mismatches("g_idx", group_of, (columns,), (torch.int32, torch.int64))
    if not faults and (group_of.min() < 0 or group_of.max() >= groups):
        faults.append(f"g_idx: groups 0 to {groups - 1} expected, found {int(group_of.min())} to {int(group_of.max())}")
    return faults
