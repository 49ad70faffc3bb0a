"""What the leader tells the other ranks, as bytes: a command's name, plain values, and tensors beside them.

Owns the encoding: the length of a message, a JSON text, and the bytes of the tensors that it names, in order. It holds no code
and no Python objects, so that whoever reads it builds nothing but values. Refuses to know what commands do. Read `leader.py` for
those.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gemcutter.errors import RankError
from gemcutter.load_options import LoadOptions
from gemcutter.ops.step import KVRange, MediaRows, Step
from gemcutter.plan import GroupId

HEAD = struct.Struct("<QQ")  # bytes of the JSON text and of everything after it
ALIGNMENT = 16
MOST_BYTES = 1 << 32  # of one message: more is no message of ours

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.uint8, torch.int64, torch.float32, torch.bfloat16)}


def encode(command: str, content: Mapping[str, Any]) -> bytes:
    """Return a message: values are numbers, texts, None, and lists, mappings, slices and tensors (of DTYPES) of them."""
    tensors = list[Tensor]()
    text = json.dumps([command, _plain(content, tensors)], separators=(",", ":")).encode()
    blobs = [bytes(each.cpu().contiguous().view(torch.uint8).numpy().data) if each.numel() else b"" for each in tensors]
    padded = [blob + bytes(-len(blob) % ALIGNMENT) for blob in blobs]
    return b"".join((HEAD.pack(len(text), sum(map(len, padded))), text, *padded))


def decode(text: bytes, data: bytearray) -> tuple[str, dict[str, Any]]:
    """Return a command and its content; tensors are views of `data`."""
    command, content = json.loads(text)
    return command, _values(content, _Reader(data))


def receive(connection: socket.socket) -> tuple[str, dict[str, Any]] | None:
    """Wait for a message; None where the other side has closed the connection. Raises RankError for what is no message."""
    head = _exactly(connection, HEAD.size)
    if head is None:
        return None
    size, more = HEAD.unpack(head)
    if size + more > MOST_BYTES:
        raise RankError("what came from another rank is no message; do all ranks run the same version?")
    text, data = _exactly(connection, size), _exactly(connection, more)
    return None if text is None or data is None else decode(bytes(text), data)


def opening(options: LoadOptions, stages: Sequence[range], cpus: Sequence[int] = ()) -> bytes:
    """Return the first message to a rank: how the model is loaded, the layers of each stage, processors to keep to."""
    layers = [slice(stage.start, stage.stop) for stage in stages]
    return encode("open", {"options": json.dumps(asdict(options)), "stages": layers, "cpus": cpus})


def opened(content: Mapping[str, Any]) -> tuple[LoadOptions, tuple[range, ...], list[int]]:
    """Return what the first message says."""
    options = json.loads(content["options"])
    lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    stages = tuple(range(layers.start, layers.stop) for layers in content["stages"])
    return LoadOptions(**options | lists), stages, content["cpus"]


def step_content(step: Step) -> dict[str, Any]:
    """Return what another rank needs to build a step over its own slices."""
    return {
        "ids": step.ids_N,
        "ple_ids": None if step.ple_ids_N is step.ids_N else step.ple_ids_N,
        "positions": step.positions_N,
        "query_start": step.query_start,
        "kv_ranges": {group: [_range_content(each) for each in ranges] for group, ranges in step.kv_ranges.items()},
        "slot_mapping": dict(step.slot_mapping),
        "logit_rows": step.logit_rows,
        "last_visible": dict(step.last_visible),
        "media": None if step.media is None else [step.media.rows_K, step.media.embeds_KD],
        "adapters": step.adapters,
    }


def step_of(content: Mapping[str, Any], device: torch.device) -> Step:
    """Build a step on a device, without rotations and metadata, which the rank's decoder makes."""
    logit_rows, media = content["logit_rows"], content["media"]
    ids_N = content["ids"].to(device)
    return Step(
        ids_N=ids_N,
        ple_ids_N=ids_N if content["ple_ids"] is None else content["ple_ids"].to(device),
        positions_N=content["positions"].to(device),
        query_start=tuple(content["query_start"]),
        kv_ranges={
            GroupId(group): tuple(_range_of(each, device) for each in ranges) for group, ranges in content["kv_ranges"].items()
        },
        slot_mapping={GroupId(group): slots.to(device) for group, slots in content["slot_mapping"].items()},
        logit_rows=None if logit_rows is None else tuple(logit_rows),
        rope={},
        last_visible={GroupId(group): last.to(device) for group, last in content["last_visible"].items()},
        media=None if media is None else MediaRows(*(each.to(device) for each in media)),
        adapters=tuple(content["adapters"]),
    )


def _range_content(found: KVRange) -> list[Any]:
    return [found.start, found.where, found.pages, found.page_tokens]


def _range_of(content: list[Any], device: torch.device) -> KVRange:
    start, where, pages, page_tokens = content
    return KVRange(start, where.to(device) if isinstance(where, Tensor) else where, tuple(pages), page_tokens)


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop]}
    if isinstance(value, Mapping):
        return {"map": [[key, _plain(each, tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(each, tensors) for each in value]
    return value


def _values(value: Any, reader: _Reader) -> Any:
    if isinstance(value, list):
        return [_values(each, reader) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return reader.tensor(*content)
    if kind == "slice":
        return slice(*content)
    return {key: _values(each, reader) for key, each in content}


class _Reader:
    """Takes tensors from the bytes behind a message's text, one after the other."""

    def __init__(self, data: bytearray) -> None:
        self._data, self._at = data, 0

    def tensor(self, dtype: str, shape: list[int]) -> Tensor:
        """Return the next tensor."""
        kind = DTYPES[dtype]
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=kind)
        found = torch.frombuffer(self._data, dtype=kind, count=count, offset=self._at).view(shape)
        nbytes = count * kind.itemsize
        self._at += nbytes + -nbytes % ALIGNMENT
        return found


def _exactly(connection: socket.socket, count: int) -> bytearray | None:
    """Return so many bytes; None where the connection ends before they are here."""
    found = bytearray(count)
    view, done = memoryview(found), 0
    while done < count:
        try:
            got = connection.recv_into(view[done:])
        except (ConnectionError, OSError):
            return None
        if not got:
            return None
        done += got
    return found
