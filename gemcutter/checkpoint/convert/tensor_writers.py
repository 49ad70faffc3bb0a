"""How a matrix is stored in a file that is being written: dense, in MLX's three arrays, or in GGUF's blocks.

Owns `Output`: the tensors that one matrix becomes, known before any data is read, and the stream of their bytes. Refuses to know
which matrix it is and where it goes. Read `row_chunks.py` for where the rows come from, `convert.py` for who decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import DTYPES, LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.checkpoint.load.row_chunks import CHUNK_ELEMENTS, Run, dense, dense_dtype, row_chunks, whole
from gemcutter.checkpoint.write.write_safetensors import Spec
from gemcutter.errors import CheckpointError
from gemcutter.quant import Part
from gemcutter.quant.affine import Affine
from gemcutter.quant.gguf_blocks import Blocks
from gemcutter.quant.recipes import AffineScheme, BlockScheme, Scheme

COPY_BYTES = 4 * CHUNK_ELEMENTS
ALIGNMENTS = (8, 4, 2, 1)
PACKING_DEEDS = ("quantized", "requantized", "dequantized")


@dataclass(frozen=True, slots=True)
class Output:
    """The tensors that something becomes, and what was done to it.

    `specs` name the tensors in the order of their bytes, with a dtype in safetensors' spelling or a GGUF block type; `sources`
    are the file's own names of what it was made from.
    """

    specs: tuple[Spec, ...]
    deed: str
    sources: tuple[str, ...]
    chunks: Callable[[], Iterator[memoryview]] = field(repr=False)
    scheme: str = ""

    @property
    def alignment(self) -> int:
        """Return the largest power of two up to 8 that divides the sizes of all tensors, as far as their shapes tell."""
        sizes = [math.prod(shape) * DTYPES[dtype][0] if dtype in DTYPES else 8 for _, dtype, shape in self.specs]
        return next(power for power in ALIGNMENTS if all(size % power == 0 for size in sizes))


def copied(name: str, data: LazyTensor) -> Output:
    """Store a tensor byte for byte."""
    deed = "kept" if name == data.name else "renamed"
    return Output(((name, data.dtype, data.shape),), deed, (data.name,), lambda: _raw(data), data.dtype)


def made(name: str, values: Tensor) -> Output:
    """Store a small tensor that was generated and is in memory."""
    dtype = next(spelling for spelling, (_, torch_name) in DTYPES.items() if getattr(torch, torch_name) == values.dtype)
    return Output(((name, dtype, tuple(values.shape)),), "generated", (), lambda: iter((_bytes(values),)), dtype)


def rearranged(name: str, data: LazyTensor, order: Sequence[int]) -> Output:
    """Store a tensor with its axes in another order."""
    shape = tuple(data.shape[axis] for axis in order)
    chunks = lambda: iter((_bytes(data.torch().permute(tuple(order))),))  # noqa: E731 - read when it is written
    return Output(((name, data.dtype, shape),), "rearranged", (data.name,), chunks, data.dtype)


def arranged(
    name: str, data: LazyTensor | PackedTensor, shape: tuple[int, ...], dtype: str, change: Callable[[Tensor], Tensor]
) -> Output:
    """Store a tensor, read whole, in the layout into which `change` brings its values."""

    def chunks() -> Iterator[memoryview]:
        values = data.torch() if isinstance(data, LazyTensor) else data.build().dequantize()
        yield _bytes(_as_dtype(name, change(values), dtype))

    return Output(((name, dtype, shape),), "rearranged", (data.name,), chunks, dtype)


def stored(
    name: str,
    shape: tuple[int, ...],
    runs: Sequence[Run],
    dtype: str,
    scheme: Scheme | None,
    merged: Callable[[], Iterator[Tensor]] | None = None,
) -> Output:
    """Store rows under a scheme, or dense as `dtype` where `scheme` is None. Rows that are stored so already keep their bytes.

    `merged` makes rows that take the place of the stored ones, in float32: those that an adapter has changed.
    """
    deed = _deed(name, runs, dtype, scheme)
    if merged is not None:
        deed = f"merged and {deed}" if deed in PACKING_DEEDS else "merged"
    return Output(
        _specs(name, shape, dtype, scheme),
        deed,
        tuple(dict.fromkeys(run.data.name for run in runs)),
        lambda: _chunks(name, row_chunks(runs) if merged is None else _rounded(name, merged(), dtype), dtype, scheme),
        dtype if scheme is None else scheme.name,
    )


def zeros(name: str, shape: tuple[int, ...], dtype: str, scheme: Scheme | None) -> Output:
    """Store zeros under a scheme or as `dtype`."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    step = max(1, CHUNK_ELEMENTS // columns)

    def blank() -> Iterator[Tensor]:
        for start in range(0, rows, step):
            yield torch.zeros((min(step, rows - start), columns), dtype=_torch_dtype(dtype))

    specs = _specs(name, shape, dtype, scheme)
    return Output(specs, "restored", (), lambda: _chunks(name, blank(), dtype, scheme), dtype if scheme is None else scheme.name)


