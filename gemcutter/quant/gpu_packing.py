"""Weights repacked for GPU kernels: any lossless scheme as rows of 32-bit words beside rows of scales.

Owns `GpuPackedWeight`, a packed weight like all others, `pack_for_gpu`, which makes one, and `adjoin`, which lays the parts
of a weight one after the other so that one launch multiplies with all of them. Values stay what the scheme's own `dequantize`
says, bit for bit, but for what `cpu_packing.py` says of zero points. Refuses to know kernels and files. Read `cpu_packing.py`
for how schemes come apart, `ops/triton_tiles.py` for who reads the words.

A vector is four words, 16 bytes, of 32 columns at 4 bits or 16 columns at 8: bits `b * k` and up of word j hold column 4 k + j of
the vector. So a thread loads a vector at once, and the columns that it needs of a row for one k lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemcutter.quant.bits import E2M1_DOUBLED, float8, in_runs
from gemcutter.quant.cpu_layout import BF16, F32, S8, SCALES_OF, T4, U6, PackedLayout, UnpackedWeight
from gemcutter.quant.cpu_packing import cpu_layout_of, order_of, take_apart
from gemcutter.quant.microscaling import Micro
from gemcutter.quant.packed import Packed, check_cut
from gemcutter.quant.scaled_int import ScaledInt

PREFIX = "gpu-packed-"  # of the schemes of packed weights, before the name of the scheme that was repacked
F4, F8 = 3, 4  # codes besides those of panels: 4-bit floats (e2m1, doubled) and 8-bit ones (e4m3)
FLOAT4 = ("mxfp4", "nvfp4", "MXFP4", "NVFP4")  # schemes whose codes are 4-bit floats
VECTOR_WORDS = 4  # words
CHUNK_ELEMENTS = 1 << 24  # of a matrix taken apart at a time
_NAN8 = 0x7F  # of an 8-bit float, without its sign

P = TypeVar("P", bound=Packed)


@dataclass(frozen=True, slots=True, eq=False)
class GpuPackedWeight:
    """A matrix, or a stack of them: `codes` int32 [..., rows, words]; `high` int16 alike, the upper two of six bits.

    `arrays` are [..., rows, numbers], in the order of the layout's heads and block heads: scales and biases of groups, or numbers
    of super-blocks and their 8-bit factors. Codes of 8 bits are the layout's plus 128, so that none is negative.
    """

    codes: Tensor
    high: Tensor | None
    arrays: tuple[Tensor, ...]
    num_columns: int
    layout: PackedLayout
    origin: str  # the scheme that was repacked

    @property
    def scheme(self) -> str:
        """Name the scheme that was repacked: gpu-packed-Q4_0."""
        return PREFIX + self.origin

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape."""
        return (*self.codes.shape[:-1], self.num_columns)

    @property
    def nbytes(self) -> int:
        """Count the stored bytes."""
        return sum(array.nbytes for array in self.tensors())

    @property
    def device(self) -> torch.device:
        """Return where it is stored."""
        return self.codes.device

    def tensors(self) -> tuple[Tensor, ...]:
        """List what it is stored in: codes, upper bits where there are some, arrays."""
        return (self.codes, *(() if self.high is None else (self.high,)), *self.arrays)

    def rows(self, start: int, stop: int) -> GpuPackedWeight:
        """Return rows start to stop - 1 of every expert without copying."""
        return self.each(lambda array: array[..., start:stop, :])

    def columns(self, start: int, stop: int) -> GpuPackedWeight:
        """Return columns start to stop - 1, whole groups or super-blocks, without copying."""
        whole = self.num_columns
        check_cut(start, stop, whole, self.layout.run)

        def cut(array: Tensor) -> Tensor:
            return array[..., start * array.shape[-1] // whole : stop * array.shape[-1] // whole]

        return replace(self.each(cut), num_columns=stop - start)

    def expert(self, index: int) -> GpuPackedWeight:
        """Return one matrix of a stack without copying. Raises ValueError where there is no stack."""
        if self.codes.ndim != 3:
            raise ValueError(f"expert {index}: found a single matrix {list(self.shape)}")
        return self.each(lambda array: array[index])

    def gather(self, ids_N: Tensor) -> GpuPackedWeight:
        """Copy the rows that ids name."""
        ids = ids_N.to(self.device)
        return self.each(lambda array: array.index_select(-2, ids))

    def dequantize(self) -> Tensor:
        """Compute scale * (code + offset) + bias in float32, each operation rounded once."""
        *lead, _ = self.shape
        codes = from_words(self.codes, self.high, self.layout.codes)
        arrays = tuple(array.flatten(0, -2) for array in self.arrays)
        if self.layout.codes == F8:
            runs = float8(in_runs(codes.flatten(0, -2), self.layout.group), torch.float8_e4m3fn)
            return runs.mul_(arrays[0].float().unsqueeze(-1)).view(*lead, self.num_columns)
        codes = codes.flatten(0, -2)
        if self.layout.codes == S8:
            codes = codes ^ 128
        layout = replace(self.layout, codes=T4, levels=E2M1_DOUBLED) if self.layout.codes == F4 else self.layout
        return UnpackedWeight(layout, codes, arrays).values().view(*lead, self.num_columns)

    def each(self, change: Callable[[Tensor], Tensor]) -> GpuPackedWeight:
        """Change every tensor that it is stored in alike."""
        high = None if self.high is None else change(self.high)
        return replace(self, codes=change(self.codes), high=high, arrays=tuple(map(change, self.arrays)))


# ---- words ----


def to_words(codes: Tensor, kind: int) -> tuple[Tensor, Tensor | None]:
    """Lay unsigned codes, uint8 [..., rows, columns], out as int32 words, and the upper bits of six as int16."""
    *lead, columns = codes.shape
    if kind in (S8, F8):
        return _as_items(codes.view(*lead, columns // 16, 4, VECTOR_WORDS), torch.int32), None
    pairs = codes.view(*lead, columns // 32, 4, 2, VECTOR_WORDS)
    words = _as_items(pairs[..., 0, :] & 15 | pairs[..., 1, :] << 4, torch.int32)
    if kind != U6:
        return words, None
    fours = (codes >> 4).view(*lead, columns // 32, 2, 4, VECTOR_WORDS)
    high = fours[..., 0, :] | fours[..., 1, :] << 2 | fours[..., 2, :] << 4 | fours[..., 3, :] << 6
    return words, _as_items(high, torch.int16)


def from_words(words: Tensor, high: Tensor | None, kind: int) -> Tensor:
    """Undo `to_words`: uint8 [..., rows, columns]."""
    octets = _as_octets(words, 4)
    if kind in (S8, F8):
        return octets.flatten(-3)
    codes = torch.stack((octets & 15, octets >> 4), dim=-2).flatten(-4)
    if high is None:
        return codes
    upper = _as_octets(high, 2)
    return codes | torch.stack([upper >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-4) << 4


def _as_items(octets: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn [..., vectors, bytes of a word, words] into words [..., words]."""
    return octets.transpose(-1, -2).contiguous().view(dtype).flatten(-3)


def _as_octets(items: Tensor, size: int) -> Tensor:
    """Undo `_as_items`: uint8 [..., vectors, bytes, words]."""
    octets = items.contiguous().view(torch.uint8).view(*items.shape[:-1], items.shape[-1] // VECTOR_WORDS, VECTOR_WORDS, size)
    return octets.transpose(-1, -2)


# ---- from every scheme ----


def pack_for_gpu(
    part: Packed, device: torch.device | str, after_chunk: Callable[[], None] | None = None
) -> GpuPackedWeight | None:
    """Repack a matrix or a stack of them on a device; None where the scheme, its groups or its columns have no such form.

    `after_chunk` is called when some rows of `part` were read and are not needed again.
    """
    layout = None if 0 in part.shape else gpu_layout_of(part)
    if layout is None:
        return None
    *experts, rows, columns = part.shape
    whole = allocate_gpu_packed(layout, (*experts, rows), columns, device, part.scheme)
    step = max(1, CHUNK_ELEMENTS // columns)
    for index in range(experts[0] if experts else 1):
        source, target = (part.expert(index), whole.expert(index)) if experts else (part, whole)
        assert not isinstance(source, Tensor)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            chunk = _cut(place(source.rows(start, stop), device), layout)
            if chunk is None:
                return None
            for into, found in zip(target.rows(start, stop).tensors(), chunk, strict=True):
                into.copy_(found)
            if after_chunk is not None:
                after_chunk()
    return whole


def gpu_layout_of(part: Packed) -> PackedLayout | None:
    """Return how a part would be coded; None if it can't be.

    Kernels know no tables but that of 4-bit floats, and no units of super-blocks' scales: other levels become bytes there,
    scales with a unit become float32.
    """
    if isinstance(part, ScaledInt) and part.kind == "fp":
        group = part.group or part.num_columns
        if part.group_of is not None or part.num_columns % group or group % 32:
            return None
        return PackedLayout(F8, SCALES_OF[part.scales.dtype], group)
    if isinstance(part, Micro) and part.scheme == "mxfp8":
        return PackedLayout(F8, BF16, part.group)
    layout = None if order_of(part) is not None else cpu_layout_of(part)  # whose columns would be sorted
    if layout is None or layout.codes != T4:
        return layout
    if layout.exponent:
        return PackedLayout(S8, F32, layout.group)
    return replace(layout, codes=F4 if part.scheme in FLOAT4 else S8, levels=())


def place(part: P, device: torch.device | str) -> P:
    """Move a packed weight to a device."""
    found: dict[str, Any] = {each.name: getattr(part, each.name) for each in fields(part)}  # type: ignore[arg-type]  # a dataclass
    for name, value in found.items():
        if isinstance(value, Tensor):
            found[name] = value.to(device)
        elif isinstance(value, tuple):  # the arrays of one, or the experts of a stack
            found[name] = tuple(each.to(device) if isinstance(each, Tensor) else place(each, device) for each in value)
    return replace(part, **found)  # type: ignore[type-var]


def _cut(part: Packed, layout: PackedLayout) -> tuple[Tensor, ...] | None:
    """Take rows of a single matrix apart into tensors, in the order of `GpuPackedWeight.tensors`; None for NaNs."""
    if layout.codes == F8:
        codes, scales = _floats(part)
        if bool(((codes & _NAN8) == _NAN8).any()):
            return None
        return to_words(codes, F8)[0], scales
    grid = take_apart(part)
    codes = grid.signed().view(torch.uint8) ^ 128 if layout.codes == S8 else grid.codes
    words, high = to_words(codes.contiguous(), layout.codes)
    arrays = (grid.scales()[0],) if grid.layout.exponent else grid.arrays
    return (words, *(() if high is None else (high,)), *arrays)


def _floats(part: Packed) -> tuple[Tensor, Tensor]:
    """Return the bytes and the scales of 8-bit floats."""
    if isinstance(part, Micro):
        return part.codes, float8(part.scales, torch.float8_e8m0fnu).bfloat16()
    assert isinstance(part, ScaledInt)
    return part.codes.view(torch.uint8), part.scales


def allocate_gpu_packed(
    layout: PackedLayout, lead: tuple[int, ...], columns: int, device: torch.device | str, origin: str
) -> GpuPackedWeight:
    """Make a matrix of so many rows, `lead`, or a stack of them, that is yet to be filled."""
    words = columns // (4 if layout.codes in (S8, F8) else 8)
    codes = torch.empty((*lead, words), dtype=torch.int32, device=device)
    high = torch.empty((*lead, words), dtype=torch.int16, device=device) if layout.codes == U6 else None
    units = columns // layout.run
    heads = [(dtype, units * count) for dtype, count in layout.heads]
    blocks = [(dtype, columns // 32 * count) for dtype, count in layout.block_heads]
    arrays = tuple(torch.empty((*lead, count), dtype=dtype, device=device) for dtype, count in heads + blocks)
    return GpuPackedWeight(codes, high, arrays, columns, layout, origin)


# ---- parts one after the other ----


def adjoin(parts: Sequence[Tensor | Packed]) -> tuple[Tensor | Packed, ...]:
    """Lay parts out as the rows of one matrix, and give them as views of it; as they are where their forms differ."""
    edges = list(pairwise(accumulate((part.shape[-2] for part in parts), initial=0)))
    if len(parts) < 2:
        return tuple(parts)
    dense = [part for part in parts if isinstance(part, Tensor)]
    if len(dense) == len(parts) and len({part.dtype for part in dense}) == 1:
        joined = torch.cat(dense, dim=-2)
        return tuple(joined[..., start:stop, :] for start, stop in edges)
    gpu_packed = [part for part in parts if isinstance(part, GpuPackedWeight)]
    if len(gpu_packed) < len(parts) or len({(part.layout, part.origin, part.num_columns) for part in gpu_packed}) > 1:
        return tuple(parts)
    together = _stack_rows(gpu_packed)
    return tuple(together.rows(start, stop) for start, stop in edges)


def span_of(parts: Sequence[Tensor | Packed]) -> Tensor | GpuPackedWeight | None:
    """Return the one matrix whose rows `parts` are, one after the other; None where they do not lie so in memory."""
    first, rows = parts[0], sum(part.shape[-2] for part in parts)
    arrays: list[tuple[Tensor, ...]]
    if isinstance(first, Tensor):
        arrays = [(part,) for part in parts if isinstance(part, Tensor)]
    elif isinstance(first, GpuPackedWeight):
        arrays = [part.tensors() for part in parts if isinstance(part, GpuPackedWeight) and part.layout == first.layout]
    else:
        return None
    if len(arrays) < len(parts) or not all(_follow(column) for column in zip(*arrays, strict=True)):
        return None
    if len(parts) == 1:
        return first
    wide = [array.as_strided((*array.shape[:-2], rows, array.shape[-1]), array.stride()) for array in arrays[0]]
    if isinstance(first, Tensor):
        return wide[0]
    codes, *rest = wide
    high = None if first.high is None else rest.pop(0)
    return replace(first, codes=codes, high=high, arrays=tuple(rest))


def _follow(arrays: Sequence[Tensor]) -> bool:
    """Return whether each array begins where the one before it ends, in one storage, with one dtype and one row stride."""
    place, storage = arrays[0].data_ptr(), arrays[0].untyped_storage().data_ptr()
    for array in arrays:
        if array.untyped_storage().data_ptr() != storage:  # neighbours in a mapped file, say
            return False
        if (array.data_ptr(), array.dtype, array.stride()) != (place, arrays[0].dtype, arrays[0].stride()):
            return False
        place += array.shape[-2] * array.stride(-2) * array.itemsize
    return True


def _stack_rows(parts: Sequence[GpuPackedWeight]) -> GpuPackedWeight:
    first = parts[0]
    arrays = tuple(torch.cat(column, dim=-2) for column in zip(*(part.arrays for part in parts), strict=True))
    high = None if first.high is None else torch.cat([part.high for part in parts if part.high is not None], dim=-2)
    return replace(first, codes=torch.cat([part.codes for part in parts], dim=-2), high=high, arrays=arrays)
