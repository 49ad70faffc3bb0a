"""Native layer ops and whole layers against the reference: every kind of layer, ragged batches, dropped rows, threads, levels.

Owns shapes that fill vectors (head dims of 32 and 64); `test_ops.py` holds each op against its formula
on odd shapes, `test_native_packed.py`, `test_native_dense.py` and `test_native_attention.py` the ops beneath. Read
`gemcutter/ops/cpu/layer_ops.py` beside it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gemcutter import api, native
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.engine.engine import Engine
from gemcutter.errors import KernelError
from gemcutter.model.text import Decoder
from gemcutter.ops import reference
from gemcutter.ops.cpu import layer_ops, model_ops
from gemcutter.ops.types import OpContext, Param, Precision
from gemcutter.parity.passage import PASSAGE
from gemcutter.plan import ModelPlan, Proj
from gemcutter.quant import Part, Weight, dequantize
from gemcutter.quant.cpu_packed import CpuPackedWeight, one_order
from gemcutter.quant.cpu_packing import pack_for_cpu
from gemcutter.quant.scaled_int import from_packed, from_values
from tests.parity.batches import Answer, Job, drive
from tests.topologies import SIZES, Trace, mismatches, plan_of, prompt, relative_error, run_alone

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

F32, BF16 = torch.float32, torch.bfloat16
WIDE = {"head_dim": 32, "global_head_dim": 64}
WIDER = ", wide"
# What differs between the plans: sizes of the family, and Gemma 3, whose values are not normed.
PLANS = (*SIZES, "Gemma 3")
TINY_A = Path(__file__).parents[1] / "goldens" / "tiny-a"


@cache
def plan(name: str) -> ModelPlan:
    """Derive a shrunk size whose heads fill whole vectors; "E2B, wide" is one whose rows fill blocks of 32 columns, too."""
    if name.endswith(WIDER):
        return plan_of({**SIZES[name.removesuffix(WIDER)], **WIDE, "hidden_size": 64})
    if name != "Gemma 3":
        return plan_of({**SIZES[name], **WIDE})
    found = plan_of({**SIZES["31B"], **WIDE, "attention_k_eq_v": False, "num_hidden_layers": 6, "layer_types": None})
    return replace(found, layers=tuple(replace(layer, has_v_norm=False) for layer in found.layers))


@cache
def params(name: str, dtype: torch.dtype) -> dict[str, Param]:
    """Draw parameters: vectors around 1, matrices that keep the size of what they multiply."""
    generator, found = torch.Generator().manual_seed(7), dict[str, Param]()
    for spec in plan(name).params():
        if len(spec.shape) == 1:
            # Small query norms make scores of a few units: larger ones would blow up the rounding before them.
            scale = 0.3 if spec.name.endswith("q_norm") else 1.0
            found[spec.name] = (torch.rand(spec.shape, generator=generator) + 0.5) * scale
            continue
        # Per-layer gates stay open, since the norm behind them would blow up the rounding of closed ones.
        size = 0.2 if spec.name.endswith("ple.gate") else 4.0 if spec.name.endswith("router") else 1.0
        whole = (torch.randn(spec.shape, generator=generator) * size * spec.shape[-1] ** -0.5).to(dtype)
        parts = whole.split([rows for _, rows in spec.parts], dim=-2) if spec.parts else (whole,)
        found[spec.name] = Weight(tuple(parts), tuple(part for part, _ in spec.parts))
    return found


def decoder(name: str, stored: torch.dtype = F32, kernels: str = "auto", dtype: torch.dtype = F32) -> Decoder:
    return Decoder(plan(name), params(name, stored), dtype, "cpu", kernels)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with threads(2):
        yield


@cache
def wanted_of(name: str, stored: torch.dtype, length: int) -> Trace:
    """Run a prompt through the reference, whose small tensors one thread computes fastest."""
    with threads(1):
        return run_alone(decoder(name, stored, "reference"), prompt(length), chunk=length)


# ---- the border ----


def test_structs_have_the_same_size_on_both_sides() -> None:
    library = native.load_library()
    assert library is not None
    views = (
        native.Matrix,
        native.DeltaView,
        native.StepView,
        native.KVView,
        native.AttentionView,
        native.ExpertsView,
        native.LayerView,
        native.PleView,
        native.DrafterView,
        native.RanksView,
    )
    library.gc_bytes_of.restype = ctypes.c_int64
    assert [library.gc_bytes_of(which) for which in range(11)] == [*map(ctypes.sizeof, views), 0]


# ---- whole decoders ----


def test_the_plans_hold_every_kind_of_layer() -> None:
    layers = [layer for name in PLANS for layer in plan(name).layers]
    assert {layer.proj for layer in layers} == set(Proj)
    assert {bool(layer.ple_dim) for layer in layers} == {layer.moe is None for layer in layers} == {True, False}
    assert {layer.has_v_norm for layer in layers} == {layer.window is None for layer in layers} == {True, False}


@pytest.mark.parametrize("stored", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", PLANS)
def test_every_layer_equals_the_reference(name: str, stored: torch.dtype) -> None:
    """Each layer's output, the states and the logits; chunks of one row, a few, and more than a window; NaN in unused slots."""
    ids = prompt(90)
    wanted = wanted_of(name, stored, 90)
    fast = decoder(name, stored)
    assert all(layer.fused is not None for layer in fast.layers)
    for rows in (90, 64, 7, 1) if stored == F32 else (64,):
        found = run_alone(fast, ids, rows, page_tokens=16)
        assert mismatches(found, wanted, 1e-4) == {}


