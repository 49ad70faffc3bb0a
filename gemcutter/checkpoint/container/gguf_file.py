"""The GGUF container: metadata, and tensors as lazy views of a file.

Owns the layout of headers, the sizes of the block types, and models split over several files. A header is read in chunks of
bounded size and nothing is allocated by its word; arrays in it are passed over and decoded when asked, so that a vocabulary of
262,144 pieces costs a tenth of a second. Refuses to know what keys and tensors mean: that is `formats/gguf.py`, read it next.
`source.py` opens the files and calls this. Source: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor, StoredFile, name_problem
from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import shown

MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)

# The number of a tensor's type -> (name, values of a block, bytes of a block); those that no decoder here reads are listed, too,
# so that an error can name them.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
_SCALARS = {number: struct.Struct("<" + code) for number, code in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)}
_STRING, _ARRAY = 8, 9
ASSISTANT = "gemma4-assistant"  # the architecture of drafters

_HEAD = struct.Struct("<4sIQQ")  # magic, version, numbers of tensors and of metadata entries
_KIND = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
_ARRAY_HEAD = struct.Struct("<IQ")
_PLACE = struct.Struct("<IQ")  # a tensor's type, and its offset in the data

_FIRST_CHUNK_BYTES, _CHUNK_BYTES = 1 << 18, 1 << 23  # a header is read in chunks that grow from the first size to the second
_NAME_BYTES = 1 << 16
_TEXT_BYTES = 1 << 24  # the longest real text is a chat template of some 20 KB
_ENTRIES, _TENSORS, _DIMS = 1 << 16, 1 << 18, 4
_MAX_BYTES = 2**63 - 1
_ALIGNMENT = 32

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Array:
    """An array in a header: where it lies, to be decoded when asked."""

    kind: int
    count: int
    offset: int
    nbytes: int
    stored: StoredFile = field(repr=False)

    def __len__(self) -> int:
        return self.count

    def decode(self) -> list[Any]:
        """Return the elements. Raises ValueError for text that is not UTF-8, and where the file can't be read any more."""
        try:
            data = self.stored.read(self.offset, self.nbytes)
        except OSError as error:
            raise ValueError(f"can't be read: {error.strerror}") from error
        if len(data) < self.nbytes:
            raise ValueError("the file has become shorter; open it again")
        if self.kind != _STRING:
            return list(struct.unpack(f"<{self.count}{_SCALARS[self.kind].format[1:]}", data))
        texts, at, length = [], 0, _LENGTH.unpack_from
        try:
            for _ in range(self.count):
                start = at + 8
                at = start + length(data, at)[0]
                texts.append(data[start:at].decode())
        except struct.error:
            raise ValueError("the file has changed; open it again") from None
        return texts


