"""What every packed weight can do, and what its constructors refuse.

Owns the `Packed` protocol, which each scheme fulfils with a frozen dataclass of tensors. All tensors of one weight share their
leading axes ([rows, ...] or [experts, rows, ...]), so that cutting and gathering is written once, here. They are usually views
of a mapped file: nobody writes to them or copies them whole. Refuses to know any scheme. Read `affine.py` next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Packed(Protocol):
    """A matrix [rows, columns], or a stack [experts, rows, columns], kept as a file packs it."""

    @property
    def scheme(self) -> str:
        """Name the layout and its parameters, for kernels and reports."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape."""
        ...

    @property
    def nbytes(self) -> int:
        """Count the stored bytes, mapped or resident."""
        ...

    def rows(self, start: int, stop: int) -> Packed:
        """Return rows start to stop - 1 of every expert without copying."""
        ...

    def columns(self, start: int, stop: int) -> Packed:
        """Return columns start to stop - 1 without copying. Raises ValueError where that would cut a group or a block in two."""
        ...

    def expert(self, index: int) -> Packed | Tensor:
        """Return one matrix of a stack without copying. Raises ValueError where there is no stack."""
        ...

    def gather(self, ids_N: Tensor) -> Packed:
        """Return the rows that ids name, in their order, and touch no others."""
        ...

    def dequantize(self) -> Tensor:
        """Compute the values in float32, in `shape`: the definition of the scheme."""
        ...


@dataclass(frozen=True, slots=True)
class Stack:
    """Experts that a file stores apart, as one packed weight [experts, rows, columns]."""

    items: tuple[Packed, ...]

    @property
    def scheme(self) -> str:
        """Name the layout that all experts share."""
        return self.items[0].scheme

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape."""
        return (len(self.items), *self.items[0].shape)

    @property
    def nbytes(self) -> int:
        """Count the stored bytes of all experts."""
        return sum(item.nbytes for item in self.items)

    def rows(self, start: int, stop: int) -> Stack:
        """Return rows start to stop - 1 of every expert without copying."""
        return Stack(tuple(item.rows(start, stop) for item in self.items))

    def columns(self, start: int, stop: int) -> Stack:
        """Return columns start to stop - 1 of every expert without copying."""
        return Stack(tuple(item.columns(start, stop) for item in self.items))

    def expert(self, index: int) -> Packed:
        """Return one matrix as it is stored."""
        return self.items[index]

    def gather(self, ids_N: Tensor) -> Stack:
        """Return the rows that ids name, of every expert."""
        return Stack(tuple(item.gather(ids_N) for item in self.items))

    def dequantize(self) -> Tensor:
        """Compute the values in float32, [experts, rows, columns]."""
        return torch.stack([item.dequantize() for item in self.items])


@dataclass(frozen=True, slots=True)
class DenseStack:
    """Experts that a file stores apart and dense: a stack [experts, rows, columns] that is never copied into one tensor.

    Its experts are plain tensors, so that they meet the same kernels as any dense matrix.
    """

    items: tuple[Tensor, ...]

    @property
    def scheme(self) -> str:
        """Name the dtype that all experts share."""
        return dtype_name(self.items[0].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the logical shape."""
        return (len(self.items), *self.items[0].shape)

    @property
    def nbytes(self) -> int:
        """Count the bytes of all experts."""
        return sum(item.nbytes for item in self.items)

    def rows(self, start: int, stop: int) -> DenseStack:
        """Return rows start to stop - 1 of every expert without copying."""
        return DenseStack(tuple(item[start:stop] for item in self.items))

    def columns(self, start: int, stop: int) -> DenseStack:
        """Return columns start to stop - 1 of every expert without copying. Raises ValueError where they do not exist."""
        check_cut(start, stop, self.items[0].shape[-1], 1)
        return DenseStack(tuple(item[:, start:stop] for item in self.items))

    def expert(self, index: int) -> Tensor:
        """Return one matrix as it is stored."""
        return self.items[index]

    def gather(self, ids_N: Tensor) -> DenseStack:
        """Copy the rows that ids name, of every expert."""
        return DenseStack(tuple(item.index_select(0, ids_N.to(item.device)) for item in self.items))

    def dequantize(self) -> Tensor:
        """Return the values in float32, [experts, rows, columns]."""
        return torch.stack([item.float() for item in self.items])


