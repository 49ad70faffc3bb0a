"""What tensor-parallel ranks load: slices of the very values that one process loads, whatever the format, and no byte more."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.load.slices import Cut, column_unit, cuts_of
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import SIZES, write_checkpoint
from gemcutter.ops.registry import select_backend
from gemcutter.ops.types import Param
from gemcutter.param_spec import Access, ParamSpec
from gemcutter.quant import Weight, dequantize
from gemcutter.quant.packing import Packer, PlainPacker
from tests.trained import GOLDENS, trained

CPU = torch.device("cpu")
MODELS = ["tiny-e", "tiny-a", "tiny-e-mlx-4bit", "tiny-a-mlx-4bit", "tiny-e-Q4_0.gguf", "tiny-a-Q4_0.gguf", "tiny-e-Q8_0.gguf"]


@functools.cache
def opened(name: str) -> Checkpoint:
    """Open a model's headers once."""
    folders: dict[str, Path] = {"tiny-e": DEMO_FOLDER, "tiny-a": GOLDENS / "tiny-a"}
    return open_checkpoint(folders.get(name) or trained(name))


def on_rank(checkpoint: Checkpoint, rank: int, world: int) -> Checkpoint:
    """Give a rank its plan, by which the table of per-layer embeddings is shared, too."""
    unit = column_unit(checkpoint.matched.pieces)
    return replace(checkpoint, plan=checkpoint.plan.shard(rank, world, unit, cuts_ple=True))


def values(param: Param) -> Tensor:
    """Return a parameter's values in float32, whole."""
    if isinstance(param, Tensor):
        return param
    return torch.cat([dequantize(part) for part in param.parts], dim=-2)


def sliced(spec: ParamSpec, whole: Tensor) -> Tensor:
    """Return what a rank's spec says that it holds of a whole tensor."""
    if not spec.slices:
        return whole
    axis, offset, found = spec.slices[0].axis, 0, []
    for piece in spec.slices:
        found.append(whole.narrow(axis, offset + piece.start, piece.size))
        offset += piece.of
    return torch.cat(found, dim=axis)


def check(checkpoint: Checkpoint, world: int, dtype: torch.dtype, packer: Packer | None, quant: str | None = None) -> None:
    whole = load_params(checkpoint, dtype, CPU, quant=quant, packer=packer)
    for rank in range(world):
        mine = on_rank(checkpoint, rank, world)
        params = load_params(mine, dtype, CPU, quant=quant, packer=packer)
        for spec in mine.plan.params():
            found, wanted = params[spec.name], whole[spec.name]
            assert torch.equal(values(found), sliced(spec, values(wanted))), spec.name
            assert tuple(values(found).shape) == spec.shape
            if isinstance(found, Weight) and spec.parts and len(found.parts) > 1:
                assert [(name, part.shape[-2]) for name, part in zip(found.names, found.parts, strict=True)] == list(spec.parts)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_hold_slices_of_the_same_values(name: str, kernels: str) -> None:
    dtype = torch.bfloat16
    packer = select_backend("cpu", kernels).packer(CPU, dtype)
    check(opened(name), 2, dtype, packer)


@pytest.mark.parametrize("quant", ["q4", "q8"])
def test_weights_are_quantized_in_slices_as_they_are_whole(quant: str) -> None:
    for name in ("tiny-e", "tiny-a"):
        check(opened(name), 2, torch.float32, PlainPacker(), quant)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_in_two_ranks(size: str, tmp_path: Path) -> None:
    write_checkpoint(size, tmp_path / "model")
    check(open_checkpoint(tmp_path / "model"), 2, torch.float32, None)


def taken_bytes(data: LazyTensor | PackedTensor, cuts: Sequence[Cut]) -> int:
    """Return how many of a piece's stored bytes some cuts take, each element's share of them."""
    return data.nbytes * sum(math.prod(cut.shape(data.shape)) for cut in cuts) // math.prod(data.shape)


@pytest.mark.parametrize("name", MODELS)
def test_ranks_together_take_every_byte_once(name: str) -> None:
    """But for what every rank holds: vectors, small matrices, and tables that are gathered from in the file."""
    checkpoint = opened(name)
    pieces = checkpoint.matched.pieces
    taken: dict[str, int] = {}
    for rank in range(2):
        for spec in on_rank(checkpoint, rank, 2).plan.params():
            if spec.slices:
                own = pieces[spec.name]
                nbytes = sum(taken_bytes(piece.data, cut) for piece, cut in zip(own, cuts_of(spec, own), strict=True))
                taken[spec.name] = taken.get(spec.name, 0) + nbytes
    for spec in on_rank(checkpoint, 0, 2).plan.params():
        stored = sum(piece.data.nbytes for piece in pieces[spec.name])
        shared = [each.size * 2 != each.of and each.size == each.of for each in spec.slices]  # a key head that both hold
        if spec.slices and not any(shared):
            assert taken[spec.name] == stored, spec.name
        elif not spec.slices and spec.access is Access.DENSE:
            assert stored < 1 << 20 or spec.name.startswith(("embed", "ple", "layers"))
