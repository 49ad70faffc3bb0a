"""Models of full size on a device that is not there: what a GPU would be asked to do, without doing it.

Tensors have no memory and kernels are not run, but every step passes all code of the host. So a wait for the device, an operation
over two devices, a launch that no GPU accepts, or one that a layer does not need shows up here, at the sizes that matter. Owns no
arithmetic: the other files here check that. Read `dry.py` for the stand-in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemcutter.benchmark import synthetic
from gemcutter.engine.cuda_graphs import TokenSource
from gemcutter.engine.step import build_step
from gemcutter.plan import LayerPlan, ModelPlan
from tests.triton.dry import pretend, setting, static_step, works_of

GRID_LIMITS = ((1 << 31) - 1, 65535, 65535)
# what launches nothing: views and allocations
FREE = re.compile(
    r"view|slice|select|split|expand|squeeze|strided|unbind|detach|flatten|transpose|aten\.t\.|chunk|empty"
)  # no launch
ENDS = 48  # small operations at a step's ends: rotary tables and the choice of tokens


class Watch(TorchDispatchMode):
    """Counts what a stretch of code would launch: kernels by name, the library's operations by theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.crossings: Counter[str] = Counter()  # between the host and the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, Tensor)]
        devices, name = {each.device.type for each in tensors}, str(func)
        if len(devices) > 1:
            self.crossings[name] += 1
        elif devices == {"meta"} and not FREE.search(name):
            self.operations[name] += 1
        return found

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        """Note a kernel that a GPU would accept."""
        tensors = [each for each in (*arguments, *constants.values()) if isinstance(each, Tensor)]
        assert {each.device.type for each in tensors} == {"meta"}, kernel.fn.__name__
        assert not any(each.storage_offset() * each.itemsize % 16 for each in tensors), (
            f"{kernel.fn.__name__}: compiled once more"
        )
        assert all(0 < count <= limit for count, limit in zip(grid, GRID_LIMITS, strict=False)), (kernel.fn.__name__, grid)
        self.kernels[kernel.fn.__name__] += 1


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Note launches instead of running them."""
    found = Watch()
    with pretend(found.launch):
        yield found


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
    found = Counter({"_embed_kernel": 1, "_norm_kernel": 2, "_linear_kernel": 1})
    found += Counter({"_linear_kernel": 1, "_ple_kernel": 1} if plan.ple_dim else {})
    return sum((expected_of(layer, rows) for layer in plan.layers), found)


@pytest.mark.slow
@pytest.mark.parametrize("preset", synthetic.SIZES)
@pytest.mark.parametrize(("sequences", "each"), [(1, 1), (8, 1), (32, 1), (1, 5)])
def test_decode_steps_of_full_size_are_launches_and_nothing_else(preset: str, sequences: int, each: int, watch: Watch) -> None:
    """Static steps as a graph captures them, tokens drawn on the device."""
    decoder, pool = setting(preset, "bf16")
    buffers = static_step(decoder, pool, sequences, each)
    with watch:
        buffers.launch(TokenSource.SAMPLED, is_captured=False)
    assert not watch.crossings
    merges = watch.kernels.pop("_merge", 0)
    assert merges <= len(decoder.plan.layers)
    assert watch.kernels == expected(decoder.plan, sequences * each)
    fills = watch.operations.pop("aten.full.default", 0)  # of lists of pairs
    assert fills == watch.kernels["_sort_kernel"]
    assert sum(watch.operations.values()) <= ENDS, watch.operations


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "quant"), [("E4B", "bf16"), ("E2B", "q4_0"), ("26B-A4B", "q4_0"), ("31B", "mlx4")])
def test_prompts_of_full_size_wait_for_nothing(preset: str, quant: str, watch: Watch) -> None:
    """A long chunk beside one short sequence and a single row; all that comes from the host is copied before the first layer."""
    decoder, pool = setting(preset, quant)
    works = [*works_of(pool, [0], 1500), *works_of(pool, [700], 6), *works_of(pool, [90], 1)]
    step = build_step(decoder, works)
    assert step.kept is not None
    with watch:
        logits = decoder.logits(decoder.forward(step, pool))
    assert logits.shape == (3, decoder.plan.vocab)
    assert set(watch.crossings) <= {"aten._to_copy.default", "aten.to.dtype_layout"}
    assert sum(watch.crossings.values()) <= 2 * len(pool.allocators)  # pages of each group, for all rows and for kept ones
    per_layer = (sum(watch.kernels.values()) + sum(watch.operations.values())) / len(decoder.plan.layers)
    assert per_layer <= (24 if quant == "bf16" else 40), (
        watch.kernels,
        watch.operations,
    )  # packed matrices are dequantized tile by tile
