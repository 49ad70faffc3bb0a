"""Fills a plan's parameters from matched pieces.

Owns the policy of memory: on the CPU a tensor that is stored no wider than it is computed stays mapped, in place and unfused;
anything else is copied, repacked or quantized once, tile by tile, and its mapped pages are given back at once. Rows-only tables
(the per-layer embeddings) always stay mapped. Knows no format. Read `match.py` for what comes in, `quant/__init__.py` for what
goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.load.held import stays_mapped
from gemcutter.checkpoint.load.match import Checkpoint, Piece
from gemcutter.checkpoint.load.packed_weight_cache import PackedWeightCache
from gemcutter.checkpoint.load.row_chunks import dense, row_chunks, unpack
from gemcutter.checkpoint.load.slices import WHOLE, Cut, cuts_of
from gemcutter.errors import CheckpointError
from gemcutter.param_spec import Access, ParamKind, ParamSpec
from gemcutter.quant import Part, Weight
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.packed import Packed, dtype_name
from gemcutter.quant.packing import Packer, PlainPacker
from gemcutter.quant.recipes import RECIPES, Recipe, Scheme
from gemcutter.quant_names import find_quant

Progress = Callable[[int, int], None]  # bytes done, bytes in all

COPY_BYTES = 16 << 20  # mapped bytes converted between two releases of their pages


def load_params(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    quant: str | None = None,
    packer: Packer | None = None,
    cache: PackedWeightCache | None = None,
    as_stored: Collection[Piece] = (),
) -> dict[str, Weight | Tensor]:
    """Return every parameter of the plan: matrices as Weights, vectors as float32 tensors; of a rank's plan, its slices.

    `packer` brings packed matrices, but for rows-only tables, into the form that a backend reads; by default they stay as they
    are. Those that `cache` keeps are mapped instead, and if it keeps none they are kept there. `quant`, the name of a recipe,
    quantizes dense matrices, but for rows-only tables, which cost no memory as they are. The pieces `as_stored` are views of
    the file, neither packed nor converted: an adapter is about to change them. Raises CheckpointError, and ConfigError for
    another `quant`.
    """
    recipe = None if quant is None else RECIPES[find_quant(quant, RECIPES)]
    packer = packer or PlainPacker(device)
    pieces = checkpoint.matched.pieces
    total = sum(piece.data.nbytes for found in pieces.values() for piece in found)
    panels = PackedWeights({} if cache is None or not packer.makes_panels else cache.read())
    loader = _Loader(dtype, device, packer, recipe, panels, checkpoint.config.norm_offset, frozenset(as_stored))
    done, params = 0, dict[str, Weight | Tensor]()
    for spec in checkpoint.plan.params():
        params[spec.name] = loader.load(spec, pieces[spec.name])
        done += sum(piece.data.nbytes for piece in pieces[spec.name])
        if progress is not None:
            progress(done, total)
    if panels.made and cache is not None:
        cache.write({**panels.kept, **panels.made})
    return params


def load_tower(
    specs: Iterable[ParamSpec],
    pieces: Mapping[str, tuple[StoredTensor, ...]],
    dtype: torch.dtype,
    device: torch.device,
    packer: Packer | None = None,
    as_stored: Collection[Piece] = (),
) -> dict[str, Weight | Tensor]:
    """Return every parameter of a tower from its matched pieces, as `load_params` does; nothing is quantized."""
    loader = _Loader(dtype, device, packer or PlainPacker(device), None, PackedWeights({}), 0.0, frozenset(as_stored))
    return {spec.name: loader.load(spec, pieces[spec.name]) for spec in specs}


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Weights that are repacked, by name: those that an earlier load has kept, and those that this one makes."""

    kept: Mapping[str, CpuPackedWeight]
    made: dict[str, CpuPackedWeight] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Part]) -> Part:
        """Return a kept weight, or make it; what has no form as panels, or an order, is returned as it was made."""
        if name in self.kept:
            return self.kept[name]
        part = make()
        if isinstance(part, CpuPackedWeight) and part.order is None:
            self.made[name] = part
        return part


