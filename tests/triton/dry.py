"""A GPU that is not there: models of full size on tensors without memory, whose kernels are noted instead of run.

Owns the stand-in (`pretend`), and the decoders and works that are put on it; refuses to judge. Read `test_dry_run.py` for what is
held against the plan, `compile_all.py` for what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

from gemcutter.benchmark import synthetic
from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.cuda_graphs import CapturedSteps, GraphBuffers
from gemcutter.engine.memory import compact_weights, page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.model.text import Decoder
from gemcutter.ops.registry import CPU, TRITON
from gemcutter.ops.triton import attention, layer_ops
from gemcutter.quant.packing import GpuPacker

META = torch.device("meta")
H100 = attention.Machine(132, 232_448)
CONTEXT, MOST_SEQUENCES = 8192, 32
DRAWN = SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=1)

Launch = Callable[[Any, tuple[int, ...], Sequence[Any], dict[str, Any]], None]  # kernel, grid, arguments, constants


@contextmanager
def pretend(launch: Launch) -> Iterator[None]:
    """Take the device that is not there for an H100, and call `launch` for each kernel that would be launched."""

    def accept(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: launch(kernel, grid, arguments, constants)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(KernelInterface, "__getitem__", accept)
        patch.setattr(TRITON, "refusal", lambda device, kernels: None)
        patch.setattr(CPU, "refusal", lambda device, kernels: "not here")
        patch.setattr(attention, "machine_of", lambda device: H100)
        patch.setattr(layer_ops, "closing_scale", lambda *_: 0.5)
        yield


@cache
def params_of(preset: str, quant: str) -> dict[str, Any]:
    """Make a model's parameters once."""
    return synthetic.make_params(synthetic.plan_of(preset), quant, GpuPacker(META, torch.bfloat16), META)


def setting(preset: str, quant: str) -> tuple[Decoder, PagedKVCache]:
    """Build a decoder in bfloat16 and a pool for it."""
    decoder = Decoder(synthetic.plan_of(preset), params_of(preset, quant), torch.bfloat16, META)
    assert decoder.kernel_names == {"triton"}
    counts = page_counts(decoder.plan, CONTEXT, 4096, MOST_SEQUENCES)
    return decoder, PagedKVCache(decoder.plan, counts, decoder.dtype, META, compact_weights(decoder))


def works_of(pool: PagedKVCache, depths: Sequence[int], rows: int, sampling: SamplingParams = DRAWN) -> list[ScheduledChunk]:
    """Reserve the next rows of sequences whose earlier ones have been computed."""
    works = []
    for number, depth in enumerate(depths):
        sequence, table = SequenceState(number, Request((2,) * (depth + rows), sampling)), BlockTable(pool)
        table.reserve(depth)
        table.commit(depth)
        table.reserve(rows)
        sequence.table = table
        works.append(ScheduledChunk.of(sequence, table, rows))
    return works


def static_step(decoder: Decoder, pool: PagedKVCache, sequences: int, each: int) -> GraphBuffers:
    """Fill the static step of some sequences at different depths."""
    buffers = CapturedSteps(decoder, pool, CONTEXT).buffers(sequences, each)
    works = works_of(pool, [100 + 300 * number % (CONTEXT // 2) for number in range(sequences)], each)
    buffers.send(buffers.write(works, buffers.next_pinned()))
    for work in works:
        work.table.release()
    return buffers
