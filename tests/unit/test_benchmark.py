"""What `gemcutter bench` stands on: synthetic models, filled contexts, ceilings, clocks. No speed is tested."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemcutter import config as configs
from gemcutter import native
from gemcutter.benchmark import breakdown, cores, hardware, peak, roofline, synthetic
from gemcutter.benchmark.cold_start import first_token_s
from gemcutter.benchmark.harness import BenchCase, BenchEngine, list_cases
from gemcutter.benchmark.report import ceiling, check, measure, show, spell_disturbed, spell_rates
from gemcutter.benchmark.target import BenchTarget, from_preset
from gemcutter.checkpoint.write.synth import SIZES, Size, spell_config
from gemcutter.engine.request import Request
from gemcutter.errors import ConfigError, RequestError
from gemcutter.load_options import LoadOptions
from gemcutter.ops import OPS
from gemcutter.plan import ModelPlan, derive
from gemcutter.quant import Weight
from gemcutter.quant.packing import CpuPacker

SMALL = Size(hidden=64, mlp=128, layers=2, period=2, heads=2, kv_heads=1, head_dim=32, window=8, context=512, vocab=256)


def small_plan() -> ModelPlan:
    """Make a plan of one windowed and one global layer, both of which write keys and values."""
    return derive(configs.read(spell_config(SMALL)))


def subject(preset: str = "tiny:E2B", quant: str = "q4_0", layers: int | None = None, **how: Any) -> BenchTarget:
    return from_preset(preset, quant, layers, LoadOptions(model=preset, **how))


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine in milliseconds."""
    monkeypatch.setattr(hardware, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "MATMUL_SIZE", 64)


# ---- synthetic models ----


@pytest.mark.parametrize("quant", synthetic.QUANTS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_quantization_runs(size: str, quant: str) -> None:
    made = subject(f"tiny:{size}", quant, layers=2)
    stand = BenchEngine(made.decoder, [BenchCase("tg", 8)])
    stand.engine.submit(Request((2, 9, 5, 7), max_tokens=2, top_logits=3))
    events = [event for _ in range(2) for event in stand.engine.step()]
    assert events[0].prompt is not None
    assert all(math.isfinite(logit) for _, logit in events[0].prompt.top_logits)
    assert not stand.engine.has_work


@pytest.mark.parametrize(
    ("size", "quant", "stored"),
    [
        ("E2B", "q4_0", {"embed.tokens": "Q6_K", "layers.0.mlp.in": "Q4_0", "ple.in": None, "embed.ple": "Q4_0"}),
        ("26B-A4B", "q4_0", {"layers.3.moe.in": "Q4_0", "layers.3.moe.router": None, "layers.3.moe.out": "Q4_0"}),
        ("26B-A4B", "mlx4", {"embed.tokens": "affine4g64", "layers.3.moe.router": "affine8g64"}),
        ("E4B", "mxfp4", {"embed.tokens": "Q8_0", "layers.0.mlp.in": "MXFP4", "ple.in": None}),
        ("31B", "iq4_xs", {"embed.tokens": "Q6_K", "layers.0.mlp.in": "IQ4_XS"}),
        ("31B", "q8_0", {"embed.tokens": "Q8_0", "layers.0.attn.in": "Q8_0"}),
        ("12B", "bf16", {"embed.tokens": None, "layers.0.mlp.out": None}),
    ],
)
def test_weights_are_stored_as_files_of_their_kind_have_them(size: str, quant: str, stored: dict[str, str | None]) -> None:
    shapes = {spec.name: spec.shape for spec in synthetic.plan_of(size).params()}
    found = {name: synthetic.QUANTS[quant].scheme(name, shapes[name][-1]) for name in stored}
    assert {name: scheme and scheme.name for name, scheme in found.items()} == stored


def test_a_preset_has_the_shapes_and_the_spread_of_its_plan() -> None:
    plan = synthetic.plan_of("tiny:26B-A4B")
    params = synthetic.make_params(plan, "q8_0")
    for spec in plan.params():
        param = params[spec.name]
        if isinstance(param, Weight):
            assert (*spec.shape[:-2], param.rows, param.columns) == spec.shape
            assert param.names == tuple(name for name, _ in spec.parts)
        else:
            assert tuple(param.shape) == spec.shape
    wide = params["layers.0.mlp.in"].parts[0].dequantize()
    assert float(wide.std()) * plan.hidden**0.5 == pytest.approx(1, rel=0.05)


def test_packed_and_plain_presets_have_equal_values() -> None:
    plan = synthetic.plan_of("tiny:E2B", 2)
    plain, cpu_packed = (synthetic.make_params(plan, "mlx4", packer) for packer in (None, CpuPacker()))
    for name in ("embed.tokens", "layers.1.mlp.out"):
        ours, theirs = plain[name].parts[0], cpu_packed[name].parts[0]
        assert theirs.scheme == f"cpu-packed-{ours.scheme}"
        assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_super_blocks_have_the_spread_that_was_asked_for() -> None:
    for scheme in (synthetic.Q6_K[0], *synthetic.IQ4_XS):
        piece = synthetic.draw_piece(1536, scheme, 0.02, torch.Generator())
        assert float(piece.dequantize().std()) == pytest.approx(0.02, rel=0.1)


def test_cut_models_keep_the_first_layers() -> None:
    whole, cut = synthetic.plan_of("E2B"), synthetic.plan_of("E2B", 17)
    assert cut.layers == whole.layers[:17]
    assert cut.first_reader == whole.first_reader == 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: synthetic.plan_of("7B"), "there is no size '7B'"),
        (lambda: synthetic.plan_of("E2B", 36), "E2B has 35, found 36"),
        (lambda: synthetic.plan_of("E2B", 0), "found 0"),
        (lambda: synthetic.make_params(small_plan(), "q3"), "expected q4_0"),
    ],
)
def test_names_and_numbers_that_are_none_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


