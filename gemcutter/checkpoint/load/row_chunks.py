"""Reads stored matrices some rows at a time, dense or packed, and gives their pages back on the way.

Owns `Run`, rows of a stored matrix, and the one loop that keeps converting and quantizing small: whatever a file holds, no more
than a chunk of rows is in memory. Refuses to know what the chunks become. Read `convert.py` and `load_params.py` for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import DTYPES, LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.errors import CheckpointError
from gemcutter.quant import Part
from gemcutter.quant.packed import Packed

CHUNK_ELEMENTS = 2 << 20  # 8 MB in float32, and a few times that while codes are made of them
CHUNK_ROWS = 16  # chunks begin at multiples of so many rows of their run, as panels for native kernels do


@dataclass(frozen=True, slots=True)
class Run:
    """Rows start to stop - 1 of a stored matrix, or of one expert of a stored stack.

    `offset` is where the stored matrix begins in its parameter, which may be stored in several parts.
    """

    data: LazyTensor | PackedTensor
    expert: int | None
    start: int
    stop: int
    offset: int = 0


def whole(data: LazyTensor | PackedTensor, offset: int = 0) -> list[Run]:
    """List the runs that make up a matrix [rows, columns] or a stack [experts, rows, columns]; a vector counts as one row."""
    rows = data.shape[-2] if len(data.shape) > 1 else 1
    if len(data.shape) == 3:
        return [Run(data, expert, 0, rows, offset) for expert in range(data.shape[0])]
    return [Run(data, None, 0, rows, offset)]


def row_chunks(runs: Iterable[Run], elements: int = CHUNK_ELEMENTS) -> Iterator[Part]:
    """Yield the rows of all runs in order, [rows, columns], at most `elements` elements (CHUNK_ROWS rows at least) at once.

    They come as they are stored, dense or packed: views that must not be written to, and only good until the next one is asked
    for. Raises CheckpointError where stored tensors don't fit each other or the file has changed.
    """
    opened: dict[int, Packed] = {}
    for run in runs:
        data, step = run.data, max(CHUNK_ROWS, elements // max(1, run.data.shape[-1]) // CHUNK_ROWS * CHUNK_ROWS)
        if isinstance(data, PackedTensor) and id(data) not in opened:
            opened[id(data)] = unpack(data)
        for start in range(run.start, run.stop, step):
            stop = min(start + step, run.stop)
            if isinstance(data, LazyTensor):
                yield _dense_rows(data, run.expert, start, stop)
                data.release()
            else:
                matrix = opened[id(data)] if run.expert is None else opened[id(data)].expert(run.expert)
                yield matrix[start:stop] if isinstance(matrix, Tensor) else matrix.rows(start, stop)
                data.release()


def dense_dtype(data: LazyTensor | PackedTensor) -> str | None:
    """Format the dtype of what is stored dense, maybe as experts in tensors of their own; None for what is packed."""
    if isinstance(data, LazyTensor):
        return data.dtype
    return next((spelling for spelling, (_, torch_name) in DTYPES.items() if torch_name == data.dtype), None)


def dense(part: Part) -> Tensor:
    """Return rows as a tensor: in their stored dtype, or in float32 where they are packed."""
    return part if isinstance(part, Tensor) else part.dequantize()


def unpack(data: PackedTensor) -> Packed:
    """Make the packed weight. Raises CheckpointError, naming the tensor, where its arrays don't fit each other."""
    try:
        return data.build()
    except ValueError as error:
        raise CheckpointError(f"{data.origin} can't be unpacked: {error}") from error


def _dense_rows(data: LazyTensor, expert: int | None, start: int, stop: int) -> Tensor:
    """View some rows; only they are copied where the file misaligns the tensor."""
    if data.dtype not in DTYPES:
        raise CheckpointError(f"{data.origin} is stored as {data.dtype}, which is no dense dtype")
    itemsize, torch_name = DTYPES[data.dtype]
    columns, rows = data.shape[-1], data.shape[-2] if len(data.shape) > 1 else 1
    first = (expert or 0) * rows
    stride = columns * itemsize
    content = data.raw()[(first + start) * stride : (first + stop) * stride]
    if data.offset % itemsize:
        content = content.clone()
    return content.view(getattr(torch, torch_name)).view(stop - start, columns)