def stack(items: Sequence[Packed | Tensor]) -> Stack | DenseStack:
    """Join experts that were stored apart. Raises ValueError unless all are matrices of one shape and scheme."""
    dense = tuple(item for item in items if isinstance(item, Tensor))
    packed = tuple(item for item in items if not isinstance(item, Tensor))
    kinds = sorted(
        {f"{item.scheme} {list(item.shape)}" for item in packed} | {f"{dtype_name(x.dtype)} {list(x.shape)}" for x in dense}
    )
    if len(kinds) != 1 or len(items[0].shape) != 2:
        raise ValueError(f"experts: matrices of one scheme and shape expected, found {', '.join(kinds) or 'none'}")
    return Stack(packed) if packed else DenseStack(dense)


# ---- one implementation of the cuts for all dataclasses whose tensors, but for vectors, are [..., rows, something] ----

P = TypeVar("P", bound=Packed)


def cut_rows(packed: P, start: int, stop: int) -> P:
    """Return rows start to stop - 1 as views."""
    return _map(packed, lambda array: array[..., start:stop, :])


def cut_columns(packed: P, start: int, stop: int, run: int) -> P:
    """Return columns start to stop - 1 as views, where every array has a number for each row or evenly many for `run` columns.

    Raises ValueError where the cut is not at a multiple of `run`.
    """
    columns = packed.shape[-1]
    check_cut(start, stop, columns, run)

    def cut(array: Tensor) -> Tensor:
        width = array.shape[-1]
        return array if width == 1 else array[..., start * width // columns : stop * width // columns]

    return _map(packed, cut)


def check_cut(start: int, stop: int, columns: int, run: int) -> None:
    """Raise ValueError unless columns start to stop - 1 exist and begin and end at multiples of `run`, or with the last."""
    if not 0 <= start < stop <= columns or start % run or (stop % run and stop != columns):
        raise ValueError(f"columns {start} to {stop}: multiples of {run} up to {columns} expected")


def cut_expert(packed: P, index: int) -> P:
    """Return one matrix of a stack as views. Raises ValueError where there is no stack."""
    if len(packed.shape) != 3:
        raise ValueError(f"expert {index}: found a single matrix {list(packed.shape)}")
    return _map(packed, lambda array: array[index])


def gather_rows(packed: P, ids_N: Tensor) -> P:
    """Copy the rows that ids name."""
    return _map(packed, lambda array: array.index_select(-2, ids_N.to(array.device)))


def stored_bytes(packed: Packed) -> int:
    """Count the bytes of all tensors; an axis that is only repeated, not stored, counts once."""
    return sum(
        array.itemsize * math.prod(size for size, step in zip(array.shape, array.stride(), strict=True) if step)
        for array in _tensors(packed).values()
    )


def floats_of(packed: Packed) -> list[Tensor]:
    """Return the scales and offsets of a weight that are stored in floats, [..., rows, groups] each; none if it has none such.

    Where there are some, the weight's values are finite if they are: codes always are.
    """
    own = getattr(packed, "floats", None)
    found = list(_tensors(packed).values()) if own is None else own()
    return [array for array in found if array.is_floating_point() and array.itemsize > 1]


def _tensors(packed: Any) -> dict[str, Tensor]:
    found = {each.name: getattr(packed, each.name) for each in fields(packed)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _map(packed: P, pick: Callable[[Tensor], Tensor]) -> P:
    changed = {name: pick(array) for name, array in _tensors(packed).items() if array.ndim > 1}
    return replace(packed, **changed)  # type: ignore[type-var]  # a Packed is a dataclass, which no protocol can say


# ---- what a constructor refuses ----


def lead_axes(name: str, array: Tensor) -> tuple[int, ...]:
    """Return all axes but the last: (rows,) or (experts, rows). Raises ValueError for any other number of axes."""
    if array.ndim not in (2, 3):
        raise ValueError(f"{name}: shape [rows, ...] or [experts, rows, ...] expected, found {list(array.shape)}")
    return tuple(array.shape[:-1])


def mismatches(name: str, array: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[str]:
    """Return what is wrong with an array's shape and dtype."""
    problems = []
    if tuple(array.shape) != tuple(shape):
        problems.append(f"{name}: shape {list(shape)} expected, found {list(array.shape)}")
    if array.dtype not in dtypes:
        problems.append(f"{name}: {' or '.join(map(dtype_name, dtypes))} expected, found {dtype_name(array.dtype)}")
    return problems


def dtype_name(dtype: torch.dtype) -> str:
    """Format a dtype as messages do."""
    return str(dtype).removeprefix("torch.")


def refuse(problems: Sequence[str]) -> None:
    """Raise ValueError if there are problems, naming all of them."""
    if problems:
        raise ValueError("; ".join(problems))
