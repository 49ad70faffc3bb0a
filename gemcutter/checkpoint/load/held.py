"""How weights are held in memory once they are loaded, told from headers alone.

Owns the rule that loader and `inspect` share: a dense tensor stays mapped where it is stored no wider than it is computed, else
it is converted to the compute dtype; a packed one gets the form that the backend gives it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from gemcutter.checkpoint.container.lazy_tensor import DTYPES
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.formats.lora import Adapter, Factors
from gemcutter.checkpoint.load.match import Checkpoint, Piece

ITEM_BYTES = {"float32": 4, "bfloat16": 2}  # of the compute dtypes


def stays_mapped(dtypes: Sequence[str], stored: str, compute: str, device: str) -> bool:
    """Return whether a dense part of dtype `stored` stays as it is, in a weight whose dense parts have these dtypes.

    Dtypes are spelled as safetensors spells them, but for the compute dtype. Kernels are selected by how all parts of a weight
    are held, so dense ones of several dtypes become one.
    """
    return device == "cpu" and len(set(dtypes)) < 2 and DTYPES[stored][0] <= ITEM_BYTES[compute]


def held_as(pieces: Sequence[StoredTensor], compute: str, device: str, packing: Callable[[str], str]) -> list[str]:
    """List how the parts of a weight are held: dtypes as torch spells them, or the names of packings."""
    dense = [piece.data.dtype for piece in pieces if not isinstance(piece.data, PackedTensor)]
    return [
        packing(piece.data.dtype)
        if isinstance(piece.data, PackedTensor)
        else DTYPES[piece.data.dtype][1]
        if stays_mapped(dense, piece.data.dtype, compute, device)
        else compute
        for piece in pieces
    ]


def changed_pieces(adapter: Adapter, checkpoint: Checkpoint) -> frozenset[Piece]:
    """Return the decoder's stored pieces, by parameter and part, that an adapter changes."""
    return pieces_of(adapter.factors, checkpoint.matched.pieces)


def pieces_of(factors: Iterable[Factors], pieces: Mapping[str, Sequence[StoredTensor]]) -> frozenset[Piece]:
    """Return which of the stored pieces of every parameter are changed."""
    return frozenset(
        (each.name, piece.part)
        for each in factors
        for piece in pieces[each.name]
        if None in (piece.part, each.part) or piece.part == each.part
    )