class _Cursor:
    """A place in a header. Moving beyond the end of the file raises ValueError."""

    __slots__ = ("at", "base", "chunk_bytes", "data", "stored")

    def __init__(self, stored: StoredFile) -> None:
        self.stored, self.data, self.base, self.at, self.chunk_bytes = stored, b"", 0, 0, _FIRST_CHUNK_BYTES

    @property
    def offset(self) -> int:
        """Return the place as an offset in the file."""
        return self.base + self.at

    @property
    def left(self) -> int:
        """Count the bytes from here to the end of the file."""
        return self.stored.size_bytes - self.offset

    def move(self, nbytes: int) -> None:
        """Pass over bytes, which may lie beyond what has been read."""
        if nbytes > self.left:
            raise ValueError(f"is truncated: its header does not end within its {self.stored.size_bytes:,} bytes")
        self.at += nbytes

    def need(self, nbytes: int) -> None:
        """See to it that so many bytes from here on have been read."""
        if self.at + nbytes <= len(self.data):
            return
        start = self.offset
        self.move(nbytes)
        self.data = self.stored.read(start, max(nbytes, min(self.chunk_bytes, self.stored.size_bytes - start)))
        self.base, self.at, self.chunk_bytes = start, 0, min(2 * self.chunk_bytes, _CHUNK_BYTES)
        if len(self.data) < nbytes:
            raise ValueError("changed while it was being read; open the checkpoint again")

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        self.need(layout.size)
        self.at += layout.size
        return layout.unpack_from(self.data, self.at - layout.size)

    def text(self, limit: int, what: str) -> str:
        (length,) = self.take(_LENGTH)
        if length > limit:
            raise ValueError(f"{what} would take {length:,} bytes, above {limit:,}")
        self.need(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not valid UTF-8: {shown(raw)}") from None

    def skip_texts(self, count: int) -> None:
        """Pass over strings: nearly all that reading a header costs, as Gemma 4's vocabulary and merges are 777,000 of them."""
        if count > self.left // _LENGTH.size:
            raise ValueError(f"is truncated: {count:,} strings can't lie in the {self.left:,} bytes that are left")
        length = _LENGTH.unpack_from
        while count:
            self.need(_LENGTH.size)
            data, at, last = self.data, self.at, len(self.data) - _LENGTH.size
            while count and at <= last:
                at += 8 + length(data, at)[0]
                count -= 1
            self.move(at - self.at)


def read_shard(stored: StoredFile, problems: list[str]) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Return one file's tensors and metadata as far as they are sound, noting every problem.

    Metadata values are numbers, texts and `Array`s. Raises ValueError, or OSError, where the file can't be read on.
    """
    name = stored.path.name
    cursor = _Cursor(stored)
    if stored.size_bytes < _HEAD.size:
        raise ValueError(f"is truncated: {stored.size_bytes} bytes, and the head alone takes {_HEAD.size}")
    magic, version, num_tensors, num_entries = cursor.take(_HEAD)
    if magic != MAGIC:
        raise ValueError(f"is not a GGUF file: it begins with {shown(magic)}")
    if version not in VERSIONS:
        kind = "big-endian" if version and not version & 0xFFFF else f"of version {version:,}"
        raise ValueError(f"is {kind}; little-endian versions {' and '.join(map(str, VERSIONS))} are read: convert it again")
    for count, limit, what in ((num_entries, _ENTRIES, "metadata entries"), (num_tensors, _TENSORS, "tensors")):
        if count > limit:
            raise ValueError(f"is damaged: it would hold {count:,} {what}, above {limit:,}")
    metadata = dict[str, Any]()
    for _ in range(num_entries):
        key = cursor.text(_NAME_BYTES, "a metadata key")
        value = _read_value(cursor, key)
        if key in metadata:
            problems.append(f"{name}: repeats the metadata key {shown(key)}")
        metadata[key] = value
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        problems.append(f"{name}: general.alignment {shown(alignment)} is not a power of two")
        return [], metadata
    data_start = -(-cursor.offset // alignment) * alignment
    return _make_tensors(entries, stored, data_start, alignment, problems), metadata


def _read_value(cursor: _Cursor, key: str) -> Any:
    (kind,) = cursor.take(_KIND)
    if kind in _SCALARS:
        return cursor.take(_SCALARS[kind])[0]
    if kind == _STRING:
        return cursor.text(_TEXT_BYTES, f"the metadata {shown(key)}")
    if kind != _ARRAY:
        raise ValueError(f"is damaged: the metadata {shown(key)} is of the unknown type {kind}")
    kind, count = cursor.take(_ARRAY_HEAD)
    start = cursor.offset
    if kind == _STRING:
        cursor.skip_texts(count)
    elif kind in _SCALARS:
        cursor.move(count * _SCALARS[kind].size)
    else:
        what = "arrays" if kind == _ARRAY else f"the unknown type {kind}"
        raise ValueError(f"can't be read: the metadata {shown(key)} is an array of {what}")
    return Array(kind, count, start, cursor.offset - start, cursor.stored)


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return one tensor's name, shape (rows first, as everywhere here), type and offset in the data."""
    name = cursor.text(_NAME_BYTES, "a tensor's name")
    (num_dims,) = cursor.take(_KIND)
    if num_dims > _DIMS:
        raise ValueError(f"is damaged: the tensor {shown(name)} would have {num_dims:,} dimensions")
    dims = [cursor.take(_LENGTH)[0] for _ in range(num_dims)]
    kind, offset = cursor.take(_PLACE)
    return name, tuple(reversed(dims)), kind, offset


def _make_tensors(
    entries: Sequence[tuple[str, tuple[int, ...], int, int]],
    stored: StoredFile,
    data_start: int,
    alignment: int,
    problems: list[str],
) -> list[LazyTensor]:
    file, tensors = stored.path.name, dict[str, LazyTensor]()
    for name, shape, kind, offset in entries:
        faults = [fault] if (fault := name_problem(name)) else []
        nbytes = 0
        try:
            nbytes = tensor_nbytes(kind, shape)
        except ValueError as error:
            faults.append(str(error))
        if offset % alignment:
            faults.append(f"offset {offset:,} is not a multiple of {alignment}")
        if name in tensors:
            faults.append("is there twice")
        if faults:
            problems += [f"{file}:{shown(name)[1:-1]}: {fault}" for fault in faults]
        else:
            tensors[name] = LazyTensor(name, TENSOR_TYPES[kind][0], shape, nbytes, data_start + offset, stored)
    problems += _check_spans(list(tensors.values()), stored)
    return list(tensors.values())


def tensor_nbytes(kind: int, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor of this type takes. Raises ValueError, saying what is wrong."""
    if kind not in TENSOR_TYPES:
        raise ValueError(f"type {kind} is unknown; this file may be newer than this version")
    name, values, block_bytes = TENSOR_TYPES[kind]
    if not shape or 0 in shape:
        raise ValueError(f"shape {list(shape)} holds nothing")
    if shape[-1] % values:
        raise ValueError(f"rows of {shape[-1]:,} values are not made of {name}'s blocks of {values}")
    nbytes = math.prod(shape) // values * block_bytes
    if nbytes > _MAX_BYTES:
        raise ValueError(f"shape {list(shape)} of {name} takes more than 2**63 bytes")
    return nbytes


def _check_spans(tensors: Sequence[LazyTensor], stored: StoredFile) -> list[str]:
    problems, end, last = [], 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            problems.append(f"{tensor.origin}: overlaps {last}")
        if tensor.offset + tensor.nbytes > end:
            end, last = tensor.offset + tensor.nbytes, tensor.name
    if end > stored.size_bytes:
        cut = [tensor.name for tensor in tensors if tensor.offset + tensor.nbytes > stored.size_bytes]
        problems.append(
            f"{stored.path.name}: is truncated: {stored.size_bytes:,} bytes of {end:,}; "
            f"{len(cut)} of {len(tensors)} tensors are cut: {shown(cut)}"
        )
    return problems


# ---- models that are split over several files ----


def parts_of(file: Path, problems: list[str]) -> tuple[Path, ...]:
    """List all files of the model that `file`, the name of a whole file or of any part, belongs to; note absent parts."""
    part = _PART.fullmatch(file.name)
    if part is None:
        return (file,)
    total = int(part["total"])
    if not 1 <= int(part["number"]) <= total:
        problems.append(f"{file.name}: there is no part {int(part['number'])} of {total}; restore the file's own name")
        return (file,)
    # The folder is listed, rather than every name that the total promises being tried.
    there = {each.name for each in file.parent.glob(f"*-of-{part['total']}{SUFFIX}") if each.is_file()}
    names = [f"{part['stem']}-{number:05}-of-{part['total']}{SUFFIX}" for number in range(1, total + 1)]
    absent = [name for name in names if name not in there]
    if absent:
        problems.append(f"{len(absent)} of {total} parts are absent: {shown(absent)}; download them into {file.parent}")
    return tuple(file.parent / name for name in names if name in there)


def select_file(folder: Path, names: Sequence[str], problems: list[str]) -> tuple[Path, ...]:
    """List the files of the one GGUF model in a folder, projectors for images and audio left out; none if there is no GGUF file.

    Raises CheckpointError if there are several models.
    """
    files = [folder / name for name in names if name.endswith(SUFFIX) and "mmproj" not in name]
    models = {_PART.sub(r"\g<stem>-of-\g<total>", file.name): file for file in reversed(files)}
    if len(models) > 1:
        several = ", ".join(file.name for file in sorted(models.values())[:8])
        raise CheckpointError(f"{folder} holds {len(models)} GGUF models ({several}): pass the path of one of them")
    return parts_of(next(iter(models.values())), problems) if models else ()


def check_parts(parts: Sequence[tuple[Path, Mapping[str, Any]]], num_tensors: int) -> list[str]:
    """Report parts that do not belong together: by their metadata they are not what their names and number say."""
    problems: list[str] = []
    if not any(file.suffix == SUFFIX for file, _ in parts):
        return problems
    for number, (file, metadata) in enumerate(parts):
        found, count = metadata.get("split.no", 0), metadata.get("split.count") or 1
        if count != len(parts):
            remedy = "keep the parts' own names, ending in -00001-of-00002.gguf and so on, and put them in one folder"
            problems.append(f"{file.name}: is one of {count} parts, and {len(parts)} were found; {remedy}")
        elif found != number:
            problems.append(f"{file.name}: holds part {_ordinal(found)} and stands in the place of part {number + 1}")
    promised = {metadata["split.tensors.count"] for _, metadata in parts if "split.tensors.count" in metadata}
    if not problems and promised - {num_tensors}:
        problems.append(
            f"{parts[0][0].name}: its parts hold {num_tensors} tensors, {shown(sorted(promised, key=str))} are promised"
        )
    return problems


def _ordinal(number: object) -> object:
    return number + 1 if isinstance(number, int) else shown(number)
