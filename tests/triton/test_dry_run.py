"""Models of full size on a device that is not there: what a GPU would be asked to do, without doing it.

Tensors have no memory ("meta") and kernels are not run, but every step passes all code of the host. So a wait for the device, an
operation over two devices, a launch that no GPU accepts, or one that a layer does not need shows up here, at the sizes that
matter. Owns no arithmetic: the other files here check that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemcutter.cache.pool import PagedPool
from gemcutter.cache.table import Table
from gemcutter.engine.draw import can_draw
from gemcutter.engine.graphs import Choice, Graphs
from gemcutter.engine.memory import compact_weights, page_counts
from gemcutter.engine.request import Request, Sequence
from gemcutter.engine.sampling import Sampling
from gemcutter.engine.scheduler import Work
from gemcutter.engine.step import build_step
from gemcutter.gauge import presets
from gemcutter.model.text import Decoder
from gemcutter.ops import bind
from gemcutter.plan import LayerPlan, ModelPlan

KernelInterface = pytest.importorskip("triton.runtime.jit").KernelInterface
triton_attention = pytest.importorskip("gemcutter.ops.triton_attention")
triton_sentences = pytest.importorskip("gemcutter.ops.triton_sentences")

META = torch.device("meta")
H100 = triton_attention.Machine(132, 232_448)
CONTEXT, MOST_SEQUENCES = 8192, 32
GRID_LIMITS = ((1 << 31) - 1, 65535, 65535)
FREE = (
    "view",
    "slice",
    "select",
    "split",
    "expand",
    "squeeze",
    "as_strided",
    "unbind",
    "alias",
    "detach",
    "flatten",
    "transpose",
)
FREE += ("empty", "aten.t.", "permute", "chunk")  # allocations and views: nothing is launched
ENDS = 48  # small operations at a step's ends: rotary tables and the choice of tokens
DRAWN = Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=1)


class Watch(TorchDispatchMode):
    """Counts what a stretch of code would launch: kernels by name, the library's operations by theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.library: Counter[str] = Counter()
        self.crossings: Counter[str] = Counter()  # between the host and the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, Tensor)]
        devices, name = {each.device.type for each in tensors}, str(func)
        if len(devices) > 1:
            self.crossings[name] += 1
        elif devices == {"meta"} and not any(word in name for word in FREE):
            self.library[name] += 1
        return found


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Take the device that is not there for an H100, and note launches instead of running them."""
    found = Watch()

    def accept(kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            devices = {each.device.type for each in (*arguments, *constants.values()) if isinstance(each, Tensor)}
            assert devices == {"meta"}, f"{kernel.fn.__name__} gets tensors of {devices}"
            assert all(0 < count <= limit for count, limit in zip(grid, GRID_LIMITS, strict=False)), (kernel.fn.__name__, grid)
            found.kernels[kernel.fn.__name__] += 1

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", accept)
    monkeypatch.setattr(bind, "triton_refusal", lambda device, kernels: None)
    monkeypatch.setattr(triton_attention, "machine_of", lambda device: H100)
    monkeypatch.setattr(triton_sentences, "closing_scale", lambda *_: 1.0)
    monkeypatch.setattr(bind, "native_refusal", lambda device, kernels: "not here")
    with torch.inference_mode():
        yield found


@cache
def params_of(preset: str, quant: str) -> dict[str, Any]:
    """Make a model's parameters once."""
    return presets.make_params(presets.plan_of(preset), quant, tiled=False, device=META)


def setting(preset: str, quant: str) -> tuple[Decoder, PagedPool]:
    """Build a decoder in bfloat16 and a pool for it."""
    decoder = Decoder(presets.plan_of(preset), params_of(preset, quant), torch.bfloat16, META)
    assert decoder.providers == {"triton"}
    counts = page_counts(decoder.plan, CONTEXT, 4096, MOST_SEQUENCES)
    return decoder, PagedPool(decoder.plan, counts, decoder.dtype, META, compact_weights(decoder))


