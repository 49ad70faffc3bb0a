"""Adapters in native layer ops: what they add equals the definition, and rows that ask for none keep every bit.

Owns the claim for single ops and for steps that mix sequences; against transformers it is `tests/parity/test_adapters.py`'s. Read
`gemcutter/ops/lora.py` for the definition, `csrc/cpu/adapters.h` for the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.benchmark.synthetic import make_params
from gemcutter.benchmark.synthetic import plan_of as plan_of_preset
from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.model.text import Decoder
from gemcutter.ops import reference
from gemcutter.ops.cpu import layer_ops, model_ops
from gemcutter.ops.cpu.adapters import carry_deltas, number_of, numbers_of_rows
from gemcutter.ops.registry import CPU
from gemcutter.ops.step import NO_ADAPTERS, AdapterRows
from gemcutter.ops.types import OpContext, Param
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight
from gemcutter.quant.carried import adapters_of, carry, without_deltas
from gemcutter.quant.lora import Delta
from tests.adapters import places
from tests.kernels.test_native_layers import PLANS, params, plan, threads
from tests.topologies import poison, prompt, relative_error

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = 2e-5  # float32 sums in another order, through a norm
FEW_ROWS = 16  # up to which products depend on no other row
RANKS = {"a": 3, "b": 17, "narrow": 16, "wide": 40}  # less and more than a vector, a panel, a unit of work


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with threads(2):
        yield


def draw_deltas(found: ModelPlan, adapter: str, only: str = "") -> dict[str, list[Delta]]:
    """Draw an adapter's change of every matrix that rows meet, part by part; bfloat16 holds that of `narrow`."""
    generator, rank = torch.Generator().manual_seed(number_of(adapter)), RANKS[adapter]
    specs, deltas = {spec.name: spec for spec in found.params()}, dict[str, list[Delta]]()
    for name, part in places(found):
        if name == "head" or only not in name:
            continue
        spec, start = specs[name], 0
        for other, rows in spec.parts:
            if other == part:
                break
            start += rows
        rows, columns = dict(spec.parts)[part] if part else spec.shape[0], spec.shape[1]
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        up = torch.randn(rows, rank, generator=generator) * rank**-0.5 / 2
        if adapter == "narrow":
            down, up = down.to(BF16).float(), up.to(BF16).float()
        deltas.setdefault(name, []).append(Delta(adapter, start, down, up))
    return deltas


def carrying(found: ModelPlan, plain: Mapping[str, Param], adapters: Iterable[str]) -> dict[str, Param]:
    carried: dict[str, Param] = dict(plain)
    for adapter in adapters:
        carried = carry(carried, draw_deltas(found, adapter))
    return carried


@cache
def adapted_params(name: str, stored: torch.dtype = F32) -> dict[str, Param]:
    return carrying(plan(name), params(name, stored), RANKS)


@cache
def decoder(name: str, kernels: str = "auto", stored: torch.dtype = F32, has_adapters: bool = True) -> Decoder:
    given = adapted_params(name, stored)
    return Decoder(plan(name), given if has_adapters else without_deltas(given), F32, "cpu", kernels)


# ---- how factors and rows are handed over ----


def test_rows_ask_by_numbers_that_no_other_adapter_gets() -> None:
    numbers = [number_of(name) for name in ("x", "y", "x", "z")]
    assert numbers[0] == numbers[2]
    assert len(set(numbers)) == 3
    assert numbers_of_rows(NO_ADAPTERS, 3) is None
    found = numbers_of_rows({"x": slice(1, 3), "y": torch.tensor([0, 4])}, 5)
    assert found is not None
    assert found.tolist() == [number_of("y"), number_of("x"), number_of("x"), -1, number_of("y")]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_factors_are_held_in_16_bits_where_that_changes_none(dtype: torch.dtype) -> None:
    down, up = (torch.randn(*shape).to(dtype).float() for shape in ((3, 32), (21, 3)))
    matrix = native.Matrix()
    views, packed = carry_deltas(matrix, [Delta("b", 16, down, up), Delta("a", 0, down, up)])  # type: ignore[misc]
    assert matrix.num_deltas == 2
    assert [each.adapter for each in views] == sorted(map(number_of, "ab"))
    assert {half.dtype for pair in packed for half in pair} == {dtype}
    (_, panels), *_ = packed
    assert panels.shape == (2, 3, 16)
    assert panels.transpose(1, 2).reshape(32, 3)[:21].float().equal(up)
    assert not panels.transpose(1, 2).reshape(32, 3)[21:].any()