@pytest.mark.parametrize("name", PLANS)
def test_sentences_apart_give_the_bits_of_the_whole_layer(name: str) -> None:
    ids, fast = prompt(40), decoder(name)
    whole = run_alone(fast, ids, 33)
    for layer in fast.layers:
        layer.fused = None
    apart = run_alone(fast, ids, 33)
    assert all(mine.equal(theirs) for mine, theirs in zip(apart.layers, whole.layers, strict=True))
    assert apart.logits.equal(whole.logits)


@pytest.mark.parametrize("group", [None, 32], ids=["scale of a row", "scales of blocks"])
@pytest.mark.parametrize("name", ["E2B, wide", "26B-A4B, wide"])
def test_layers_of_8_bit_floats_equal_the_reference(name: str, group: int | None) -> None:
    held = dict(params(name, F32))
    for key, param in held.items():
        if isinstance(param, Weight) and not key.startswith("embed.ple"):
            held[key] = replace(param, parts=tuple(_float8(dequantize(part), group) for part in param.parts))
    fast, plain = (Decoder(plan(name), held, F32, "cpu", kernels) for kernels in ("auto", "reference"))
    assert all(layer.fused is not None for layer in fast.layers)
    assert fast.kernel_names == {"native"}
    with threads(1):
        wanted = run_alone(plain, prompt(40), 40)
    for rows in (40, 9, 1):
        assert mismatches(run_alone(fast, prompt(40), rows), wanted, 1e-4) == {}


@pytest.mark.parametrize("activations", ["float32", "int8", "bf16"])
@pytest.mark.parametrize("alike", [True, False], ids=["sorted alike", "apart"])
def test_layers_of_scattered_groups_equal_the_reference(alike: bool, activations: str) -> None:
    """Rows are taken in the order of the sorted columns; where the parts of a matrix differ in it, each is multiplied alone."""
    held, seeds = dict(params("E2B, wide", F32)), iter(range(99))
    for key, param in held.items():
        if isinstance(param, Weight) and key.startswith("layers.") and param.columns % 32 == 0:
            seed = next(seeds)
            parts = [_scattered(dequantize(part), seed if alike else 1000 * at + seed) for at, part in enumerate(param.parts)]
            held[key] = replace(param, parts=one_order(parts))
    fast = Decoder(plan("E2B, wide"), held, F32, "cpu", activations=activations)
    kinds = {layer.kernels["layer"] for layer in fast.layers}
    assert kinds == ({"native"} if alike else {"reference"})
    with threads(1):
        wanted = run_alone(Decoder(plan("E2B, wide"), held, F32, "cpu", "reference"), prompt(40), 40)
    for rows in (40, 9, 1):
        found = run_alone(fast, prompt(40), rows)
        if activations == "float32":
            assert mismatches(found, wanted, 1e-4) == {}
        assert relative_error(found.layers[0], wanted.layers[0]) < 0.1  # rounded rows; those in a wrong order are 1 off


