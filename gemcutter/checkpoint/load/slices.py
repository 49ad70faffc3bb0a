"""What a tensor-parallel rank takes of a stored piece: some rows, columns or experts, as views that nobody has read yet.

Owns the step from a spec's slices to its pieces, whether a checkpoint stores a tensor's parts together or apart, and the number
of columns that quantized groups keep together. Refuses to know ranks. Read `shard.py` for slices, `load_params.py` for who cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.load.row_chunks import Run, unpack
from gemcutter.errors import CheckpointError
from gemcutter.param_spec import ParamSpec
from gemcutter.quant import Part
from gemcutter.quant.lora import Delta, cut_deltas
from gemcutter.quant.packed import DenseStack, Packed, Stack, stack
from gemcutter.shard import Slice

UNITS = (32, 64, 128, 256)  # columns that stay together: as few as a file's groups allow, the CPU kernels' blocks at least


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a stored matrix, or stack of them, that is taken: everything where nothing is said."""

    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    experts: tuple[int, int] | None = None

    def of(self, part: Part, origin: str) -> Part:
        """Return views. Raises CheckpointError, naming the tensor, where a group of packed columns would be cut in two."""
        if self.experts is not None:
            part = _experts(part, *self.experts)
        if self.rows is not None:
            part = part[..., slice(*self.rows), :] if isinstance(part, Tensor) else part.rows(*self.rows)
        if self.columns is None:
            return part
        if isinstance(part, Tensor):
            return part[..., slice(*self.columns)]
        try:
            return part.columns(*self.columns)
        except ValueError as error:
            raise CheckpointError(f"{origin} can't be shared by these ranks: {error}; use fewer ranks") from error

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that is left of a whole one."""
        found = list(whole)
        for axis, taken in ((-3, self.experts), (-2, self.rows), (-1, self.columns)):
            if taken is not None:
                found[axis] = taken[1] - taken[0]
        return tuple(found)

    def runs(self, data: LazyTensor | PackedTensor) -> list[Run]:
        """List the rows that are taken, with all their columns."""
        rows = self.rows or (0, data.shape[-2])
        if len(data.shape) == 2:
            return [Run(data, None, *rows)]
        return [Run(data, expert, *rows) for expert in range(*(self.experts or (0, data.shape[0])))]


WHOLE = Cut()


def cuts_of(spec: ParamSpec, pieces: Sequence[object]) -> list[list[Cut]]:
    """Return what a rank takes of each piece: several cuts where parts that are cut lie in one piece."""
    if not spec.slices:
        return [[WHOLE] for _ in pieces]
    if spec.slices[0].axis != -2:
        return [[_cut(spec.slices[0])] for _ in pieces]
    if len(pieces) == len(spec.slices):
        return [[_cut(each)] for each in spec.slices]
    assert len(pieces) == 1
    offsets = accumulate((each.of for each in spec.slices), initial=0)
    return [[Cut(rows=(at + each.start, at + each.stop)) for at, each in zip(offsets, spec.slices, strict=False)]]


def first_row(spec: ParamSpec, part: str | None) -> int:
    """Return the row of the whole tensor at which a part of it begins, whatever a rank holds."""
    sizes = [piece.of for piece in spec.slices] if spec.slices and spec.slices[0].axis == -2 else [rows for _, rows in spec.parts]
    names = [name for name, _ in spec.parts]
    return 0 if part is None else sum(sizes[: names.index(part)])


def deltas_on_rank(deltas: Sequence[Delta], spec: ParamSpec) -> list[Delta]:
    """Return what a rank's share of changes of a whole tensor is: they are cut as the tensor is."""
    if not spec.slices:
        return list(deltas)
    taken, offset, to, found = spec.slices[0], 0, 0, list[Delta]()
    if taken.axis == -1:
        return [replace(each, down=each.down[..., taken.start : taken.stop].contiguous()) for each in deltas]
    if taken.axis == -3:
        kept = slice(taken.start, taken.stop)
        return [replace(each, down=each.down[kept], up=each.up[kept]) for each in deltas]
    for piece in spec.slices:
        found += cut_deltas(deltas, offset + piece.start, offset + piece.stop, to)
        offset, to = offset + piece.of, to + piece.size
    return found


def column_unit(pieces: Mapping[str, Sequence[StoredTensor]], group: int = 1) -> int:
    """Return how many columns of an MLP's out-projection stay together, so that no group of any layer is cut in two.

    `group` is that of weights that are quantized while they are loaded. Raises CheckpointError where no cut is possible.
    """
    packed = [unpack(data) for data in _out_projections(pieces) if isinstance(data, PackedTensor)]
    for unit in UNITS:
        if unit % group == 0 and all(_allows(part, unit) for part in packed):
            return unit
    raise CheckpointError("the MLP's columns are packed in groups that no tensor-parallel ranks can share; run it on one rank")


def _out_projections(pieces: Mapping[str, Sequence[StoredTensor]]) -> Iterator[LazyTensor | PackedTensor]:
    return (piece.data for name, found in pieces.items() if name.endswith(".mlp.out") for piece in found)


def _allows(part: Packed, unit: int) -> bool:
    """Return whether columns may be cut at every multiple of a unit."""
    columns = part.shape[-1]
    if unit >= columns:
        return True
    try:
        part.columns(0, unit)
    except ValueError:
        return False
    return True


def _cut(taken: Slice) -> Cut:
    return Cut(**{{-3: "experts", -2: "rows", -1: "columns"}[taken.axis]: (taken.start, taken.stop)})


def _experts(part: Part, first: int, last: int) -> Part:
    if isinstance(part, Tensor):
        return part[first:last]
    if isinstance(part, Stack | DenseStack):
        return type(part)(part.items[first:last])  # type: ignore[arg-type]  # each takes the items that it has
    return stack([part.expert(index) for index in range(first, last)])
