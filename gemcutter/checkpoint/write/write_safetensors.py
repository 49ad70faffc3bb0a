"""Writes checkpoints as a stream, one tensor in memory at a time, whole or not at all.

Owns the order of a safetensors file (header first, from names and shapes known beforehand), the split into shards with an
index, and atomic replacement: what stands under a final name is always complete. Refuses to know where data comes from:
the caller yields bytes or torch tensors. Read next: `source.py`, which reads what this writes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gemcutter.checkpoint.container.lazy_tensor import DTYPES, METADATA_KEY, name_problem, tensor_nbytes
from gemcutter.checkpoint.container.shard_index import INDEX_NAME, SINGLE_NAME
from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import shown

if TYPE_CHECKING:
    from torch import Tensor

Spec: TypeAlias = tuple[str, str, tuple[int, ...]]  # name, dtype in safetensors spelling, shape
Chunk: TypeAlias = "bytes | bytearray | memoryview | Tensor"

# Other libraries ask for this mark before they load a file as PyTorch's.
PYTORCH_METADATA = {"format": "pt"}


def write_safetensors(
    path: Path, specs: Iterable[Spec], data: Iterable[Chunk], metadata: Mapping[str, str] = PYTORCH_METADATA
) -> None:
    """Write one safetensors file at `path`, replacing a file of that name only once the new one is complete.

    `data` yields the tensors in the order of `specs`; each comes whole or as several chunks, none of which crosses into the
    next tensor. A chunk is bytes, or a torch tensor of the spec's dtype that has its shape or holds some of its rows. Tensors
    lie in the given order, so after one of odd size the next is misaligned and costs a copy when read: put wide dtypes first.

    Raises CheckpointError for bad specs, data that does not match them, or a folder that can't be written; whatever `data`
    raises passes through. Nothing is left behind in either case.
    """
    listed = list(specs)
    _check_specs(path, listed, metadata)
    check_room(path.parent, _data_bytes(listed))
    chunks = iter(data)
    with whole_file(path) as file:
        _write_body(file, path, listed, chunks, metadata)
        _check_exhausted(path, chunks)


def write_sharded(
    folder: Path,
    specs: Iterable[Spec],
    data: Iterable[Chunk],
    metadata: Mapping[str, str] = PYTORCH_METADATA,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> tuple[Path, ...]:
    """Write a checkpoint into `folder` (made if absent) as shards with an index, or as `model.safetensors` if one suffices.

    `specs`, `data` and `metadata` are those of `write_safetensors`. A shard holds at most `max_shard_bytes` of data, or one
    larger tensor. The folder must not hold safetensors files yet: old and new shards must never be taken for one checkpoint.

    Returns the files written, shards first. Raises as `write_safetensors`, and then removes the shards it had finished.
    """
    listed = list(specs)
    _check_specs(folder, listed, metadata)
    _make_empty_folder(folder)
    check_room(folder, _data_bytes(listed))
    shards = _split(listed, max_shard_bytes)
    names = (
        [SINGLE_NAME]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    chunks = iter(data)
    try:
        for name, shard in zip(names, shards, strict=True):
            with whole_file(folder / name) as file:
                _write_body(file, folder / name, shard, chunks, metadata)
        _check_exhausted(folder, chunks)
        if len(shards) > 1:
            weight_map = {spec[0]: name for name, shard in zip(names, shards, strict=True) for spec in shard}
            write_json(folder / INDEX_NAME, {"metadata": {"total_size": _data_bytes(listed)}, "weight_map": weight_map})
    except BaseException:
        for name in [*names, INDEX_NAME]:  # the folder held none of them before
            (folder / name).unlink(missing_ok=True)
        raise
    return tuple(folder / name for name in names) + ((folder / INDEX_NAME,) if len(shards) > 1 else ())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object at `path`, replacing a file of that name only once the new one is complete.

    Raises CheckpointError if the folder can't be written, TypeError or ValueError for values that JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as file:
        write_all(file, path, memoryview(text.encode("utf-8")))


# ---- what may be written ----


def _check_specs(target: Path, specs: Sequence[Spec], metadata: Mapping[str, str]) -> None:
    problems = []
    seen: set[str] = set()
    for name, dtype, shape in specs:
        if fault := name_problem(name):
            problems.append(fault)
        if name in seen:
            problems.append(f"tensor name {name} is given twice")
        seen.add(name)
        try:
            tensor_nbytes(dtype, shape)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()):
        problems.append(f"metadata {shown(dict(metadata))} is not a map of strings")
    if problems:
        raise CheckpointError(f"{target} can't be written ({len(problems)} problems, nothing was written)", problems)


def _data_bytes(specs: Sequence[Spec]) -> int:
    return sum(tensor_nbytes(dtype, shape) for _, dtype, shape in specs)


def check_room(folder: Path, nbytes: int) -> None:
    """Refuse before the first byte what can't fit, instead of failing after minutes."""
    with explained(folder):
        free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise CheckpointError(f"{folder} has {free:,} bytes free, the tensors take {nbytes:,}; free some, or choose another disk")


