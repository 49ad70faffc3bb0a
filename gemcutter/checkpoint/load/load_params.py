"""Fills a plan's parameters from matched pieces.

Owns the policy of memory: on the CPU a tensor that is stored no wider than it is computed stays mapped, in place and unfused;
anything else is copied, repacked or quantized once, some rows at a time, and its mapped pages are given back at once.
Rows-only tables (the per-layer embeddings) always stay mapped. Knows no format. Read `match.py` for what comes in,
`quant/__init__.py` for what goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.checkpoint.load.packed_weight_cache import PackedWeightCache
from gemcutter.checkpoint.load.row_chunks import dense, row_chunks, unpack, whole
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.plan import Access, ParamSpec
from gemcutter.quant import Part, Weight
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.cpu_packing import join, pack_for_cpu
from gemcutter.quant.gpu_packing import adjoin, pack_for_gpu, place
from gemcutter.quant.packed import DenseStack, Packed
from gemcutter.quant.recipes import LOADABLE, RECIPES, Recipe, Scheme, pack

Progress = Callable[[int, int], None]  # bytes done, bytes in all

COPY_BYTES = 16 << 20  # mapped bytes converted between two releases of their pages


def load_params(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    quant: str | None = None,
    cpu_packed: bool = False,
    cache: PackedWeightCache | None = None,
    gpu_packed: bool = False,
) -> dict[str, Weight | Tensor]:
    """Return every parameter of the plan: matrices as Weights, vectors as float32 tensors.

    `quant`, "q4" or "q8", quantizes dense matrices, but for rows-only tables, which cost no memory as they are. `cpu_packed`
    repacks packed matrices for the native kernels, but for rows-only tables; those that `cache` keeps are mapped instead, and if
    it keeps none they are kept there. `gpu_packed` repacks them for Triton's kernels instead, on `device`, and lays the parts of
    a weight side by side. Raises CheckpointError, and ConfigError for another `quant`.
    """
    if quant is not None and quant not in LOADABLE:
        raise ConfigError(f"quant: expected {' or '.join(LOADABLE)}, found {quant!r}")
    recipe = None if quant is None else RECIPES[quant]
    pieces = checkpoint.matched.pieces
    total = sum(piece.data.nbytes for found in pieces.values() for piece in found)
    done, params = 0, dict[str, Weight | Tensor]()
    packed_weights = PackedWeights({} if cache is None else cache.read()) if cpu_packed else None
    for spec in checkpoint.plan.params():
        params[spec.name] = param = _load(spec, pieces[spec.name], dtype, device, recipe, packed_weights, gpu_packed)
        if isinstance(param, Tensor) and spec.name.endswith("norm"):
            params[spec.name] = (param + checkpoint.config.norm_offset) * spec.scale
        done += sum(piece.data.nbytes for piece in pieces[spec.name])
        if progress is not None:
            progress(done, total)
    if packed_weights is not None and packed_weights.made and cache is not None:
        cache.write({**packed_weights.kept, **packed_weights.made})
    return params


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Weights that are repacked, by name: those that an earlier load has kept, and those that this one makes."""

    kept: Mapping[str, CpuPackedWeight]
    made: dict[str, CpuPackedWeight] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Packed]) -> Packed:
        """Return a kept weight, or make it; what can't be packed is given as it was made."""
        if name in self.kept:
            return self.kept[name]
        part = make()
        if isinstance(part, CpuPackedWeight):
            self.made[name] = part
        return part


