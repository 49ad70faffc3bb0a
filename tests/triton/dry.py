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
from gemcutter.cache.pool import PagedPool
from gemcutter.cache.table import Table
from gemcutter.engine.graphs import Graphs, Slate
from gemcutter.engine.memory import compact_weights, page_counts
from gemcutter.engine.request import Request
from gemcutter.engine.request import Sequence as Running
from gemcutter.engine.sampling import Sampling
from gemcutter.engine.scheduler import Work
from gemcutter.model.text import Decoder
from gemcutter.ops import bind, triton_attention, triton_sentences

META = torch.device("meta")
H100 = triton_attention.Machine(132, 232_448)
CONTEXT, MOST_SEQUENCES = 8192, 32
DRAWN = Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=1)

Launch = Callable[[Any, tuple[int, ...], Sequence[Any], dict[str, Any]], None]  # kernel, grid, arguments, constants


@contextmanager
def pretend(launch: Launch) -> Iterator[None]:
    """Take the device that is not there for an H100, and call `launch` for each kernel that would be launched."""

    def accept(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: launch(kernel, grid, arguments, constants)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(KernelInterface, "__getitem__", accept)
        patch.setattr(bind, "triton_refusal", lambda device, kernels: None)
        patch.setattr(bind, "native_refusal", lambda device, kernels: "not here")
        patch.setattr(triton_attention, "machine_of", lambda device: H100)
        patch.setattr(triton_sentences, "closing_scale", lambda *_: 0.5)
        yield


@cache
def params_of(preset: str, quant: str) -> dict[str, Any]:
    """Make a model's parameters once."""
    return synthetic.make_params(synthetic.plan_of(preset), quant, cpu_packed=False, device=META)


def setting(preset: str, quant: str) -> tuple[Decoder, PagedPool]:
    """Build a decoder in bfloat16 and a pool for it."""
    decoder = Decoder(synthetic.plan_of(preset), params_of(preset, quant), torch.bfloat16, META)
    assert decoder.providers == {"triton"}
    counts = page_counts(decoder.plan, CONTEXT, 4096, MOST_SEQUENCES)
    return decoder, PagedPool(decoder.plan, counts, decoder.dtype, META, compact_weights(decoder))


def works_of(pool: PagedPool, depths: Sequence[int], rows: int, sampling: Sampling = DRAWN) -> list[Work]:
    """Reserve the next rows of sequences whose earlier ones have been computed."""
    works = []
    for number, depth in enumerate(depths):
        sequence, table = Running(number, Request((2,) * (depth + rows), sampling)), Table(pool)
        table.reserve(depth)
        table.commit(depth)
        table.reserve(rows)
        sequence.table = table
        works.append(Work(sequence, table, rows))
    return works


def static_step(decoder: Decoder, pool: PagedPool, sequences: int, each: int) -> Slate:
    """Fill the static step of some sequences at different depths."""
    slate = Graphs(decoder, pool, CONTEXT)._slate(sequences, each)
    works = works_of(pool, [100 + 300 * number % (CONTEXT // 2) for number in range(sequences)], each)
    slate.fill(works, slate.next_staging())
    for work in works:
        work.table.release()
    return slate
