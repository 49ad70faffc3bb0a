"""Whole decoders on Triton: small ones against the reference, the trained ones against what transformers said of them, and the
proof that no layer launches what its place in the model does not need.

Owns no single kernel: the other files here do. Read `gemcutter/ops/triton/layer_ops.py` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.jit import KernelInterface

from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.model.text import Decoder
from gemcutter.ops.triton import elementwise, fused_norm, moe
from gemcutter.ops.triton import linear as linear_kernels
from gemcutter.plan import Proj
from gemcutter.quant import Weight
from tests.trained import GOLDENS, golden
from tests.triton.decoders import Trace, decode_with, plan_of, prompt, run

F32, BF16 = torch.float32, torch.bfloat16
TALL = 1024  # matrix rows of one program under the interpreter
TOLERANCES = {F32: 1e-5, BF16: 0.06}  # largest difference over largest value: order of sums, and roundings between kernels
FOLDERS = {"tiny-e": DEMO_FOLDER, "tiny-a": GOLDENS / "tiny-a"}


@pytest.fixture(autouse=True)
def _tall_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs of products take many matrix rows: the interpreter takes as long for them as for one."""
    choose = linear_kernels.choose_tile

    def choose_tall(rows: int, features: int, *rest: Any) -> linear_kernels.Tile:
        return replace(choose(rows, features, *rest), features=min(TALL, triton.next_power_of_2(features)))

    if device.type == "cpu":
        for file in (linear_kernels, moe):
            monkeypatch.setattr(file, "choose_tile", choose_tall)


