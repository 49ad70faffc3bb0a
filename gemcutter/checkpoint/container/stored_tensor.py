"""What a format yields: one stored tensor under its canonical name.

Owns the contract between `formats/`, which know foreign names, and `match.py`, which knows the plan; each may change without
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor

if TYPE_CHECKING:  # headers are read without torch
    from torch import Tensor

    from gemcutter.quant.packed import Packed


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A matrix that stored tensors pack together: codes, scales, and whatever else the scheme has.

    `name` is the file's name of the codes, `dtype` the scheme's name, `shape` the logical shape; `build` makes the weight of
    mapped views and raises ValueError where the stored tensors do not fit each other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[LazyTensor, ...]
    build: Callable[[], Packed] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Count the stored bytes."""
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def origin(self) -> str:
        """Return "file:name", for messages."""
        return self.stored[0].origin

    def release(self) -> None:
        """Let the kernel drop the pages of all stored tensors, once they have been copied elsewhere."""
        for tensor in self.stored:
            tensor.release()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One stored tensor: which part of which parameter it is, or that it is none of the decoder's.

    `name` None means unknown to the format; a `name` in parentheses, such as "(vision tower)", is known and not the decoder's.
    `fault` says why the stored tensors make no weight of any shape; it is an error only where the weight is needed.
    """

    name: str | None
    part: str | None
    data: LazyTensor | PackedTensor
    fault: str | None = None

    @property
    def label(self) -> str:
        """Name the parameter and part for a message."""
        return f"{self.name}[{self.part}]" if self.part else str(self.name)


def release_pages(pieces: Iterable[StoredTensor]) -> None:
    """Let the kernel drop the mapped pages of some stored tensors; where they are read again, they come from its page cache."""
    for piece in pieces:
        piece.data.release()


def rearranged(data: LazyTensor | PackedTensor, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> LazyTensor:
    """Return a tensor that a file lays out otherwise than the plan, in the shape into which `change` brings its values.

    It is read whole. What is packed in the file comes in float32.
    """
    if isinstance(data, LazyTensor):
        return replace(data, shape=shape, arranged=lambda: change(data.torch()))
    first = data.stored[0]
    arranged = lambda: change(data.build().dequantize())  # noqa: E731 - read when it is loaded
    return LazyTensor(first.name, "F32", shape, data.nbytes, first.offset, first.mapped, arranged)