@dataclass(frozen=True, slots=True)
class _Loader:
    """How the parameters of one checkpoint are loaded."""

    dtype: torch.dtype
    device: torch.device
    packer: Packer
    recipe: Recipe | None
    panels: PackedWeights
    norm_offset: float
    as_stored: frozenset[Piece] = frozenset()

    def load(self, spec: ParamSpec, pieces: tuple[StoredTensor, ...]) -> Weight | Tensor:
        """Make one parameter of its pieces, as its kind asks."""
        if spec.kind in (ParamKind.MATRIX, ParamKind.EXPERTS):
            return self._matrix(spec, pieces)
        if not pieces:
            assert spec.default is not None
            return torch.full(spec.shape, spec.default)
        (data,) = (piece.data for piece in pieces)
        assert isinstance(data, LazyTensor)
        found = data.torch().to(self.device, torch.long if spec.integer else torch.float32, copy=True)
        return (found + self.norm_offset) * spec.scale if spec.kind is ParamKind.NORM else found

    def _matrix(self, spec: ParamSpec, pieces: tuple[StoredTensor, ...]) -> Weight:
        if spec.access is Access.ROWS:
            (cut,) = cuts_of(spec, pieces)[0]
            return _table(pieces[0].data, cut)
        dense_dtypes = [piece.data.dtype for piece in pieces if isinstance(piece.data, LazyTensor)]
        scheme = None if self.recipe is None else self.recipe.scheme(spec.name, spec.stored_shape[-1])
        waiting = [(spec.name, piece.part) in self.as_stored for piece in pieces]
        cuts = cuts_of(spec, pieces)
        found = list[Part]()
        for index, (piece, waits, own) in enumerate(zip(pieces, waiting, cuts, strict=True)):
            for place, cut in enumerate(own):
                name = f"{spec.name}/{index}" + (f".{place}" if place else "")
                if waits:
                    found.append(cut.of(_view(piece.data), piece.data.origin))
                else:
                    found.append(self._part(name, piece.data, cut, dense_dtypes, scheme))
        parts = tuple(found) if any(waiting) else self.packer.arrange(found)
        weight = Weight(parts, tuple(name for name, _ in spec.parts) if len(parts) > 1 else ())
        if len(parts) == 1 and spec.parts:  # stored as one: cut into its parts, so that all matrices of a kind look alike
            edges = list(accumulate((rows for _, rows in spec.parts), initial=0))
            cut_up = (weight.slice(*edge).parts[0] for edge in pairwise(edges))
            weight = Weight(tuple(cut_up), tuple(name for name, _ in spec.parts))
        return weight

    def _part(self, name: str, data: LazyTensor | PackedTensor, cut: Cut, dense_dtypes: list[str], scheme: Scheme | None) -> Part:
        if isinstance(data, PackedTensor):
            return self.panels.get(name, lambda: self.packer.pack(_packed(cut.of(unpack(data), data.origin)), data.release))
        if scheme is not None:
            return self.panels.get(name, lambda: self._quantize(data, cut, scheme))
        compute = dtype_name(self.dtype)
        if stays_mapped(dense_dtypes, data.dtype, compute, self.device.type):
            return cut.of(data.torch(), data.origin)
        return _copy(data, cut, self.dtype, self.device)

    def _quantize(self, data: LazyTensor, cut: Cut, scheme: Scheme) -> Part:
        """Quantize a mapped tensor. Raises CheckpointError for values that are not finite."""
        columns = slice(*(cut.columns or (None, None)))
        try:
            chunks = (dense(part)[:, columns] for part in row_chunks(cut.runs(data)))
            return self.packer.quantize(chunks, cut.shape(data.shape), scheme)
        except ValueError as error:
            raise CheckpointError(f"{data.origin} can't be quantized: {error}; is the file damaged?") from error


def _packed(part: Part) -> Packed:
    """Return a part of a packed tensor, which cutting leaves packed."""
    assert not isinstance(part, Tensor)
    return part


def _table(data: LazyTensor | PackedTensor, cut: Cut) -> Weight:
    """Map what is taken of a table that is only gathered from, and tell the kernel that reads will be scattered."""
    table = Weight((cut.of(_view(data), data.origin),))
    for tensor in (data,) if isinstance(data, LazyTensor) else data.stored:  # mapped by now, as the advice needs
        tensor.mapped.expect_scattered_reads(tensor.offset, tensor.nbytes)
    return table


def _view(data: LazyTensor | PackedTensor) -> Part:
    return data.torch() if isinstance(data, LazyTensor) else unpack(data)


def _copy(data: LazyTensor, cut: Cut, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Convert what is taken of a mapped tensor into memory of its own, giving its pages back: a whole one's on the way."""
    mapped = cut.of(data.torch(), data.origin)
    assert isinstance(mapped, Tensor)
    if data.arranged is not None or cut != WHOLE:
        found = mapped.to(device, dtype, copy=True).contiguous()
        data.release()
        return found
    out = torch.empty(mapped.shape, dtype=dtype, device=device)
    flat, target = mapped.flatten(), out.flatten()
    elements = COPY_BYTES // mapped.element_size()
    for start in range(0, flat.numel(), elements):
        target[start : start + elements] = flat[start : start + elements]
        offset, count = start * mapped.element_size(), min(elements, flat.numel() - start) * mapped.element_size()
        data.mapped.release(data.offset + offset, count)
    return out