# ---- single ops ----


def rows_of_adapters(rows: int) -> AdapterRows:
    """Let rows ask in turn: runs of two, single rows, and some that ask for none or for an adapter that changes nothing."""
    order = ("a", "a", None, "b", "narrow", None, "wide", "wide", "other")
    asked = [order[row % len(order)] for row in range(rows)]
    found = {each: [row for row in range(rows) if asked[row] == each] for each in asked if each}
    return {each: torch.tensor(some) for each, some in found.items()}


def without_any(adapters: AdapterRows, rows: int) -> list[int]:
    numbers = numbers_of_rows({name: some for name, some in adapters.items() if name != "other"}, rows)
    return list(range(rows)) if numbers is None else [row for row, number in enumerate(numbers) if number < 0]


def build_pair(op: str, name: str, stored: torch.dtype) -> tuple[Any, Any, Any, list[Any]]:
    """Build an op natively, by its definition, and natively without adapters; and what it takes beside rows, by their number."""
    found, own = plan(name), adapted_params(name, stored)
    layer = found.layers[0]
    if op == "ple_embed":
        more: list[Any] = [lambda rows: torch.arange(rows) % 7, lambda rows: 1, lambda rows: 3]
        build: list[Any] = [partial(each.build_ple_embed, found) for each in (model_ops, reference)]  # type: ignore[attr-defined]
    else:
        widths = {"attn_out": (layer.heads, layer.head_dim), "ple_gate": (layer.ple_dim,)}.get(op)
        more = [] if widths is None else [lambda rows: torch.randn(rows, *widths, generator=torch.Generator().manual_seed(rows))]
        build = [partial(getattr(each, f"build_{op}"), found, layer) for each in (layer_ops, reference)]
        prefix = f"layers.{layer.index}."
        own = {each.removeprefix(prefix): param for each, param in own.items() if each.startswith(prefix)}
    ctx = OpContext(reference.linear, low_rank=reference.linear)
    return build[0](own, ctx), build[1](own, ctx), build[0](without_deltas(own), ctx), more


@pytest.mark.parametrize("stored", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("op", "name"), [("attn_out", "E2B"), ("mlp", "E2B"), ("mlp", "26B-A4B"), ("ple_gate", "E2B"), ("ple_embed", "E2B")]
)
@pytest.mark.usefixtures("level")
def test_ops_add_what_the_definition_adds(op: str, name: str, stored: torch.dtype) -> None:
    mine, theirs, plain, more = build_pair(op, name, stored)
    for rows in (1, 2, 9, 16, 17, 70, 130):
        x_ND = torch.randn(rows, plan(name).hidden, generator=torch.Generator().manual_seed(rows))
        given, adapters = [each(rows) for each in more], rows_of_adapters(rows)
        found, wanted, without = mine(x_ND, *given, adapters), theirs(x_ND, *given, adapters), plain(x_ND, *given)
        assert relative_error(found, wanted) < TOLERANCE
        assert relative_error(without, wanted) > 0.01
        untouched = without_any(adapters, rows)
        if rows <= FEW_ROWS or plan(name).layers[0].moe is None:  # else what others' routers choose gives an expert many rows
            assert found[untouched].equal(without[untouched])
        assert not untouched or relative_error(found[untouched], without[untouched]) < TOLERANCE
        assert mine(x_ND, *given).equal(without)