# ---- ceilings ----


def test_the_bytes_of_a_token_are_those_of_every_matrix_once() -> None:
    plan = small_plan()
    params = synthetic.make_params(plan, "bf16")
    first = (128 + 64 + 256 + 128) * 64 * 2  # q, k and v [64 + 32 + 32], out [64, 64], gate and up [256], down [64, 128]
    second = (256 + 128 + 256 + 128) * 64 * 2  # heads are twice as wide in the global layer
    vectors = 4 * ((4 * 64 + 2 * 32 + 1) + (4 * 64 + 2 * 64 + 1) + 64)  # norms and scale of both, the last norm: float32
    assert roofline.token_bytes(plan, params) == 256 * 64 * 2 + first + second + vectors
    assert roofline.held_bytes(plan, params) == roofline.token_bytes(plan, params)


def test_only_the_chosen_experts_and_one_row_of_a_table_count() -> None:
    plan = synthetic.plan_of("tiny:26B-A4B")
    params = synthetic.make_params(plan, "bf16")
    experts = sum(params[spec.name].nbytes for spec in plan.params() if spec.name.endswith(("moe.in", "moe.out")))
    assert roofline.held_bytes(plan, params) - roofline.token_bytes(plan, params) == experts * 12 // 16  # 4 of 16
    plan = synthetic.plan_of("tiny:E2B")
    params = synthetic.make_params(plan, "bf16")
    held, table = roofline.held_bytes(plan, params), params["embed.ple"].nbytes
    assert held == sum(param.nbytes for param in params.values()) - table
    assert roofline.token_bytes(plan, params) == held + 2 * len(plan.layers) * plan.ple_dim


def test_a_reply_is_bound_by_bytes_and_a_prompt_by_the_best_products() -> None:
    plan = small_plan()
    rates = {"read_bytes_per_s": 1e6, "float32_flops_per_s": 1e9, "native_flops_per_s": 4e9}
    reply = ceiling(plan, 10_000, 2, BenchCase("tg", 10, 14), rates)
    assert reply["read_bytes_per_token"] == 10_000 + 2 * (2 * 32 * 8 + 2 * 64 * 20)  # the window's 8 positions, and all 20
    assert reply["ceiling_tok_s"] == 1e6 / reply["read_bytes_per_token"]
    prompt = ceiling(plan, 10_000, 2, BenchCase("pp", 10), rates)
    assert (prompt["ceiling"], prompt["flops"]) == ("native_flops_per_s", plan.flops(10))
    assert prompt["ceiling_tok_s"] == 10 * 4e9 / plan.flops(10)


def test_the_processor_s_own_products_bound_a_prompt_where_they_were_measured() -> None:
    rates = {"read_bytes_per_s": 1e6, "native_flops_per_s": 9e9, "float32_peak_ops_per_s": 4e9, "int8_peak_ops_per_s": 8e9}
    plan = small_plan()
    prompt = ceiling(plan, 10_000, 2, BenchCase("pp", 10), rates)
    assert prompt["ceiling"] == "int8_peak_ops_per_s"
    assert prompt["ceiling_tok_s"] == 10 * 8e9 / plan.flops(10)
    spelled = "\n".join(spell_rates(rates))
    assert "float32 4, int8 8 billion operations" in spelled
    assert "native 9 (112%)" in spelled