def mismatches(found: Trace, wanted: Trace, tolerance: float) -> dict[str, float]:
    """List where two traces differ; the first layer listed is where it began."""
    pairs = {f"layer {index}": pair for index, pair in enumerate(zip(found.layers, wanted.layers, strict=True))}
    pairs |= {"states": (found.states, wanted.states), "logits": (found.logits, wanted.logits)}
    errors = {place: relative_error(*pair) for place, pair in pairs.items()}
    return {place: error for place, error in errors.items() if not error <= tolerance}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the largest value; NaN wherever there is one."""
    assert found.shape == wanted.shape
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()) if wanted.numel() else 0.0


@cache
def reference(name: str, device: torch.device, dtype: torch.dtype, keep_all: bool) -> Trace:
    """Run the definitions once."""
    return run(decode_with("reference", name, device, dtype), *JOB, keep_all=keep_all)


JOB = ((prompt(11), prompt(3, seed=1)), (9,))  # beyond the window; many rows and few in one step, then single ones


def test_a_small_decoder_with_readers(device: torch.device) -> None:
    """Only the last rows of prompts pass the last writer."""
    found = run(decode_with("triton", "readers", device), *JOB, keep_all=False)
    assert not mismatches(found, reference("readers", device, F32, False), TOLERANCES[F32])


def test_a_small_decoder_with_experts_sentence_by_sentence(device: torch.device) -> None:
    found = run(decode_with("triton", "experts", device, by_line=True), *JOB)
    assert not mismatches(found, reference("experts", device, F32, True), TOLERANCES[F32])


def test_a_small_decoder_that_stores_compactly(device: torch.device) -> None:
    assert [layer.can_compact for layer in plan_of("experts").layers] == [False, True]
    found = run(decode_with("triton", "experts", device), *JOB, is_compact=True)
    assert not mismatches(found, reference("experts", device, F32, True), TOLERANCES[F32])


def test_a_small_decoder_whose_values_are_not_normed(device: torch.device) -> None:
    found = run(decode_with("triton", "Gemma 3", device), *JOB)
    assert not mismatches(found, reference("Gemma 3", device, F32, True), TOLERANCES[F32])


def test_a_small_decoder_in_bfloat16(device: torch.device) -> None:
    """Not the one with experts, among which a router may choose otherwise then."""
    found = run(decode_with("triton", "Gemma 3", device, BF16), *JOB)
    assert not mismatches(found, reference("Gemma 3", device, BF16, True), TOLERANCES[BF16])


# ---- trained decoders ----


@cache
def opened(folder: Path) -> Checkpoint:
    """Open a checkpoint once."""
    return open_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_tokens_and_logits(name: str, device: torch.device) -> None:
    """A prompt of more than two windows, and its reply. The first chunk is left to the definitions, which the interpreter's
    patience asks for; the pool that they filled is read on.
    """
    said, checkpoint = golden(name)["prompts"][7], opened(FOLDERS[name])
    first, then = (
        Decoder(checkpoint.plan, load_params(checkpoint, F32, device), F32, device, kernels)
        for kernels in ("reference", "triton")
    )
    engine = Engine(first, 256, max_batched_tokens=len(said["token_ids"]) - 3)
    engine.submit(Request(tuple(said["token_ids"]), max_tokens=2, top_logits=10))
    assert engine.step() == []
    engine.decoder, events = then, []
    while engine.has_work:
        events += engine.step()
    assert [event.token for event in events] == said["greedy_ids"][:2]
    assert events[0].prompt is not None
    ids, values = zip(*events[0].prompt.top_logits, strict=True)
    assert list(ids) == said["top10_ids"]
    assert list(values) == pytest.approx(said["top10_logits"], rel=1e-4)


# ---- nothing is launched in vain ----


@dataclass
class Ledger:
    """What a step launched: kernels of rows by name with their constants and arguments, and products by the names and
    rows of their matrices.
    """

    kernels: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = field(default_factory=list)
    products: list[tuple[tuple[str, ...], int, int]] = field(default_factory=list)  # part names, matrix rows, rows

    def clear(self) -> None:
        """Forget all."""
        self.kernels.clear()
        self.products.clear()


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """Note every launch and product."""
    found, launch, linear = Ledger(), KernelInterface.__getitem__, linear_kernels.linear
    files = vars(fused_norm) | vars(elementwise)
    own = {value: name for name, value in files.items() if isinstance(value, KernelInterface)}

    def note_kernel(kernel: Any, grid: Any) -> Any:
        def call(*arguments: Any, **constants: Any) -> Any:
            if kernel in own:
                found.kernels.append((own[kernel], constants, arguments))
            return launch(kernel, grid)(*arguments, **constants)

        return call

    def note_product(x_ND: Tensor, weight: Weight) -> Tensor:
        found.products.append((weight.names, weight.rows, x_ND.shape[0]))
        return linear(x_ND, weight)

    monkeypatch.setattr(KernelInterface, "__getitem__", note_kernel)
    monkeypatch.setattr(linear_kernels, "linear", note_product)
    return found


MODES = {Proj.QKV: 0, Proj.QK_ONLY: 1, Proj.Q_ONLY: 2}


@pytest.mark.parametrize("name", ["readers", "experts"])
def test_layers_launch_what_they_own_and_nothing_else(name: str, ledger: Ledger, device: torch.device) -> None:
    """Readers project, norm and write no keys or values; a layer whose values are its keys projects no values."""
    plan, seen = plan_of(name), list[tuple[int, list[Any], list[Any]]]()
    decoder = decode_with("triton", name, device)
    forward = decoder.forward

    def observe(step: Any, pool: Any, note: Any) -> Tensor:
        def at_layer(index: int, x_ND: Tensor) -> None:
            seen.append((index, list(ledger.kernels), list(ledger.products)))
            ledger.clear()

        return forward(step, pool, at_layer)

    decoder.forward = observe  # type: ignore[method-assign]
    run(decoder, [prompt(3)], [3])
    assert [index for index, _, _ in seen] == list(range(len(plan.layers)))
    for index, kernels, products in seen:
        layer = plan.layers[index]
        ((constants, arguments),) = [(found, given) for kernel, found, given in kernels if kernel == "_finish_kernel"]
        pools = arguments[4:6]
        assert constants["PROJ"] == MODES[layer.proj]
        assert (constants["HEADS"], constants["KV_HEADS"]) == (layer.heads, layer.kv_heads if layer.writes else 0)
        assert [pool is None for pool in pools] == [not layer.writes] * 2
        parts = layer.attn_parts()
        (projected,) = [rows for names, rows, _ in products if "q" in names]
        assert projected == sum(rows for _, rows in parts)
        assert not [names for names, _, _ in products if {"k", "v"} & set(names) - {part for part, _ in parts}]
        fused = [kernel for kernel, _, _ in kernels if kernel not in ("_embed_kernel", "_ple_kernel")]
        assert fused == expected_kernels(plan.layers[index])
    assert {Proj.Q_ONLY} if name == "readers" else {Proj.QK_ONLY} <= {layer.proj for layer in plan.layers}


def expected_kernels(layer: Any) -> list[str]:
    """List a layer's row kernels: one pass after each product, which gates take along where their matrices lie side by side (here
    gate and up do not); what a layer begins with is normed by the layer before.
    """
    lines = ["_finish_kernel", "_add_norm_kernel"] if layer.index else ["_norm_kernel", "_finish_kernel", "_add_norm_kernel"]
    lines += [] if layer.moe is None else ["_route_kernel"]
    lines += ["_gelu_mul_kernel", "_add_norm_kernel" if layer.moe is None else "_join_norm_kernel"]
    return [*lines, "_add_norm_kernel"] if layer.ple_dim else lines


def test_the_last_writer_makes_queries_of_kept_rows_only(ledger: Ledger, device: torch.device) -> None:
    plan, decoder = plan_of("readers"), decode_with("triton", "readers", device)
    run(decoder, [prompt(5)], [5], keep_all=False)
    cut = plan.first_reader - 1
    finished = [(constants, given) for kernel, constants, given in ledger.kernels if kernel == "_finish_kernel"]
    assert len(finished) == len(plan.layers) + 1  # keys of all rows, then queries of one
    (keys, all_rows), (queries, one_row) = finished[cut], finished[cut + 1]
    assert (keys["HEADS"], keys["KV_HEADS"], all_rows[0].shape[0]) == (0, 1, 5)
    assert (queries["PROJ"], one_row[0].shape[0]) == (MODES[Proj.Q_ONLY], 1)
    inputs = [(names, rows) for names, _, rows in ledger.products if {"q", "k"} & set(names)]
    assert inputs == [(("q", "k", "v"), 5), (("k", "v"), 5), (("q",), 1), (("q",), 1), (("q",), 1)]


def test_a_step_that_keeps_no_row_ends_with_its_keys(ledger: Ledger, device: torch.device) -> None:
    """The middle of a prompt: no query in the last writer, no layer after it."""
    decoder = decode_with("triton", "readers", device)
    run(decoder, [prompt(6)], [5], keep_all=False)
    rows = [given[0].shape[0] for kernel, _, given in ledger.kernels if kernel == "_finish_kernel"]
    assert rows == [5, 5, *[1] * len(decoder.layers)]  # layer 0, the last writer's keys; then the last row, everywhere