def _specs(name: str, shape: tuple[int, ...], dtype: str, scheme: Scheme | None) -> tuple[Spec, ...]:
    if not isinstance(scheme, AffineScheme):
        return ((name, dtype if scheme is None else scheme.name, shape),)
    module, words, groups = name.removesuffix(".weight"), shape[-1] * scheme.bits // 32, shape[-1] // scheme.group
    return (
        (f"{module}.weight", "U32", (*shape[:-1], words)),
        (f"{module}.scales", dtype, (*shape[:-1], groups)),
        (f"{module}.biases", dtype, (*shape[:-1], groups)),
    )


def _deed(name: str, runs: Sequence[Run], dtype: str, scheme: Scheme | None) -> str:
    """Return a word for what happens to the rows."""
    sources = list({id(run.data): run.data for run in runs}.values())
    if not all(_is_stored_so(data, dtype, scheme) for data in sources):
        was_packed = any(dense_dtype(data) is None for data in sources)
        if scheme is None:
            return "dequantized" if was_packed else "cast"
        return "requantized" if was_packed else "quantized"
    first = sources[0]
    rows = [(run.expert, run.start, run.stop) for run in runs]
    if len(sources) > 1 or rows != [(run.expert, run.start, run.stop) for run in whole(first)]:
        return "rearranged"
    return "kept" if first.name == name else "renamed"


def _is_stored_so(data: LazyTensor | PackedTensor, dtype: str, scheme: Scheme | None) -> bool:
    """Return whether rows of `data` need not change to be stored under the scheme."""
    if scheme is None:
        return dense_dtype(data) == dtype
    if isinstance(data, LazyTensor) or data.dtype != scheme.name:
        return False
    return not isinstance(scheme, AffineScheme) or {array.dtype for array in data.stored[1:]} == {dtype}


# ---- bytes ----


def _raw(data: LazyTensor) -> Iterator[memoryview]:
    content = data.raw()
    for start in range(0, data.nbytes, COPY_BYTES):
        yield content[start : start + COPY_BYTES].numpy().data
        data.release()


def _chunks(name: str, rows: Iterator[Part], dtype: str, scheme: Scheme | None) -> Iterator[memoryview]:
    try:
        if scheme is None:
            yield from (_bytes(_as_dtype(name, part, dtype)) for part in rows)
        elif isinstance(scheme, AffineScheme):
            yield from _affine(name, rows, dtype, scheme)
        else:
            yield from (_bytes(_blocks(part, scheme)) for part in rows)
    except ValueError as error:
        raise CheckpointError(f"{name} can't be quantized: {error}; is the source damaged?") from error


def _rounded(name: str, rows: Iterator[Tensor], dtype: str) -> Iterator[Part]:
    """Round merged rows as a merged checkpoint would hold them, so that quantizing in one go or in two gives the same."""
    for each in rows:
        yield _as_dtype(name, each, dtype)


def _affine(name: str, rows: Iterator[Part], dtype: str, scheme: AffineScheme) -> Iterator[memoryview]:
    """Yield the codes as they are made, then the scales and the biases, which are a sixteenth of the values or so."""
    scales, biases = list[Tensor](), list[Tensor]()
    for part in rows:
        if isinstance(part, Affine) and part.scheme == scheme.name and part.scales.dtype == _torch_dtype(dtype):
            packed = part
        else:
            packed = scheme.quantize(_as_dtype(name, part, dtype))
        scales.append(packed.scales.clone())  # they may be views of pages that are given back
        biases.append(packed.biases.clone())
        yield _bytes(packed.codes)
    yield from map(_bytes, scales)
    yield from map(_bytes, biases)


def _blocks(part: Part, scheme: BlockScheme) -> Tensor:
    if isinstance(part, Blocks) and part.scheme == scheme.name:
        return part.data
    return scheme.quantize(dense(part)).data


def _as_dtype(name: str, part: Part, dtype: str) -> Tensor:
    """Return the values of some rows as a dtype. Raises CheckpointError for a value that float16 has no place for."""
    values, wanted = dense(part), _torch_dtype(dtype)
    cast = values.to(wanted)
    if wanted == torch.float16 and values.dtype != wanted and not (cast.isfinite() | ~values.isfinite()).all():
        raise CheckpointError(f"{name}: a value of {values.abs().max():.3g} exceeds float16's range; use bf16")
    return cast


def _bytes(tensor: Tensor) -> memoryview:
    flat: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return flat


def _torch_dtype(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, DTYPES[dtype][1])
    return found
