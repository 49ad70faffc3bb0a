"""Writes a GGUF file as a stream: metadata, the table of tensors, then their data, one chunk in memory at a time.

Owns the container's bytes (version 3, little-endian, tensors at multiples of 32 bytes). Refuses to know what the keys mean
(`formats/gguf_metadata.py`) and where data comes from: the caller yields bytes. Source: the GGUF specification of ggml.
Read `write_safetensors.py` for safetensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path

from gemcutter.checkpoint.container import gguf_file
from gemcutter.checkpoint.container.gguf_file import MAGIC, TENSOR_TYPES
from gemcutter.checkpoint.write.write_safetensors import Spec, check_room, explained, write_all
from gemcutter.errors import CheckpointError

ALIGNMENT, MAX_AXES = 32, 4
VERSION = 3

# type -> (its number, values in a block, bytes of a block)
TYPES = {name: (number, values, nbytes) for number, (name, values, nbytes) in TENSOR_TYPES.items()}
# kind of a metadata value -> (its number, how struct packs it); strings are packed by themselves
KINDS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "str": (8, ""),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
ARRAY = 9

Entry = tuple[str, str, object]  # key, kind (one of KINDS, in brackets for an array of such), value


def write_gguf(path: Path, metadata: Sequence[Entry], specs: Sequence[Spec], data: Iterable[memoryview]) -> None:
    """Write one GGUF file at `path`, over a file of that name.

    A spec is a name, a type (one of TYPES) and a shape, rows first; `data` yields the tensors' bytes in the order of `specs`,
    none of its chunks crossing into the next tensor. The file stands incomplete under its name until this returns. Raises
    CheckpointError for bad specs, data that does not match them, or a disk that can't take it.
    """
    sizes = _sizes(path, specs)
    check_room(path.parent, sum(sizes))
    chunks = iter(data)
    with explained(path):
        file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by the next block; unbuffered, so closing can't fail late
    with file:
        header = _header(metadata, specs, sizes)
        write_all(file, path, memoryview(header + bytes(-len(header) % ALIGNMENT)))
        for spec, size in zip(specs, sizes, strict=True):
            _write_tensor(file, path, spec, size, chunks)
        if any(chunk.nbytes for chunk in chunks):
            raise CheckpointError(f"{path}: the data goes on after the last tensor; every tensor needs a spec")


def tensor_nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Count the bytes of a tensor. Raises ValueError for an unknown type, and where whole blocks do not fill a row."""
    if kind not in TYPES:
        raise ValueError(f"type {kind} is unknown; known are {', '.join(TYPES)}")
    if len(shape) > MAX_AXES:
        raise ValueError(f"shape {list(shape)}: at most {MAX_AXES} axes expected")
    return gguf_file.tensor_nbytes(TYPES[kind][0], shape)


def _sizes(path: Path, specs: Sequence[Spec]) -> list[int]:
    sizes, problems, seen = list[int](), list[str](), set[str]()
    for name, kind, shape in specs:
        try:
            sizes.append(tensor_nbytes(kind, shape))
        except ValueError as error:
            problems.append(f"{name}: {error}")
        if name in seen:
            problems.append(f"tensor name {name} is given twice")
        seen.add(name)
    if problems:
        raise CheckpointError(f"{path} can't be written ({len(problems)} problems, nothing was written)", problems)
    return sizes


def _write_tensor(file: FileIO, path: Path, spec: Spec, size: int, chunks: Iterator[memoryview]) -> None:
    missing = size
    while missing:
        chunk = next(chunks, None)
        if chunk is None:
            raise CheckpointError(f"{path}: the data ends {missing:,} bytes before the end of tensor {spec[0]}")
        if chunk.nbytes > missing:
            raise CheckpointError(f"{path}: tensor {spec[0]} got {chunk.nbytes:,} bytes where {missing:,} are missing")
        write_all(file, path, chunk)
        missing -= chunk.nbytes
        del chunk  # or it would stay in memory while the next one is made
    write_all(file, path, memoryview(bytes(-size % ALIGNMENT)))


# ---- the header ----


def _header(metadata: Sequence[Entry], specs: Sequence[Spec], sizes: Sequence[int]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(specs), len(metadata))]
    for key, kind, value in metadata:
        parts.append(_string(key) + _value(kind, value))
    offset = 0
    for (name, dtype, shape), size in zip(specs, sizes, strict=True):
        sizes_first = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))  # GGUF lists the fastest axis first
        parts.append(_string(name) + sizes_first + struct.pack("<IQ", TYPES[dtype][0], offset))
        offset += size + -size % ALIGNMENT
    return b"".join(parts)


def _value(kind: str, value: object) -> bytes:
    if not kind.startswith("["):
        return struct.pack("<I", KINDS[kind][0]) + _bare(kind, [value])
    assert isinstance(value, Sequence)
    inner = kind.strip("[]")
    return struct.pack("<IIQ", ARRAY, KINDS[inner][0], len(value)) + _bare(inner, value)


def _bare(kind: str, values: Sequence[object]) -> bytes:
    if kind == "str":
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{KINDS[kind][1]}", *values)


def _string(text: object) -> bytes:
    content = str(text).encode("utf-8")
    return struct.pack("<Q", len(content)) + content