def _make_empty_folder(folder: Path) -> None:
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors") or name == INDEX_NAME)
    if found:
        raise CheckpointError(
            f"{folder} already holds {', '.join(found[:4])}; choose another folder, or remove the old checkpoint"
        )


def _split(specs: Sequence[Spec], max_shard_bytes: int) -> list[list[Spec]]:
    """Cut the specs, in order, into runs of at most `max_shard_bytes` of data."""
    shards: list[list[Spec]] = [[]]
    room = max_shard_bytes
    for name, dtype, shape in specs:
        nbytes = tensor_nbytes(dtype, shape)
        if nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, dtype, shape))
        room -= nbytes
    return shards


# ---- the stream ----


def _write_body(file: FileIO, path: Path, specs: Sequence[Spec], chunks: Iterator[Chunk], metadata: Mapping[str, str]) -> None:
    """Write header and data of one file, taking from `chunks` exactly what its tensors need."""
    write_all(file, path, memoryview(_header(specs, metadata)))
    for spec in specs:
        missing = tensor_nbytes(spec[1], spec[2])
        while missing:
            chunk = next(chunks, None)
            if chunk is None:
                raise CheckpointError(f"{path}: the data ends {missing:,} bytes before the end of tensor {spec[0]}")
            content = _content(chunk, spec, path)
            if content.nbytes > missing:
                raise CheckpointError(f"{path}: tensor {spec[0]} got {content.nbytes:,} bytes where {missing:,} are missing")
            write_all(file, path, content)
            missing -= content.nbytes
            del chunk, content  # or they would stay in memory while the next one is made


def _header(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    """Return the length prefix and the header, padded with spaces so that the data starts at a multiple of 8 bytes."""
    entries: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in specs:
        end = start + tensor_nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(chunk: Chunk, spec: Spec, path: Path) -> memoryview:
    """Return the bytes of a chunk, having checked a torch tensor's dtype and shape against the spec."""
    if isinstance(chunk, bytes | bytearray | memoryview):
        return memoryview(chunk).cast("B")
    import torch

    name, dtype, shape = spec
    if chunk.numel():
        expected = getattr(torch, DTYPES[dtype][1])
        is_rows = chunk.dim() == len(shape) > 0 and tuple(chunk.shape[1:]) == tuple(shape[1:])
        if chunk.dtype != expected or not (is_rows or tuple(chunk.shape) == tuple(shape)):
            found = f"{str(chunk.dtype).removeprefix('torch.')} {list(chunk.shape)}"
            raise CheckpointError(f"{path}: tensor {name} is announced as {dtype} {list(shape)}, the data is {found}")
    flat = chunk.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _check_exhausted(path: Path, chunks: Iterator[Chunk]) -> None:
    for chunk in chunks:
        size = chunk.nbytes if hasattr(chunk, "nbytes") else len(chunk)
        if size:
            raise CheckpointError(f"{path}: the data goes on after the last tensor; every tensor needs a spec")


# ---- whole or not at all ----


@contextmanager
def whole_file(path: Path) -> Iterator[FileIO]:
    """Open a hidden file beside `path`; give it that name if the block ends well, remove it if it does not."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with explained(path):
            file = open(part, "xb", buffering=0)  # noqa: SIM115 - closed by the next block; unbuffered, so closing can't fail late
        with file:
            yield file
            with explained(path):
                os.fsync(file.fileno())
        with explained(path):
            os.replace(part, path)
    except BaseException:
        with suppress(OSError):  # the first failure is the one to tell
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_all(file: FileIO, path: Path, content: memoryview) -> None:
    """Write all bytes. Raises CheckpointError that names `path`."""
    with explained(path):
        while content:
            content = content[file.write(content) :]


def sync_folder(folder: Path) -> None:
    """Make a rename durable, on systems and file systems that can sync a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into an error that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "check that the folder exists, may be written and has free space, or choose another"
        raise CheckpointError(f"{path} can't be written: {error.strerror}; {remedy}") from error