def works_of(pool: PagedPool, depths: list[int], rows: int, sampling: Sampling) -> list[Work]:
    """Reserve the next rows of sequences whose earlier ones have been computed."""
    works = []
    for number, depth in enumerate(depths):
        sequence, table = Sequence(number, Request((2,) * (depth + rows), sampling)), Table(pool)
        table.reserve(depth)
        table.commit(depth)
        table.reserve(rows)
        sequence.table = table
        works.append(Work(sequence, table, rows))
    return works


def expected_of(layer: LayerPlan, rows: int) -> Counter[str]:
    """Count the launches of a layer that decodes: a product for each matrix that it owns, a pass between two, no more."""
    found = Counter({"_finish_kernel": 1, "_attend": 1, "_linear_kernel": 4, "_add_norm_kernel": 2})
    if layer.ple_dim:
        found += Counter({"_linear_kernel": 2, "_add_norm_kernel": 1})
    if layer.moe is not None:
        found += Counter({"_linear_kernel": 1, "_route_kernel": 1, "_join_norm_kernel": 1})
        found["_add_norm_kernel"] -= 1
        found += Counter(
            {"_pair_in_kernel": 1, "_pair_out_kernel": 1} if rows <= 4 else {"_block_kernel": 2, "_sum_kernel": 1}
        ) + Counter({"_sort_kernel": int(rows > 16)})
    return found


def expected(plan: ModelPlan, rows: int) -> Counter[str]:
    """Count the launches of a model that decodes, but for the joining of splits."""
    found = Counter({"_embed_kernel": 1, "_norm_kernel": 2, "_linear_kernel": 1, "_softcap_kernel": 1})
    found += Counter({"_linear_kernel": 1, "_ple_kernel": 1} if plan.ple_dim else {})
    return sum((expected_of(layer, rows) for layer in plan.layers), found)


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets.SIZES)
@pytest.mark.parametrize(("sequences", "each"), [(1, 1), (8, 1), (32, 1), (1, 5)])
def test_decode_steps_of_full_size_are_launches_and_nothing_else(preset: str, sequences: int, each: int, watch: Watch) -> None:
    """Static steps as a graph captures them, tokens drawn on the device."""
    decoder, pool = setting(preset, "bf16")
    slate = Graphs(decoder, pool, CONTEXT)._slate(sequences, each)
    works = works_of(pool, [100 + 300 * number % CONTEXT // 2 for number in range(sequences)], each, DRAWN)
    assert all(can_draw(work.sequence.request, in_prompt=False) for work in works)
    slate.fill(works, slate.next_staging())
    with watch:
        slate.launch(Choice.DRAWN, is_captured=False)
    assert not watch.crossings
    merges = watch.kernels.pop("_merge", 0)
    assert merges <= len(decoder.plan.layers)
    assert watch.kernels == expected(decoder.plan, sequences * each)
    fills = watch.library.pop("aten.full.default", 0)  # of lists of pairs
    assert fills == watch.kernels["_sort_kernel"]
    assert sum(watch.library.values()) <= ENDS, watch.library


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "quant"), [("E4B", "bf16"), ("E2B", "q4_0"), ("26B-A4B", "q4_0"), ("31B", "mlx4")])
def test_prompts_of_full_size_wait_for_nothing(preset: str, quant: str, watch: Watch) -> None:
    """A long chunk beside one short sequence and a single row; all that comes from the host is copied before the first layer."""
    decoder, pool = setting(preset, quant)
    works = [*works_of(pool, [0], 1500, Sampling()), *works_of(pool, [700], 6, Sampling()), *works_of(pool, [90], 1, Sampling())]
    step = build_step(decoder, works)
    assert step.keep is not None
    step.kept()
    with watch:
        logits = decoder.logits(decoder.forward(step, pool))
    assert logits.shape == (3, decoder.plan.vocab)
    assert set(watch.crossings) <= {"aten._to_copy.default", "aten.to.dtype_layout"}
    assert sum(watch.crossings.values()) <= 2 * len(pool.books)  # pages of each group, for all rows and for kept ones
    per_layer = (sum(watch.kernels.values()) + sum(watch.library.values())) / len(decoder.plan.layers)
    assert per_layer <= (24 if quant == "bf16" else 40), (
        watch.kernels,
        watch.library,
    )  # packed matrices are widened tile by tile