def _load(
    spec: ParamSpec,
    pieces: tuple[StoredTensor, ...],
    dtype: torch.dtype,
    device: torch.device,
    recipe: Recipe | None = None,
    packed_weights: PackedWeights | None = None,
    gpu_packed: bool = False,
) -> Weight | Tensor:
    if not pieces:
        assert spec.default is not None
        return torch.full(spec.shape, spec.default)
    data = [piece.data for piece in pieces]
    if len(spec.shape) == 1:
        assert isinstance(data[0], LazyTensor)
        return data[0].torch().to(device, torch.long if spec.integer else torch.float32, copy=True)
    if spec.access is Access.ROWS:
        return _table(data[0])
    # Kernels are chosen by how all parts of a weight are stored: dense ones of several dtypes become one.
    is_uniform = len({stored.dtype for stored in data if isinstance(stored, LazyTensor)}) < 2
    scheme = None if recipe is None else recipe.scheme(spec.name, spec.shape[-1])
    parts: tuple[Part, ...] = tuple(
        _part(f"{spec.name}/{index}", stored, dtype, device, is_uniform, scheme, packed_weights)
        for index, stored in enumerate(data)
    )
    if gpu_packed:
        parts = adjoin([_pack_for_gpu(part, stored, dtype, device) for part, stored in zip(parts, data, strict=True)])
    weight = Weight(parts, tuple(name for name, _ in spec.parts) if len(parts) > 1 else ())
    if len(parts) == 1 and spec.parts:  # stored as one: cut into its parts, so that all matrices of a kind look alike
        edges = list(accumulate((rows for _, rows in spec.parts), initial=0))
        cut = (weight.slice(*edge).parts[0] for edge in pairwise(edges))
        weight = Weight(tuple(cut), tuple(name for name, _ in spec.parts))
    return weight


def _table(data: LazyTensor | PackedTensor) -> Weight:
    """Map a table that is only gathered from, and tell the kernel that reads will be scattered."""
    table = Weight((data.torch() if isinstance(data, LazyTensor) else unpack(data),))
    for tensor in (data,) if isinstance(data, LazyTensor) else data.stored:  # mapped by now, as the advice needs
        tensor.mapped.expect_scattered_reads(tensor.offset, tensor.nbytes)
    return table


def _part(
    name: str,
    data: LazyTensor | PackedTensor,
    dtype: torch.dtype,
    device: torch.device,
    is_uniform: bool,
    scheme: Scheme | None,
    packed_weights: PackedWeights | None,
) -> Part:
    if isinstance(data, PackedTensor):
        return unpack(data) if packed_weights is None else packed_weights.get(name, partial(_pack_for_cpu, data))
    if scheme is not None:
        return (
            _quantize(data, scheme, device)
            if packed_weights is None
            else packed_weights.get(name, partial(_quantize_for_cpu, data, scheme))
        )
    stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[data.dtype]
    stays = is_uniform and device.type == "cpu" and stored.itemsize <= dtype.itemsize
    return data.torch() if stays else _copy(data, dtype, device)


def _pack_for_cpu(data: PackedTensor) -> Packed:
    """Repack a mapped matrix for the native kernels, giving its pages back on the way; what has no such form stays mapped."""
    packed = unpack(data)
    return pack_for_cpu(packed, data.release) or packed


def _pack_for_gpu(part: Part, data: LazyTensor | PackedTensor, dtype: torch.dtype, device: torch.device) -> Part:
    """Repack a matrix for Triton's kernels, giving its pages back on the way; what has no such form moves to the device."""
    if isinstance(part, Tensor):
        return part
    if isinstance(part, DenseStack):
        return torch.stack([item.to(device, dtype) for item in part.items])
    return pack_for_gpu(part, device, data.release) or place(part, device)


def _quantize(data: LazyTensor, scheme: Scheme, device: torch.device) -> Packed:
    """Quantize a mapped tensor into memory of its own. Raises CheckpointError for values that are not finite."""
    with _refusing(data):
        return pack((dense(part) for part in row_chunks(whole(data))), data.shape, scheme, device)


def _quantize_for_cpu(data: LazyTensor, scheme: Scheme) -> Packed:
    """Quantize a mapped tensor and pack it for the native kernels. Raises CheckpointError for values that are not finite."""
    with _refusing(data):
        return join((scheme.quantize(dense(part)) for part in row_chunks(whole(data))), data.shape)


@contextmanager
def _refusing(data: LazyTensor) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{data.origin} can't be quantized: {error}; is the file damaged?") from error


def _copy(data: LazyTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Convert a mapped tensor into memory of its own, giving its pages back on the way."""
    mapped = data.torch()
    out = torch.empty(mapped.shape, dtype=dtype, device=device)
    flat, target = mapped.flatten(), out.flatten()
    elements = COPY_BYTES // mapped.element_size()
    for start in range(0, flat.numel(), elements):
        target[start : start + elements] = flat[start : start + elements]
        offset, count = start * mapped.element_size(), min(elements, flat.numel() - start) * mapped.element_size()
        data.mapped.release(data.offset + offset, count)
    return out