# ---- steps of whole decoders ----

Sequence_ = tuple[tuple[int, ...], str | None]


def run_together(running: Decoder, sequences: Sequence[Sequence_], chunk: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Run prompts side by side, `chunk` rows of each a step; returns each one's outputs of all layers, and its states."""
    counts = page_counts(running.plan, 64, chunk, len(sequences))
    pool = PagedKVCache(running.plan, counts, running.dtype)
    poison(pool)
    states = []
    for number, (ids, adapter) in enumerate(sequences):
        states.append(SequenceState(number, Request(ids, hidden_states=True, adapter=adapter)))
        states[-1].table = BlockTable(pool)
    layers = [[list[Tensor]() for _ in running.plan.layers] for _ in sequences]
    ends = [list[Tensor]() for _ in sequences]
    while work := [_chunk(each, chunk) for each in states if _rows_left(each)]:
        sizes = [each.rows for each in work]

        def observe(index: int, x_ND: Tensor, work: list[Any] = work, sizes: list[int] = sizes) -> None:
            for each, some in zip(work, x_ND.clone().split(sizes), strict=True):
                layers[each.sequence.number][index].append(some)

        found = running.forward(build_step(running, work), pool, observe)
        for each, some in zip(work, found.split(sizes), strict=True):
            ends[each.sequence.number].append(some)
            each.sequence.table.commit(each.rows)
    return [[torch.cat(rows) for rows in own] for own in layers], [torch.cat(each) for each in ends]


def _rows_left(state: SequenceState) -> int:
    assert state.table is not None
    return len(state.request.prompt) - state.table.length


def _chunk(state: SequenceState, chunk: int) -> ScheduledChunk:
    assert state.table is not None
    work = ScheduledChunk.of(state, state.table, min(chunk, _rows_left(state)))
    state.table.reserve(work.rows)
    return work


SEQUENCES: tuple[Sequence_, ...] = (
    (prompt(21, 1), "a"),
    (prompt(40, 2), None),
    (prompt(33, 3), "wide"),
    (prompt(9, 4), "narrow"),
    (prompt(40, 5), "b"),
    (prompt(14, 6), None),
)


@pytest.mark.parametrize("name", PLANS)
def test_steps_equal_the_definition(name: str) -> None:
    """Every layer's output of mixed steps of one row a sequence, of some, and of whole prompts."""
    with threads(1):
        wanted = run_together(decoder(name, "reference"), SEQUENCES, 64)
    fast = decoder(name)
    assert all(layer.fused is not None for layer in fast.adapted.layers)
    assert {impl for layer in fast.adapted.layers for impl in layer.kernels.values()} == {"native"}
    for chunk in (64, 13, 1):
        found = run_together(fast, SEQUENCES, chunk)
        for number in range(len(SEQUENCES)):
            for mine, theirs in zip(found[0][number], wanted[0][number], strict=True):
                assert relative_error(mine, theirs) < 1e-4
            assert relative_error(found[1][number], wanted[1][number]) < 1e-4


@pytest.mark.parametrize("stored", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["E2B", "26B-A4B"])
@pytest.mark.usefixtures("level")
def test_rows_do_not_feel_their_neighbours(name: str, stored: torch.dtype) -> None:
    """Up to 16 rows a step, bit for bit: beside other adapters, and without one also as in a model that has none."""
    fast, plain = decoder(name, stored=stored), decoder(name, stored=stored, has_adapters=False)
    for chunk in (1, 2):
        _, together = run_together(fast, SEQUENCES, chunk)
        for each, found in zip(SEQUENCES, together, strict=True):
            assert found.equal(run_together(fast, [each], 1)[1][0])
            assert found.equal(run_together(plain, [each], 1)[1][0]) == (each[1] is None)


def test_long_steps_leave_rows_without_an_adapter_alone() -> None:
    fast, plain = decoder("E2B"), decoder("E2B", has_adapters=False)
    without = [(ids, None) for ids, _ in SEQUENCES]
    _, found = run_together(fast, SEQUENCES, 64)
    _, wanted = run_together(plain, without, 64)
    same = [mine.equal(theirs) for mine, theirs in zip(found, wanted, strict=True)]
    assert same == [adapter is None for _, adapter in SEQUENCES]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_threads_change_no_bit(count: int) -> None:
    fast = decoder("26B-A4B")
    for chunk in (1, 64):
        wanted = run_together(fast, SEQUENCES, chunk)[1]
        with threads(count):
            assert all(map(torch.equal, run_together(fast, SEQUENCES, chunk)[1], wanted))


@pytest.mark.parametrize("activations", ["float32", "int8", "bf16"])
def test_packed_weights(activations: str) -> None:
    """Changes are added to products of quantized rows, too, from rows that are not; ops apart give the bits of whole layers."""
    found = plan_of_preset("tiny:E2B", 6)
    given = carrying(found, make_params(found, "q4_0", CPU.packer(torch.device("cpu"), F32)), ("a", "narrow"))
    fast = Decoder(found, given, F32, activations=activations)
    plain = Decoder(found, without_deltas(given), F32, activations=activations)
    sequences = [(prompt(21, 1), "a"), (prompt(30, 2), None), (prompt(25, 3), "narrow")]
    for chunk in (1, 40):
        layers, states = run_together(fast, sequences, chunk)
        assert states[1].equal(run_together(plain, [(ids, None) for ids, _ in sequences], chunk)[1][1])
        if activations == "float32":
            wanted = run_together(Decoder(found, given, F32, kernels="reference"), sequences, chunk)[0]
            for mine, theirs in zip(layers, wanted, strict=True):
                assert all(relative_error(*each) < 1e-4 for each in zip(mine, theirs, strict=True))
        for layer in fast.adapted.layers:
            layer.fused, whole = None, layer.fused
            assert whole is not None
        assert all(map(torch.equal, run_together(fast, sequences, chunk)[1], states))
        fast = Decoder(found, given, F32, activations=activations)


def test_a_change_of_a_few_rows_in_the_middle_of_a_panel() -> None:
    """Layouts of fused matrices need not begin parts at panels."""
    layer, own = plan("E2B").layers[0], dict(adapted_params("E2B"))
    prefix = f"layers.{layer.index}."
    plain = {name.removeprefix(prefix): each for name, each in without_deltas(own).items() if name.startswith(prefix)}
    weight = plain["mlp.out"]
    assert isinstance(weight, Weight)
    delta = Delta("a", 21, torch.randn(5, weight.columns), torch.randn(6, 5))
    changed = {**plain, "mlp.out": replace(weight, deltas=(delta, replace(delta, start=25)))}
    ctx, x_ND = OpContext(reference.linear, low_rank=reference.linear), torch.randn(4, plan("E2B").hidden)
    mine, theirs = (each.build_mlp(plan("E2B"), layer, changed, ctx) for each in (layer_ops, reference))
    assert relative_error(mine(x_ND, {"a": slice(1, 3)}), theirs(x_ND, {"a": slice(1, 3)})) < TOLERANCE


def test_adapters_come_and_go() -> None:
    fast = decoder("E2B", has_adapters=False)
    before = run_together(fast, SEQUENCES[:1], 1)[1][0]
    try:
        fast.adapted = fast.with_adapter("a", draw_deltas(plan("E2B"), "a"))
        changed = run_together(fast, SEQUENCES[:1], 1)[1][0]
        assert changed.equal(run_together(decoder("E2B"), SEQUENCES[:1], 1)[1][0])
        fast.adapted = fast.without_adapter("a")
        assert not adapters_of(fast.adapted.params)
        assert run_together(fast, SEQUENCES[:1], 1)[1][0].equal(before)
    finally:
        fast.adapted = fast.without_adapter("a")
