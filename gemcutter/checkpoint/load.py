"""Fills a plan's parameters from matched pieces.

Owns the policy of memory: on the CPU a tensor that is stored no wider than it is computed stays mapped, in place and unfused;
anything else is copied once, tile by tile, and its mapped pages are given back at once. Rows-only tables (the per-layer
embeddings) always stay mapped. Knows no format. Read `match.py` for what comes in, `quant/__init__.py` for what goes out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemcutter.checkpoint.match import Checkpoint
from gemcutter.checkpoint.piece import Piece
from gemcutter.plan import Access, ParamSpec
from gemcutter.quant import Weight

Progress = Callable[[int, int], None]  # bytes done, bytes in all

COPY_BYTES = 16 << 20  # mapped bytes converted between two releases of their pages


def load_params(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> dict[str, Weight | Tensor]:
    """Give every parameter of the plan: matrices as Weights, vectors as float32 tensors, the rows-only table as a mapped
    tensor.
    """
    pieces = checkpoint.matched.pieces
    total = sum(piece.data.nbytes for found in pieces.values() for piece in found)
    done, params = 0, dict[str, Weight | Tensor]()
    for spec in checkpoint.plan.params():
        params[spec.name] = _load(spec, pieces[spec.name], dtype, device)
        done += sum(piece.data.nbytes for piece in pieces[spec.name])
        if progress is not None:
            progress(done, total)
    return params


def _load(spec: ParamSpec, pieces: tuple[Piece, ...], dtype: torch.dtype, device: torch.device) -> Weight | Tensor:
    if not pieces:
        assert spec.default is not None
        return torch.full(spec.shape, spec.default)
    if spec.access is Access.ROWS:
        table = pieces[0].data.torch()
        pieces[0].data.mapped.expect_scattered_reads(pieces[0].data.offset, pieces[0].data.nbytes)
        return table
    if spec.integer:
        return pieces[0].data.torch().to(device, torch.long, copy=True)
    if len(spec.shape) == 1:
        return pieces[0].data.torch().to(device, torch.float32, copy=True)
    names = tuple(name for name, _ in spec.parts)
    is_uniform = len({piece.data.dtype for piece in pieces}) == 1  # kernels are chosen by the one dtype of a weight
    if is_uniform and all(_stays_mapped(piece, dtype, device) for piece in pieces):
        parts = tuple(piece.data.torch() for piece in pieces)
    else:
        parts = tuple(_copy(piece, dtype, device) for piece in pieces)
    if len(parts) == 1 and spec.parts:  # stored as one: cut into its parts, so that all matrices of a kind look alike
        parts = torch.split(parts[0], [rows for _, rows in spec.parts], dim=-2)
    return Weight(parts, names)


def _stays_mapped(piece: Piece, dtype: torch.dtype, device: torch.device) -> bool:
    stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[piece.data.dtype]
    return device.type == "cpu" and stored.itemsize <= dtype.itemsize


def _copy(piece: Piece, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Convert a mapped tensor into memory of its own, giving its pages back on the way."""
    mapped = piece.data.torch()
    out = torch.empty(mapped.shape, dtype=dtype, device=device)
    flat, target = mapped.flatten(), out.flatten()
    elements = COPY_BYTES // mapped.element_size()
    for start in range(0, flat.numel(), elements):
        target[start : start + elements] = flat[start : start + elements]
        offset, count = start * mapped.element_size(), min(elements, flat.numel() - start) * mapped.element_size()
        piece.data.mapped.release(piece.data.offset + offset, count)
    return out