@pytest.mark.skipif(native.missing() is not None, reason="the loops are the native library's")
def test_processors_multiply_bytes_faster_than_float32() -> None:
    rates = peak.peak_rates()
    assert (
        set(rates) - {"float32"}
        == {
            "portable": set(),
            "avx2": {"int8"},
            "avx512": {"int8"},
            "avx512_bf16": {"int8", "bfloat16"},
            "amx": {"int8", "bfloat16"},
            "neon": {"int8"},
            "neon_i8mm": {"int8", "bfloat16"},
        }[str(native.level())]
    )
    assert all(rate > 1e8 for rate in rates.values())


def test_disturbed_runs_are_repeated_and_the_calmest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = iter([0.0, 0.5, 0.01, 0.0])
    monkeypatch.setattr(cores, "timed", lambda work: cores.Run(*work(), next(lost)))
    seconds = iter([1.0, 2.0, 3.0, 4.0])
    runs, disturbed = cores.undisturbed(lambda: (7, next(seconds)), 3)
    assert [run.seconds for run in runs] == [1.0, 3.0, 4.0]
    assert disturbed == 1
    row = {"test": "tg7", "disturbed": 2, "lost_core_share": 0.2}
    assert list(spell_disturbed([row, row | {"disturbed": 0}])) == [
        "tg7: other programs took cores from 2 of its runs, which were repeated; "
        "of those that count one still lost 20% of its cores' time"
    ]


def test_waiting_for_a_core_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    waited = iter([1.0, 1.0 + 0.05])
    monkeypatch.setattr(cores, "_waited_s", lambda: next(waited))
    run = cores.timed(lambda: (1, time.sleep(0.1) or 0.1))
    assert 0 < run.lost <= 0.5
    monkeypatch.setattr(cores, "_waited_s", lambda: None)
    assert cores.timed(lambda: (1, time.sleep(0.1) or 0.1)).lost > 0.5  # asleep, as the calling thread never is


def test_a_prompt_behind_a_context_pays_for_its_own_rows_and_all_visible_keys() -> None:
    plan = small_plan()
    all_rows = (128 * 64 + 64 * 64 + 3 * 64 * 128) * 10  # of the windowed layer
    last_row = 256 * 64 + 128 * 64 + 3 * 64 * 128  # of the last writer, whose other rows stop at keys and values
    others = 128 * 64 * 9
    seen = 2 * 2 * 32 * 8 * 10 + 2 * 2 * 64 * 30  # scores and values: 2 heads, the window's 8 keys, and 30 for the last row
    assert roofline.prefill_flops(plan, 20, 10) == 2 * (all_rows + last_row + others + seen + 256 * 64)
    assert roofline.prefill_flops(plan, 0, 10) == plan.flops(10)


# ---- filled contexts ----


@pytest.mark.parametrize("depth", [0, 1, 64, 100])
def test_a_filled_context_is_continued_and_not_computed(depth: int) -> None:
    made = subject(layers=5)
    stand = BenchEngine(made.decoder, [BenchCase("pp", 9, depth), BenchCase("tg", 3, depth)], max_rows=40)
    lengths = []
    real = made.decoder.forward
    made.decoder.forward = lambda step, pool: lengths.append(step.positions_N.tolist()) or real(step, pool)  # type: ignore
    for _ in range(2):  # a second run finds the context as the first did
        lengths.clear()
        stand.run(BenchCase("pp", 9, depth))
        assert lengths == [list(range(depth, depth + 9))]
        lengths.clear()
        stand.run(BenchCase("tg", 3, depth))
        assert lengths == [[depth + row] for row in range(4)]
    assert stand.engine.pool.allocators.keys() == {group.id for group in made.plan.groups()}


def test_filled_slots_look_like_what_layers_write() -> None:
    made = subject(layers=5)
    pool = BenchEngine(made.decoder, [BenchCase("tg", 1, 50)]).engine.pool
    for layer in made.plan.writers:
        weight = made.decoder.params[f"layers.{layer.index}.attn.k_norm"]
        assert isinstance(weight, torch.Tensor)
        keys, values = pool.keys[layer.index].float(), pool.values[layer.index].float()
        assert torch.allclose(values.pow(2).mean(-1), torch.tensor(1.0), atol=0.02)
        assert torch.allclose((keys / weight).pow(2).mean(-1), torch.tensor(1.0), atol=0.02)


