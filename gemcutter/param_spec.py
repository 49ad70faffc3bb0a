"""What a plan says of one tensor: its name, shape and kind, and in a rank's plan which slices of it the rank holds.

Owns `ParamSpec`, the contract between checkpoint, model, memory planner and tests; refuses to know which tensors there are, which
`plan.py` and `layer_params.py` say. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from gemcutter.shard import Shard, Slice


class Access(Enum):
    """How a tensor is read: whole in every step, or only by the rows that a step's tokens name."""

    DENSE = "dense"
    ROWS = "rows"


class ParamKind(Enum):
    """What a tensor is, which decides how it is loaded, counted and cut."""

    MATRIX = "matrix"  # multiplied with, or gathered from by rows
    EXPERTS = "experts"  # one matrix an expert, of which a token reads `top_k`
    NORM = "norm"  # the weight of an RMSNorm
    VECTOR = "vector"  # factors of single columns or experts
    SCALAR = "scalar"
    INDEX = "index"  # integers
    CONV = "conv"  # kernel of a convolution, (out, in / groups, width, ...)
    BIAS = "bias"  # added to columns


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor that the model needs: the contract between checkpoint, model, memory planner and tests."""

    name: str
    shape: tuple[int, ...]
    kind: ParamKind = ParamKind.MATRIX
    parts: tuple[tuple[str, int], ...] = ()  # rows of the second-to-last axis, stored apart in most checkpoints
    access: Access = Access.DENSE
    default: float | None = None  # what a checkpoint that lacks the tensor means
    scale: float = 1.0  # multiplied in when the tensor is loaded
    buffer: bool = False  # not counted as a parameter (layer scalars, token order)
    shard_axis: int | None = None  # cut here by tensor parallelism, counted from the end; None: every rank holds all of it
    shard_unit: int = 1  # elements along that axis that stay together: a head, say
    is_even: bool = True  # whether all ranks hold equally much; else some hold one unit more than others
    slices: tuple[Slice, ...] = ()  # in a rank's plan: what it holds of each part, or of the tensor where no part is cut

    @property
    def layer(self) -> int | None:
        """Return the index of the layer that the tensor belongs to; None for the others."""
        return int(self.name.split(".", 2)[1]) if self.name.startswith("layers.") else None

    @property
    def integer(self) -> bool:
        """Return whether the elements are integers."""
        return self.kind is ParamKind.INDEX

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape of the whole tensor, as checkpoints hold it, whatever this rank holds of it."""
        shape = list(self.shape)
        if self.slices:
            shape[self.slices[0].axis] = sum(piece.of for piece in self.slices)
        return tuple(shape)

    def on_rank(self, shard: Shard) -> ParamSpec:
        """Return what one rank holds of the tensor: its own shape, parts and slices. Raises ConfigError for uneven shares."""
        if self.shard_axis is None:
            return self
        is_by_part = self.shard_axis == -2 and bool(self.parts)
        sizes = [rows for _, rows in self.parts] if is_by_part else [self.shape[self.shard_axis]]
        slices = tuple(shard.cut(self.shard_axis, size, self.shard_unit, self.is_even) for size in sizes)
        shape = list(self.shape)
        shape[self.shard_axis] = sum(piece.size for piece in slices)
        parts = (
            tuple((name, piece.size) for (name, _), piece in zip(self.parts, slices, strict=False)) if is_by_part else self.parts
        )
        return replace(self, shape=tuple(shape), parts=parts, slices=slices)

    @property
    def elements(self) -> int:
        """Count the elements."""
        return math.prod(self.shape)
