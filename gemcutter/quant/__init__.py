"""Weights as the kernels see them: matrices whose rows may lie in several places, dense or packed.

Owns `Weight`. A checkpoint usually stores q, k and v apart, and may pack each by another scheme; a Weight stacks them without
copying, so a mapped file is used in place. Refuses to know layers and files. Read `packed.py` for what a packed part can do,
`ops/reference.py` for who consumes a Weight, `checkpoint/load/load_params.py` for who makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gemcutter.quant.lora import Delta, cut_deltas
from gemcutter.quant.packed import Packed, dtype_name

Part = Tensor | Packed


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [rows, columns], or a stack of them [experts, rows, columns], whose rows are `parts` one after the other."""

    parts: tuple[Part, ...]
    names: tuple[str, ...] = ()
    deltas: tuple[Delta, ...] = ()  # what adapters add at run time, to the rows of a step that ask for it

    @property
    def rows(self) -> int:
        """Count the rows of all parts."""
        return sum(part.shape[-2] for part in self.parts)

    @property
    def columns(self) -> int:
        """Count the columns."""
        return self.parts[0].shape[-1]

    @property
    def stored(self) -> str:
        """Format how all parts are stored: a dtype as torch spells it, a packed scheme, or "mixed"."""
        kinds = {_spell(part) for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def is_dense(self) -> bool:
        """Return whether no part is packed."""
        return all(isinstance(part, Tensor) for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Count the bytes that the parts hold, mapped or resident."""
        return sum(part.nbytes for part in self.parts)

    def part(self, *names: str) -> Weight:
        """Return the rows of the named parts."""
        found = dict(zip(self.names, self.parts, strict=True))
        places = dict(zip(self.names, self.edges(), strict=True))
        deltas, offset = list[Delta](), 0
        for name in names:
            start, stop = places[name]
            deltas += cut_deltas(self.deltas, start, stop, offset)
            offset += stop - start
        return Weight(tuple(found[name] for name in names), names, tuple(deltas))

    def edges(self) -> tuple[tuple[int, int], ...]:
        """Return the first row of every part, and the row after its last."""
        return tuple(pairwise(accumulate((part.shape[-2] for part in self.parts), initial=0)))

    def slice(self, start: int, stop: int) -> Weight:
        """Return rows start to stop - 1 without copying."""
        found, offset = [], 0
        for part in self.parts:
            low, high = max(start - offset, 0), min(stop - offset, part.shape[-2])
            if low < high:
                found.append(_rows(part, low, high))
            offset += part.shape[-2]
        return Weight(tuple(found), deltas=tuple(cut_deltas(self.deltas, start, stop)))

    def span(self, start: int, stop: int) -> Weight:
        """Return columns start to stop - 1 without copying. Raises ValueError where that would cut a packed group in two."""
        cut = (part[..., start:stop] if isinstance(part, Tensor) else part.columns(start, stop) for part in self.parts)
        deltas = (replace(delta, down=delta.down[..., start:stop]) for delta in self.deltas)
        return Weight(tuple(cut), self.names, tuple(deltas))

    def expert(self, index: int) -> Weight:
        """Return one matrix of a stack."""
        chosen = (part[index] if isinstance(part, Tensor) else part.expert(index) for part in self.parts)
        deltas = (replace(delta, down=delta.down[index], up=delta.up[index]) for delta in self.deltas)
        return Weight(tuple(chosen), self.names, tuple(deltas))

    def gather(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy the rows that ids name, as `dtype`: [N, columns]. Only for matrices in one part."""
        (table,) = self.parts
        if isinstance(table, Tensor):
            return table.index_select(0, ids_N.to(table.device)).to(ids_N.device, dtype)
        return table.gather(ids_N.cpu()).dequantize().to(ids_N.device, dtype)

    def take(self, ids_N: Tensor) -> Weight:
        """Copy the rows that ids name, stored as they are. Only for matrices in one part."""
        (table,) = self.parts
        ids_N = ids_N.to(table.device) if isinstance(table, Tensor) else ids_N.cpu()
        return Weight((table.index_select(0, ids_N) if isinstance(table, Tensor) else table.gather(ids_N),))

    def row_chunks(self, elements: int) -> Iterator[Part]:
        """Cut a matrix into views of at most `elements` elements (one row at least), in row order."""
        rows = max(1, elements // self.columns)
        for part in self.parts:
            for start in range(0, part.shape[-2], rows):
                yield _rows(part, start, min(start + rows, part.shape[-2]))


def dequantize(part: Part) -> Tensor:
    """Return the values of a part in float32."""
    return part.float() if isinstance(part, Tensor) else part.dequantize()


def _rows(part: Part, start: int, stop: int) -> Part:
    return part[..., start:stop, :] if isinstance(part, Tensor) else part.rows(start, stop)


def _spell(part: Part) -> str:
    return dtype_name(part.dtype) if isinstance(part, Tensor) else part.scheme
