"""Repacking natively and at load: equal to the definition byte for byte, and a model's logits stay what they were."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.model.text import Decoder
from gemcutter.param_spec import Access
from gemcutter.quant import Weight, affine, dequantize, native_repack
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.cpu_packing import join, pack_for_cpu
from gemcutter.quant.gguf_blocks import TYPES, Blocks
from gemcutter.quant.packed import Packed
from gemcutter.quant.packing import CpuPacker
from gemcutter.quant.scaled_int import from_packed, from_values
from tests import gguf_files
from tests.formats.matrix import WIDE, model
from tests.topologies import prompt, relative_error, run_alone
from tests.trained import trained
from tests.unit.test_quant_gguf_blocks import random_blocks

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(native.load_library() is None, reason=f"needs the native library: {native.missing()}")


def blocks(name: str, rows: int) -> Blocks:
    kind = TYPES[name]
    return Blocks(random_blocks(name, 160 * 512 // kind.values).view(160, -1), kind).rows(0, rows)


def numbers(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(1)).to(torch.int32)


def affine_of(bits: int, group: int, dtype: torch.dtype, rows: int) -> Packed:
    return affine.quantize(torch.randn(rows, 256, generator=torch.Generator().manual_seed(2)).to(dtype), bits, group)


PARTS: dict[str, Callable[[int], Packed]] = {
    **{name: functools.partial(blocks, name) for name in native_repack.BLOCK_KINDS},
    **{
        f"affine{bits}g{group} {dtype}": functools.partial(affine_of, bits, group, dtype)
        for bits in (4, 8)
        for group, dtype in ((32, torch.float32), (64, torch.bfloat16), (128, torch.float16))
    },
    "packed4g32": lambda rows: from_packed(numbers(rows, 32), torch.rand(rows, 8), 4, 256),
    "packed4, scale of a row": lambda rows: from_packed(numbers(rows, 32), torch.rand(rows, 1).half(), 4, 256),
    "packed8g64": lambda rows: from_packed(numbers(rows, 64), torch.rand(rows, 4).bfloat16(), 8, 256),
    "int8": lambda rows: from_values(numbers(rows, 64).view(torch.int8), torch.rand(rows)),
    "int8, scale of the tensor": lambda rows: from_values(numbers(rows, 64).view(torch.int8), torch.rand(1)),
}


@needs_library
@pytest.mark.parametrize("rows", [1, 16, 37, 160])
@pytest.mark.parametrize("name", PARTS)
def test_the_library_writes_what_the_definition_says(name: str, rows: int) -> None:
    part = PARTS[name](rows)
    for cut in (part, part.columns(0, part.shape[-1] // 2), part.rows(rows // 3, rows)):
        found = pack_for_cpu(cut)
        assert found is not None
        assert torch.equal(found.data, join([cut], cut.shape).data)


@needs_library
def test_the_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def spy(source: native_repack.Source, target: native.Matrix, threads: int) -> bool:
        asked.append(source.kind)
        return native_repack.repack(source, target, threads)

    monkeypatch.setattr("gemcutter.quant.cpu_packing.repack", spy)
    for name, make in PARTS.items():
        asked.clear()
        pack_for_cpu(make(20))
        assert asked, name


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_writes_the_same(threads: int) -> None:
    part = blocks("Q6_K", 150)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = pack_for_cpu(part)
    finally:
        torch.set_num_threads(before)
    assert found is not None
    assert torch.equal(found.data, join([part], part.shape).data)


# ---- whole checkpoints ----

CHECKPOINTS: dict[str, Callable[[], Path]] = {
    "Q4_0": lambda: converted("gguf", "Q4_0"),
    "Q4_K_M": lambda: trained("tiny-e-Q4_K_M.gguf"),
    "mlx4": lambda: converted("mlx", "mlx4"),
    "mlx8": lambda: converted("mlx", "mlx8"),
    "experts in Q8_0": lambda: converted("gguf", "Q8_0", Path(__file__).parents[1] / "goldens" / "tiny-a"),
    **{kind: lambda kind=kind: written(kind) for kind in ("MXFP4", "IQ4_XS", "IQ3_S", "IQ2_XS", "IQ1_M", "TQ1_0")},
    "experts in IQ3_XXS": lambda: written("IQ3_XXS", "26B-A4B"),
}
_scratch = tempfile.TemporaryDirectory(prefix="gemcutter-")


@functools.cache
def converted(to: str, quant: str, source: Path = DEMO_FOLDER) -> Path:
    target = Path(_scratch.name) / (f"{source.name}-{quant}" + (".gguf" if to == "gguf" else ""))
    convert(source, target, to, quant)
    return target


@functools.cache
def written(kind: str, like: str = "E2B") -> Path:
    """Write a small random model whose matrices are all in blocks of one type."""
    small, target = model(like, WIDE), Path(_scratch.name) / f"{like}-{kind}.gguf"
    return gguf_files.save(target, small.plan, small.tensors, gguf_files.every(kind), extra=gguf_files.divisors(small.plan))


def logits(checkpoint: Checkpoint, *, cpu_packed: bool, quant: str | None = None) -> Tensor:
    params = load_params(checkpoint, torch.float32, CPU, quant=quant, packer=CpuPacker() if cpu_packed else None)
    decoder = Decoder(checkpoint.plan, params, torch.float32, kernels="reference")
    return run_alone(decoder, prompt(9), chunk=9).logits


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_packed_checkpoint_gives_the_same_logits(name: str) -> None:
    checkpoint = open_checkpoint(CHECKPOINTS[name]())
    packed, cpu_packed = (load_params(checkpoint, torch.float32, CPU, packer=each) for each in (None, CpuPacker()))
    counts = {True: 0, False: 0}
    for spec in checkpoint.plan.params():
        before, after = packed[spec.name], cpu_packed[spec.name]
        if not isinstance(before, Weight):
            continue
        assert isinstance(after, Weight)
        assert (after.names, after.rows, after.columns) == (before.names, before.rows, before.columns)
        for one, other in zip(before.parts, after.parts, strict=True):
            counts[isinstance(other, CpuPackedWeight)] += not isinstance(one, Tensor)
            assert isinstance(other, CpuPackedWeight) <= (spec.access is not Access.ROWS)
            assert torch.equal(dequantize(one), dequantize(other)), spec.name
    assert counts[True] >= 20
    assert counts[False] <= 1  # the table of per-layer embeddings
    assert torch.equal(logits(checkpoint, cpu_packed=True), logits(checkpoint, cpu_packed=False))


@needs_library
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_native_kernels_read_what_was_packed(name: str) -> None:
    """In float32, few rows and many."""
    checkpoint = open_checkpoint(CHECKPOINTS[name]())
    params = load_params(checkpoint, torch.float32, CPU, packer=CpuPacker())
    found, wanted = (Decoder(checkpoint.plan, params, torch.float32, "cpu", kernels) for kernels in ("auto", "reference"))
    for rows in (3, 40):
        assert relative_error(*(run_alone(each, prompt(rows), chunk=rows).logits for each in (found, wanted))) < 1e-5


@pytest.mark.parametrize("quant", ["q4", "q8"])
def test_what_is_quantized_at_load_is_packed_too(quant: str) -> None:
    checkpoint = open_checkpoint(DEMO_FOLDER)
    params = load_params(checkpoint, torch.float32, CPU, quant=quant, packer=CpuPacker())
    cpu_packed = [
        part
        for param in params.values()
        if isinstance(param, Weight)
        for part in param.parts
        if isinstance(part, CpuPackedWeight)
    ]
    assert len(cpu_packed) > 20
    assert torch.equal(logits(checkpoint, cpu_packed=True, quant=quant), logits(checkpoint, cpu_packed=False, quant=quant))
