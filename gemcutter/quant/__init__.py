"""Weights as the kernels see them: matrices whose rows may lie in several places, dense today, packed schemes beside them
later.

Owns `Weight`. A checkpoint usually stores q, k and v apart; a Weight stacks them without copying, so a mapped file is used in
place. Refuses to know layers and files. Read `ops/reference.py` for who consumes it, `checkpoint/load.py` for who makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [rows, columns], or a stack of them [experts, rows, columns], whose rows are `parts` one after the other."""

    parts: tuple[Tensor, ...]
    names: tuple[str, ...] = ()
    scheme: str = "dense"

    @property
    def rows(self) -> int:
        """Count the rows of all parts."""
        return sum(part.shape[-2] for part in self.parts)

    @property
    def columns(self) -> int:
        """Count the columns."""
        return self.parts[0].shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Give the stored dtype."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Count the bytes that the parts hold, mapped or resident."""
        return sum(part.nbytes for part in self.parts)

    def part(self, *names: str) -> Weight:
        """Give the rows of the named parts."""
        chosen = tuple(part for name in names for part, own in self._split() if own == name)
        return Weight(chosen, names, self.scheme)

    def _split(self) -> Iterator[tuple[Tensor, str]]:
        yield from zip(self.parts, self.names, strict=True)

    def slice(self, start: int, stop: int) -> Weight:
        """Give rows start to stop - 1 without copying."""
        found, offset = [], 0
        for part in self.parts:
            low, high = max(start - offset, 0), min(stop - offset, part.shape[-2])
            if low < high:
                found.append(part[..., low:high, :])
            offset += part.shape[-2]
        return Weight(tuple(found), (), self.scheme)

    def expert(self, index: int) -> Weight:
        """Give one matrix of a stack."""
        return Weight(tuple(part[index] for part in self.parts), self.names, self.scheme)

    def gather(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy the rows that ids name, as `dtype`: [N, columns]. Only for matrices in one part."""
        (table,) = self.parts
        return table.index_select(0, ids_N).to(dtype)