def _scattered(part: torch.Tensor, seed: int) -> Part:
    """Round a matrix to 8 bits with groups of 32 columns that lie anywhere."""
    group_of = torch.randperm(part.shape[1], generator=torch.Generator().manual_seed(seed)) // 32
    scales = part.abs().amax(-1, keepdim=True).repeat(1, part.shape[1] // 32) / 127
    codes = (part / scales.index_select(1, group_of)).round().add(128).to(torch.uint8)
    packed = pack_for_cpu(from_packed(codes.view(torch.int32), scales, 8, part.shape[1], group_of=group_of))
    assert isinstance(packed, CpuPackedWeight)
    return packed


def _float8(part: torch.Tensor, group: int | None) -> Part:
    """Round a matrix, or a stack, to 8-bit floats times scales of rows or blocks of 16 rows, where 32 divides its columns."""
    if part.shape[-1] % 32:
        return part
    top = part.abs().amax(-1, keepdim=True) / 448 if group is None else part.abs().amax((-1, -2), keepdim=True) / 448
    scales = top if group is None else top.expand(*part.shape[:-2], -(-part.shape[-2] // 16), part.shape[-1] // group)
    packed = pack_for_cpu(from_values((part / top).to(torch.float8_e4m3fn), scales.contiguous(), block=group and (16, group)))
    assert packed is not None
    return packed


def test_many_rows_and_the_window_edge() -> None:
    """More rows than one item of work takes, and more than any window."""
    ids = prompt(513)
    for name in ("E2B", "26B-A4B"):
        assert mismatches(run_alone(decoder(name), ids, 513), wanted_of(name, F32, 513), 5e-5) == {}


@pytest.mark.parametrize("count", [1, 3, 5])
def test_threads_change_no_bit(count: int) -> None:
    """Nor do more threads than cores stand still."""
    for name in ("E2B", "26B-A4B"):
        fast, ids = decoder(name), prompt(70)
        wanted = run_alone(fast, ids, 65)
        with threads(count):
            assert run_alone(fast, ids, 65).logits.equal(wanted.logits)


@pytest.mark.parametrize("level", native.LEVELS)
def test_every_level_equals_the_reference(level: str) -> None:
    try:
        native.set_level(level)
    except KernelError as error:
        pytest.skip(str(error))
    try:
        for name in ("E2B", "26B-A4B"):
            assert mismatches(run_alone(decoder(name, BF16), prompt(90), 19), wanted_of(name, BF16, 90), 5e-5) == {}
    finally:
        native.set_level(None)


# Several lengths around page and window; some keep all rows, most drop theirs in the last writer, one gives none at first.
JOBS = (
    Job(prompt(130, 1), max_tokens=2),
    Job(prompt(33, 2), max_tokens=2, wants_logprobs=True),
    Job(prompt(1, 3), joins=1, max_tokens=3),
    Job(prompt(65, 4), joins=2, max_tokens=1, wants_states=True),
)


def answers(name: str, kernels: str, dtype: torch.dtype = F32) -> list[Answer]:
    with threads(1 if kernels == "reference" else 2):
        return drive(Engine(decoder(name, kernels=kernels, dtype=dtype), 192, max_batched_tokens=64, max_num_seqs=4), JOBS)


@pytest.mark.parametrize("name", ["E2B", "26B-A4B"])
def test_ragged_batches_with_dropped_rows(name: str) -> None:
    for mine, theirs in zip(answers(name, "auto"), answers(name, "reference"), strict=True):
        assert mine.tokens == theirs.tokens
        for found, wanted in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert abs(found.logprob - wanted.logprob) < 1e-4
        assert mine.report is not None
        assert theirs.report is not None
        assert dict(mine.report.top_logits) == pytest.approx(dict(theirs.report.top_logits), abs=2e-4)
        for found, wanted in zip(mine.report.hidden_states, theirs.report.hidden_states, strict=True):  # type: ignore[assignment]
            assert relative_error(found, wanted) < 5e-5  # type: ignore[arg-type]


def test_rows_stay_float32_and_the_cache_takes_the_compute_dtype() -> None:
    fast = decoder("E2B", BF16, dtype=BF16)
    assert fast.precision == Precision(BF16, F32, "int8")
    assert fast.embed(torch.tensor([3])).dtype == F32
    found = run_alone(fast, prompt(30), 30)
    wanted = run_alone(decoder("E2B", BF16), prompt(30), 30)
    assert 1e-6 < relative_error(found.logits, wanted.logits) < 5e-2  # bfloat16 keys, and constants rounded to it
    assert decoder("E2B", BF16, "reference", BF16).precision == Precision(BF16, BF16, "float32")


# ---- at the ends of numbers ----


def inject_identity(dtype: torch.dtype = F32) -> tuple[Any, Any]:
    """Build native and reference inject whose matrices change nothing: what is left is gelu(x), normed."""
    name = "E2B"
    layer, hidden = plan(name).layers[0], 64
    here: dict[str, Param] = {
        "ple.gate": Weight((torch.eye(hidden, dtype=dtype),)),
        "ple.out": Weight((torch.eye(hidden, dtype=dtype),)),
        "ple.post_norm": torch.ones(hidden),
        "scale": torch.ones(1),
    }
    sized = replace(plan(name), hidden=hidden)
    narrow, words = replace(layer, ple_dim=hidden), OpContext(reference.linear)
    return (
        layer_ops.build_ple_gate(sized, narrow, here, words),
        reference.build_ple_gate(sized, narrow, here, words),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e-3, 0.1, 1.0, 5.0, 12.0, 100.0, 1e4, 1e12])
def test_gelu_at_both_ends(size: float) -> None:
    mine, plain = inject_identity()
    x_ND, ones = torch.linspace(-1, 1, 64)[None] * size, torch.ones(1, 64)
    found, wanted = mine(x_ND, ones), plain(x_ND, ones)
    assert found.isfinite().all()
    assert relative_error(found, wanted) < 2e-6


def test_what_is_not_a_number_stays_visible() -> None:
    mine, _ = inject_identity()
    x_ND = torch.ones(2, 64)
    x_ND[0, 17] = torch.nan
    found = mine(x_ND, torch.ones(2, 64))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("cap", [None, 2.0, 30.0])
def test_softcap_is_right_near_zero_and_far_out(cap: float | None) -> None:
    here = {"embed.tokens": Weight((torch.eye(96),))}
    sized = replace(plan("E2B"), hidden=96, softcap=cap)
    rows = torch.stack([torch.linspace(-size, size, 96) for size in (1e-6, 0.1, 0.3, 3.0, 40.0, 1e4)])
    found = model_ops.build_lm_head(sized, here, OpContext(reference.linear))(rows)
    wanted = rows.double() if cap is None else cap * torch.tanh(rows.double() / cap)
    assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=0)


# ---- packed weights with int8 rows ----


def nll(model: api.Model, ids: list[int]) -> float:
    """Return the mean negative log-probability of the tokens after the first."""
    found = model.stream(ids, max_tokens=0, prompt_logprobs=0).finish().prompt.logprobs
    return -sum(each.logprob for each in found) / len(found)


@pytest.mark.parametrize(("folder", "quant"), [(DEMO_FOLDER, "q4"), (TINY_A, "q4"), (TINY_A, "q8")], ids=str)
def test_int8_rows_cost_less_than_three_thousandths_of_the_nll(folder: Path, quant: str) -> None:
    """The float32 reference has the same packed weights."""
    with threads(1):
        plain = api.load(str(folder), dtype="float32", kernels="reference", quant=quant, context=512)
        ids = plain.tokenizer.encode(PASSAGE, bos=True)[:128]
        wanted = nll(plain, ids)
    fast = api.load(str(folder), dtype="bfloat16", quant=quant, context=512)
    assert fast.decoder.precision.activations == "int8"
    assert nll(fast, ids) == pytest.approx(wanted, rel=3e-3)
    exact = api.load(str(folder), dtype="float32", quant=quant, context=512)
    assert nll(exact, ids) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("folder", [DEMO_FOLDER, TINY_A], ids=["tiny-e", "tiny-a"])
def test_float32_continues_as_the_reference_does(folder: Path) -> None:
    texts = []
    for kernels, count in (("auto", 2), ("reference", 1)):
        with threads(count):
            model = api.load(str(folder), dtype="float32", kernels=kernels, context=64)
            texts.append(model.generate("And the king said", max_tokens=12).text)
    assert texts[0] == texts[1]
