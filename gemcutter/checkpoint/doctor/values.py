"""What the values of a checkpoint look like: the part of the doctor that reads them, on request.

Owns the pass over every stored matrix and vector, some rows in memory at a time, and what counts as amiss: values that are not
finite, rows of one value, heads that repeat or contradict the embeddings, scales beyond anything that training leaves. Refuses to
know headers and files beside. Read `doctor.py` for the report that this goes into.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.load.match import Matched
from gemcutter.checkpoint.load.row_chunks import dense, row_chunks, whole
from gemcutter.errors import GemcutterError
from gemcutter.quant.packed import floats_of
from gemcutter.tower_plan import BOUNDS

CHUNK_ELEMENTS = 4 << 20  # of a matrix that are looked at together
MATRIX_AXES = 3  # of a stack of matrices; kernels of convolutions have more
LARGE = 1e4  # a weight beyond it is no trained one
SCALES = (1e-3, 1e3)  # of a layer's output, where sound checkpoints lie
MOST_NAMED = 3


@dataclass(slots=True)
class ValueReport:
    """What was found: `problems` no model can be computed with, `remarks` that it can."""

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def examine_values(matched: Sequence[Matched], progress: Callable[[int, int], None] | None = None) -> ValueReport:
    """Read all values of the decoder and of towers; `progress` is told the stored bytes done and in all.

    Problems of a kind are one line.
    """
    pieces = [piece for each in matched for found in each.pieces.values() for piece in found]
    total, done = sum(piece.data.nbytes for piece in pieces), 0
    broken, constant, large = list[str](), list[str](), list[str]()
    report = ValueReport()
    for piece in pieces:
        try:
            found = _look(piece)
        except GemcutterError as error:
            report.problems += error.problems
            continue
        finally:
            done += piece.data.nbytes
            if progress is not None:
                progress(done, total)
        if found.broken:
            broken.append(f"{piece.data.origin} ({found.broken:,} of {found.rows:,} rows)")
        if found.constant and len(piece.data.shape) > 1 and piece.name not in MAY_BE_CONSTANT:
            constant.append(f"{piece.data.origin} ({found.constant:,} of {found.rows:,})")
        if found.largest > LARGE and not found.broken:
            large.append(f"{piece.data.origin} (up to {found.largest:.3g})")
        if piece.name is not None and piece.name.endswith(".scale") and not SCALES[0] <= found.largest <= SCALES[1]:
            report.remarks.append(f"{piece.data.origin}: the layer's output is scaled by {found.largest:.3g}")
    report.problems += _line("values     not finite (NaN or infinity) in", broken)
    report.remarks += _line("rows of a single value in", constant)
    report.remarks += _line(f"values beyond {LARGE:g} in", large)
    report.remarks += [remark for each in matched for remark in _heads(each)]
    return report


# Rows of ids that no text uses, and of places that no image has.
MAY_BE_CONSTANT = ("embed.tokens", "embed.ple", "head", "vision.positions")


@dataclass(slots=True)
class _Found:
    rows: int = 0
    broken: int = 0  # rows
    constant: int = 0
    largest: float = 0.0


def _look(piece: StoredTensor) -> _Found:
    """Read one stored matrix or vector; a bound may be infinite."""
    found = _Found()
    if (piece.name or "").rpartition(".")[2] in BOUNDS and isinstance(piece.data, LazyTensor):
        return _Found(rows=1, broken=int(piece.data.torch().isnan().any()))
    if isinstance(piece.data, LazyTensor) and (piece.data.arranged is not None or len(piece.data.shape) > MATRIX_AXES):
        values = piece.data.torch()
        _look_at_values(values.reshape(-1, values.shape[-1]), found)
        piece.data.release()
        return found
    for part in row_chunks(whole(piece.data), CHUNK_ELEMENTS):
        if isinstance(part, Tensor) and not part.is_floating_point():
            continue
        scales = [] if isinstance(part, Tensor) else floats_of(part)
        if scales:
            finite_R = torch.stack([torch.isfinite(each.reshape(each.shape[0], -1)).all(-1) for each in scales]).all(0)
            found.rows += len(finite_R)
            found.broken += int((~finite_R).sum())
        else:
            _look_at_values(dense(part), found)
    return found


def _look_at_values(rows_RC: Tensor, found: _Found) -> None:
    """Look at rows of floats by their bits, which processors compare several times as fast as values.

    As signed numbers positive floats are in their own order, and NaN above infinity; as unsigned ones so are negative floats.
    """
    if rows_RC.dtype not in BITS:
        rows_RC = rows_RC.float()
    signed, unsigned, infinity = BITS[rows_RC.dtype]
    bits = rows_RC.contiguous().view(signed).numpy()
    top, bottom, top_negative = bits.max(-1), bits.min(-1), bits.view(unsigned).max(-1)
    sign = 1 << (8 * bits.itemsize - 1)
    bad = (top >= infinity) | (top_negative >= infinity + sign)
    found.rows += len(bad)
    found.broken += int(bad.sum())
    found.constant += int((top == bottom).sum()) if bits.shape[-1] > 1 else 0
    largest = max(int(top[~bad].max(initial=0)), int((top_negative[~bad] & (sign - 1)).max(initial=0)))
    found.largest = max(found.largest, float(torch.tensor([largest], dtype=signed).view(rows_RC.dtype)))


# Of each dtype the integers of its size, and what infinity is among them.
BITS: dict[torch.dtype, tuple[torch.dtype, type, int]] = {
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.float32: (torch.int32, np.uint32, 0x7F800000),
}


def _line(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f", and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
        yield f"{what} {len(names):,} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:MOST_NAMED])}{more}"


def _heads(matched: Matched) -> Iterator[str]:
    """Compare a head that a tied checkpoint stores beside its embeddings."""
    heads = [piece.data for piece in matched.redundant if piece.name == "head"]
    embeddings = [piece.data for piece in matched.pieces.get("embed.tokens", ())]
    for head, embedding in zip(heads, embeddings, strict=False):
        if _digest(head) == _digest(embedding):
            yield f"{head.origin} repeats the embeddings: {head.nbytes / 1e6:.1f} MB that are not loaded"
        else:
            yield f"{head.origin} differs from the embeddings, which the config says are tied to it: it is not loaded"


def _digest(data: LazyTensor | PackedTensor) -> bytes:
    digest = hashlib.blake2b()
    for part in row_chunks(whole(data), CHUNK_ELEMENTS):
        digest.update(dense(part).contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
