"""The safetensors container: what a file's header promises.

Owns the layout of headers, taken for hostile: tensors that overlap, leave the file or contradict their own shape are problems,
noted all at once. Refuses to know tensor names and models: that is `checkpoint/formats/`. `source.py` opens the files and calls
this; `write/write_safetensors.py` writes such files.
"""

from __future__ import annotations

from typing import Any

from gemcutter.checkpoint.container.lazy_tensor import (
    MAX_BYTES,
    METADATA_KEY,
    LazyTensor,
    StoredFile,
    name_problem,
    tensor_nbytes,
)
from gemcutter.sidecar.small_file import SMALL_BYTES, parse_object, shown


def read_shard(stored: StoredFile, prefix: bytes, problems: list[str]) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Return one file's tensors and metadata as far as they are sound, noting every problem.

    `prefix` is the file's first 8 bytes. Raises ValueError, or OSError, where the header can't be read.
    """
    name, num_known = stored.path.name, len(problems)
    header, data_start = _read_header(stored, prefix)
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(f"{name}: {METADATA_KEY} is not an object of strings")
        metadata = {}
    found = [_read_entry(tensor, entry, stored, data_start, problems) for tensor, entry in header.items()]
    tensors = [tensor for tensor in found if tensor is not None]
    problems += _check_spans(tensors, stored, data_start, is_complete=len(problems) == num_known)
    return tensors, metadata


def _read_header(mapped: StoredFile, prefix: bytes) -> tuple[dict[str, Any], int]:
    """Return the header object and the offset at which the data starts. Raises ValueError, or OSError."""
    if len(prefix) < 8:
        raise ValueError(f"is truncated: {len(prefix)} bytes, and the length of the header alone takes 8")
    length = int.from_bytes(prefix, "little")
    # Judge the number before anything of that size is allocated.
    if length > SMALL_BYTES:
        raise ValueError(f"is not a safetensors file: its header would take {length:,} bytes, above {SMALL_BYTES:,}")
    if 8 + length > mapped.size_bytes:
        raise ValueError(f"is truncated: its header takes {length:,} bytes, the file has {mapped.size_bytes:,}")
    return parse_object(mapped.read(8, length), "the header"), 8 + length


def _read_entry(name: str, entry: object, mapped: StoredFile, data_start: int, problems: list[str]) -> LazyTensor | None:
    """Return the tensor that one entry of the header describes, or None with its problems noted."""
    faults = [fault] if (fault := name_problem(name)) else []
    fields = entry if isinstance(entry, dict) else {}
    nbytes, span = None, _span(fields.get("data_offsets"))
    try:
        nbytes = tensor_nbytes(fields.get("dtype"), fields.get("shape"))
    except ValueError as error:
        faults.append(str(error))
    if span is None:
        faults.append(f"data_offsets {shown(fields.get('data_offsets'))} are not two ascending offsets")
    elif nbytes is not None and span[1] - span[0] != nbytes:
        faults.append(f"data_offsets span {span[1] - span[0]:,} bytes, dtype and shape take {nbytes:,}")
    if faults or nbytes is None or span is None:
        problems += [f"{mapped.path.name}:{shown(name)[1:-1]}: {fault}" for fault in faults]
        return None
    return LazyTensor(name, fields["dtype"], tuple(fields["shape"]), nbytes, data_start + span[0], mapped)


def _span(offsets: object) -> tuple[int, int] | None:
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        return None
    return (offsets[0], offsets[1]) if 0 <= offsets[0] <= offsets[1] <= MAX_BYTES else None


def _check_spans(tensors: list[LazyTensor], mapped: StoredFile, data_start: int, *, is_complete: bool) -> list[str]:
    """Report tensors that overlap or leave the file, and bytes that no tensor owns (judged only if `is_complete`)."""
    file, size = mapped.path.name, mapped.size_bytes
    problems = []
    end, last = data_start, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            problems.append(f"{tensor.origin}: overlaps {last}")
        elif tensor.offset > end and is_complete:
            problems.append(
                f"{tensor.origin}: starts {tensor.offset - end:,} bytes after the tensor before it; gaps are not allowed"
            )
        if tensor.offset + tensor.nbytes >= end:
            end, last = tensor.offset + tensor.nbytes, tensor.name
    if end > size:
        cut = [tensor.name for tensor in tensors if tensor.offset + tensor.nbytes > size]
        problems.append(
            f"{file}: is truncated: {size:,} bytes of {end:,}; {len(cut)} of {len(tensors)} tensors are cut: {shown(cut)}"
        )
    elif end < size and is_complete:
        problems.append(f"{file}: {size - end:,} bytes after the last tensor belong to none")
    return problems