def test_long_prompts_run_in_chunks() -> None:
    made = subject(layers=2)
    stand = BenchEngine(made.decoder, [BenchCase("pp", 25)], max_rows=10)
    rows = []
    real = made.decoder.forward
    made.decoder.forward = lambda step, pool: rows.append(step.num_rows) or real(step, pool)  # type: ignore
    stand.run(BenchCase("pp", 25))
    assert rows == [10, 10, 5]


def test_tests_are_listed_by_depth() -> None:
    assert [test.name for test in list_cases([512, 0], [16], [0, 2048])] == ["pp512", "tg16", "pp512@d2048", "tg16@d2048"]


def test_tests_that_cannot_run_are_all_named() -> None:
    made = subject(layers=1)
    short = replace(made, decoder=made.decoder)
    room = made.plan.context
    with pytest.raises(RequestError) as caught:
        check(short, [BenchCase("pp", 5), BenchCase("pp", room), BenchCase("tg", 1, room)])
    assert len(caught.value.problems) == 2
    with pytest.raises(RequestError, match="no test"):
        check(made, [])


# ---- clocks and the report ----


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_clocks_see_every_sentence_and_leave_the_decoder_as_it_was(kernels: str) -> None:
    made = subject(layers=5, kernels=kernels)
    stand = BenchEngine(made.decoder, [BenchCase("tg", 2)])
    before = [dict(vars(owner)) for owner in (made.decoder, *made.decoder.layers)]
    spent = breakdown.measure(made.decoder, lambda begin: stand.run(BenchCase("tg", 2), begin))
    assert [dict(vars(owner)) for owner in (made.decoder, *made.decoder.layers)] == before
    assert spent.keys() == set(OPS) - {"linear", "layer"} | {"rest"}
    assert all(seconds > 0 for op, seconds in spent.items() if op != "rest")


@pytest.mark.usefixtures("quick_machine")
def test_a_measurement_has_a_row_a_test_beside_its_ceiling() -> None:
    done: list[tuple[int, int]] = []
    tests = list_cases([6], [2], [0, 30])
    found = measure(subject(layers=2), tests, 2, with_breakdown=True, progress=lambda count, total: done.append((count, total)))
    assert [row["test"] for row in found["rows"]] == ["pp6", "tg2", "pp6@d30", "tg2@d30"]
    for row in found["rows"]:
        assert 0 < row["tok_s_min"] <= row["tok_s"] <= row["tok_s_max"] < math.inf
        assert row["share"] == row["tok_s"] / row["ceiling_tok_s"] > 0
        latency = row["ttft_s"] / row["tokens"] if row["test"].startswith("pp") else row["tpot_s"] / row["batch"]
        assert 0.99 / row["tok_s_max"] <= latency <= 1.01 / row["tok_s_min"]
        assert row["ceiling"] in found["rates"]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found["memory"]["peak_bytes"] == found["memory"]["weight_bytes"] + found["memory"]["over_weights_bytes"]
    table = show(found)
    assert all(f"\n{row['test']} " in table for row in found["rows"])
    assert "\nattention " in table


@pytest.mark.usefixtures("quick_machine")
def test_the_reference_has_no_native_rate() -> None:
    found = measure(subject(layers=1, kernels="reference"), [BenchCase("pp", 3)], 1)
    assert "native_flops_per_s" not in found["rates"]
    assert found["kernels"] == "reference"


@pytest.mark.slow
def test_a_fresh_process_gives_a_first_token() -> None:
    chosen, written = first_token_s(LoadOptions(model="demo"), 1)
    assert 0 < chosen <= written < 600


NAMES = {
    "Intel(R) Xeon(R) Processor": "Intel(R) Xeon(R) Processor, model 173",
    "AMD EPYC 9B45 128-Core Processor": "AMD EPYC 9B45 128-Core Processor",
}


@pytest.mark.parametrize("name", NAMES)
def test_processors_that_share_a_name_are_told_apart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(
        2 * f"processor\t: 0\ncpu family\t: 6\nmodel\t\t: 173\nmodel name\t: {name}\nflags\t\t: fpu\n\n"
    )
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    assert hardware.cpu_name() == NAMES[name]
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "none")
    assert hardware.cpu_name()
