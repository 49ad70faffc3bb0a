"""What `gemcutter plan` says of ranks is what ranks load, cache, read and exchange."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemcutter.benchmark import roofline, synthetic
from gemcutter.benchmark.devices import DEVICES, Device
from gemcutter.benchmark.harness import BenchCase
from gemcutter.benchmark.planned_model import from_checkpoint, from_preset
from gemcutter.benchmark.report import ceiling
from gemcutter.benchmark.scale import Exchange, RankNeeds, Workload, crowding, step_time
from gemcutter.benchmark.scale_report import decode_speed, describe, make_plan, prompt_speed
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.load.memory_needs import PANEL_ALIGN, PANEL_ROWS
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import SIZES, write_checkpoint
from gemcutter.cli import main
from gemcutter.engine.engine import Engine
from gemcutter.engine.memory import page_counts, prefix_pages
from gemcutter.engine.request import Request
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.loading import on_rank
from gemcutter.model.text import Decoder
from gemcutter.parallel.stages import choose_stages
from gemcutter.plan import INT8_SCALE_BYTES
from gemcutter.quant.cpu_layout import ALIGN_BYTES, PANEL
from gemcutter.quant.packing import CpuPacker
from gemcutter.shard import Shard
from tests.trained import GOLDENS, trained

CPU = torch.device("cpu")
MODELS = ["tiny-e", "tiny-a", "tiny-e-mlx-4bit", "tiny-a-mlx-4bit", "tiny-e-Q4_0.gguf", "tiny-a-Q4_0.gguf", "tiny-e-Q8_0.gguf"]
SMALL = Workload(context=1024, rows=64, prompt=256)
RATES = Device("here", "a machine", "cpu", 64e9, 100e9, 2e12, 10e9, 5e-6)


def opened(name: str) -> Checkpoint:
    """Open a model's headers."""
    folders: dict[str, Path] = {"tiny-e": DEMO_FOLDER, "tiny-a": GOLDENS / "tiny-a"}
    return open_checkpoint(folders.get(name) or trained(name))


def check_weights(checkpoint: Checkpoint, world: int, dtype: str, quant: str | None = None) -> None:
    """Compare every parameter of every rank with what a load of it holds."""
    model = from_checkpoint("model", checkpoint, dtype, "cpu", quant)
    for rank in range(world):
        told = model.weights(model.of_rank(rank, world))
        mine = on_rank(checkpoint, Shard(rank, world), quant) if world > 1 else checkpoint
        held = load_params(mine, getattr(torch, dtype), CPU, quant=quant, packer=CpuPacker())
        assert told.keys() == held.keys()
        assert {name: memory.nbytes for name, memory in told.items()} == {name: param.nbytes for name, param in held.items()}


# ---- weights ----


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_hold_the_bytes_that_were_told(name: str, world: int) -> None:
    check_weights(opened(name), world, "bfloat16")


@pytest.mark.parametrize("quant", ["q4", "Q8_0"])
@pytest.mark.parametrize("name", ["tiny-e", "tiny-a"])
def test_ranks_that_quantize_hold_the_bytes_that_were_told(name: str, quant: str) -> None:
    check_weights(opened(name), 2, "bfloat16", quant)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_of_every_size_hold_the_bytes_that_were_told(size: str, tmp_path: Path) -> None:
    write_checkpoint(size, tmp_path / "model")
    for world, dtype in ((2, "bfloat16"), (4, "float32")):
        check_weights(open_checkpoint(tmp_path / "model"), world, dtype)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("tiny-e")])
def test_gpus_that_share_the_per_layer_table_hold_the_rows_that_were_told(name: str) -> None:
    checkpoint = opened(name)
    model = from_checkpoint("model", checkpoint, "bfloat16", "cuda", None)
    for rank in range(2):
        mine = on_rank(checkpoint, Shard(rank, 2), None, splits_ple=True)
        held = load_params(mine, torch.bfloat16, CPU)
        assert model.weights(model.of_rank(rank, 2))["embed.ple"].nbytes == held["embed.ple"].nbytes


def test_ranks_that_would_cut_a_group_are_refused() -> None:
    """As a load refuses them: super-blocks of 256 columns over heads of 64."""
    checkpoint = opened("tiny-e-Q4_K_M.gguf")
    model = from_checkpoint("model", checkpoint, "bfloat16", "cpu", None)
    with pytest.raises(ConfigError, match=r"attn.out is packed in groups of 256 columns.* use fewer ranks"):
        model.of_rank(0, 2)
    with pytest.raises(CheckpointError, match="use fewer ranks"):
        load_params(on_rank(checkpoint, Shard(0, 2), None), torch.bfloat16, CPU, packer=CpuPacker())


def test_panels_are_those_of_the_layout() -> None:
    assert (PANEL_ROWS, PANEL_ALIGN) == (PANEL, ALIGN_BYTES)


@pytest.mark.parametrize("quant", ["bf16", "q4_0", "q8_0", "mxfp4", "iq4_xs"])  # MLX's synthetic scales are wider than a file's
@pytest.mark.parametrize("size", ["E2B", "12B", "26B-A4B"])
def test_presets_hold_what_synthetic_weights_do(size: str, quant: str) -> None:
    model = from_preset(f"tiny:{size}", quant, "bfloat16", "cpu")
    told = model.weights(model.plan)
    made = synthetic.make_params(model.plan, quant, CpuPacker())
    assert {name: memory.nbytes for name, memory in told.items()} == {name: param.nbytes for name, param in made.items()}


@pytest.mark.parametrize("size", SIZES)
def test_a_preset_is_planned_as_a_checkpoint_of_its_size(size: str, tmp_path: Path) -> None:
    write_checkpoint(size, tmp_path / "model")
    read = from_checkpoint(size, open_checkpoint(tmp_path / "model"), "bfloat16", "cpu", None)
    drawn = from_preset(f"tiny:{size}", "bf16", "bfloat16", "cpu")
    for rank in range(2):
        assert read.weights(read.of_rank(rank, 2)) == drawn.weights(drawn.of_rank(rank, 2))


# ---- keys and values ----


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["tiny-e", "tiny-a"])
def test_caches_take_what_was_told(name: str, world: int, kv: str | None) -> None:
    model = from_checkpoint(name, opened(name), "bfloat16", "cpu", None)
    work = replace(SMALL, batch=3, kv=kv)
    dtype, scale = (torch.bfloat16, 0) if kv is None else (torch.int8, INT8_SCALE_BYTES)
    needs = RankNeeds(model, world - 1, world, work)
    kept = prefix_pages(needs.plan, work.context, work.batch, None, dtype.itemsize, scale_bytes=scale)
    pool = PagedKVCache(needs.plan, page_counts(needs.plan, work.context, work.rows, work.batch, kept), dtype)
    assert sum(needs.kv_bytes(range(len(needs.plan.layers)))) == pool.nbytes


def test_few_key_heads_are_held_by_several_ranks() -> None:
    """Two ranks halve the windows of 12B, and both hold the one key head of its global layers."""
    model = from_preset("12B", "bf16", "bfloat16", "cpu")
    one, two = (RankNeeds(model, 0, world, Workload(4096)) for world in (1, 2))
    for layer in model.plan.layers:
        assert one.kv[layer.index] == two.kv[layer.index] * (1 if layer.kv_heads == 1 else 2)


# ---- exchanges ----


class CountingRanks:
    """A rank that notes what it is asked to sum or join, and stands for all others."""

    view = None

    def __init__(self, shard: Shard) -> None:
        self.shard, self.summed, self.joined = shard, list[int](), list[int]()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self.summed.append(x.numel() * x.itemsize)
        return x

    def join(self, x_RV: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        self.joined.append(x_RV.shape[0] * sum(widths) * 4)
        return torch.zeros(x_RV.shape[0], sum(widths))


@pytest.mark.parametrize(("name", "place"), [("tiny-e", "cpu"), ("tiny-a", "cpu"), ("tiny-e", "cuda")])
def test_a_rank_exchanges_what_was_told(name: str, place: str) -> None:
    """A prompt in one step, of which only the last row goes on to the end, and a step of one token.

    GPUs share the table of per-layer embeddings, which a CPU can do, too.
    """
    model = from_checkpoint(name, opened(name), "float32", place, None)
    needs, ranks = RankNeeds(model, 1, 2, SMALL), CountingRanks(Shard(1, 2))
    mine = on_rank(opened(name), Shard(1, 2), None, splits_ple=place == "cuda")
    decoder = Decoder(mine.plan, load_params(mine, torch.float32, CPU), ranks=ranks)
    engine = Engine(decoder, context=64, max_batched_tokens=32, prefix_cache_bytes=0)
    engine.submit(Request(tuple(range(3, 23)), max_tokens=2))
    for rows in (20, 1):
        ranks.summed.clear()
        ranks.joined.clear()
        engine.step()
        told = needs.exchanges(range(len(mine.plan.layers)), rows, 1)
        sums, joins = ([each for each in told if each.is_sum == is_sum] for is_sum in (True, False))
        assert sum(each.times for each in sums) == len(ranks.summed)
        assert sum(each.times * each.floats * each.width for each in sums) == pytest.approx(sum(ranks.summed), rel=1e-3)
        assert [each.floats * each.width for each in joins] == ranks.joined


def test_what_a_rank_receives() -> None:
    each = Exchange("MLP", 2, 1000, 4)
    assert [each.received(world, "cpu") for world in (1, 2, 4)] == [0, 8000, 24000]  # every other rank's part
    assert [each.received(world, "cuda") for world in (2, 4)] == [8000, 12000]  # around the ring, twice
    assert replace(each, is_sum=False).received(4, "cpu") == 6000


@pytest.mark.parametrize(("experts", "chosen", "world"), [(8, 2, 2), (8, 3, 4), (6, 4, 3)])
def test_the_fullest_rank_of_all_choices(experts: int, chosen: int, world: int) -> None:
    held = experts // world
    choices = list(itertools.combinations(range(experts), chosen))
    most = [max(sum(each // held == rank for each in choice) for rank in range(world)) for choice in choices]
    assert crowding(experts, chosen, world) == pytest.approx(sum(most) / len(most) * world / chosen)


# ---- speeds ----


@pytest.mark.parametrize("quant", ["bf16", "q4_0"])
@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
@pytest.mark.parametrize("batch", [1, 4])
def test_one_rank_is_bound_as_the_benchmark_says(size: str, quant: str, batch: int) -> None:
    model = from_preset(f"tiny:{size}", quant, "bfloat16", "cpu")
    slow = replace(RATES, flops=None)  # reading bounds
    made = make_plan(model, slow, Workload(context=512, batch=batch, prompt=128), 1, 1)
    params = synthetic.make_params(model.plan, quant, CpuPacker())
    read = roofline.token_bytes(model.plan, params, batch)
    rates = {"read_bytes_per_s": slow.bandwidth or 0.0}
    limit = ceiling(model.plan, read, 2, BenchCase("tg", 0, depth=100, batch=batch), rates)
    assert decode_speed(made, 100)["tok_s"] == pytest.approx(limit["ceiling_tok_s"], rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_one_rank_computes_what_the_benchmark_says(size: str) -> None:
    model = from_preset(size, "bf16", "bfloat16", "cpu")
    made = make_plan(model, replace(RATES, bandwidth=1e18), Workload(context=4096, prompt=2048), 1, 1)
    flops = roofline.prefill_flops(model.plan, 0, 2048)
    assert prompt_speed(made)["tok_s"] == pytest.approx(2048 * 2e12 / flops, rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_share_the_work(size: str) -> None:
    """All ranks together compute what one does, but for what each does for itself: key heads, routers, per-layer gates."""
    model = from_preset(size, "bf16", "bfloat16", "cpu")
    whole = range(len(model.plan.layers))
    alone = RankNeeds(model, 0, 1, SMALL).flops(whole, 0, 512, 1)
    shared = sum(RankNeeds(model, rank, 4, SMALL).flops(whole, 0, 512, 1) for rank in range(4))
    assert alone <= shared < 1.2 * alone


def test_exchanges_and_reads_follow_each_other() -> None:
    model = from_preset("tiny:31B", "bf16", "bfloat16", "cpu")
    needs, whole = RankNeeds(model, 0, 2, SMALL), range(len(model.plan.layers))
    found = step_time(needs, replace(RATES, flops=None), whole, [whole], [(10, 1)], 1)
    told = needs.exchanges(whole, 1, 1)
    received, times = sum(each.received(2, "cpu") for each in told), sum(each.times for each in told)
    assert times == 2 + 2 * len(whole)
    assert found.exchange_s == pytest.approx(times * 5e-6 + received / 10e9)
    assert found.total_s == pytest.approx((found.read_s or 0.0) + (found.exchange_s or 0.0))


# ---- stages ----


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_readers_lie_with_those_they_read(size: str, count: int) -> None:
    model = from_preset(size, "bf16", "bfloat16", "cpu")
    made = make_plan(model, RATES, SMALL, 1, count)
    assert [index for layers in made.stages for index in layers] == list(range(len(model.plan.layers)))
    for layers in made.stages:
        assert all(model.plan.layers[index].kv_layer in layers for index in layers)


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_stages_together_hold_the_model(size: str) -> None:
    """The last one has the tied table, from which it gathers rows for the first stage, and with which it multiplies."""
    model = from_preset(size, "bf16", "bfloat16", "cpu")
    one, three = (describe(make_plan(model, RATES, SMALL, 1, count))["stages"] for count in (1, 3))
    assert sum(stage["weight_bytes"] for stage in three) == one[0]["weight_bytes"]
    assert ["embeddings and head" in stage["weights"] for stage in three] == [False, False, True]
    assert sum(stage["kv_bytes"] for stage in three) == one[0]["kv_bytes"]
    others = three[-1]["first_layer"]  # layers whose per-layer embeddings travel with a row
    for stage, left in zip(three, (others - three[1]["first_layer"], 0, others), strict=True):
        assert stage["handed_on_bytes_per_token"] == 4 * (model.plan.hidden + left * model.plan.ple_dim)


@pytest.mark.parametrize("name", MODELS)
def test_stages_hold_what_was_told(name: str) -> None:
    """Weights and caches of every stage, byte for byte; what one of them holds, it alone reads from the file."""
    checkpoint = opened(name)
    model = from_checkpoint(name, checkpoint, "bfloat16", "cpu", None)
    made = make_plan(model, RATES, replace(SMALL, batch=2), 1, 3)
    kept = prefix_pages(model.plan, SMALL.context, 2, None, 2)
    counts = page_counts(model.plan, SMALL.context, SMALL.rows, 2, kept)
    for layers, told in zip(made.stages, describe(made)["stages"], strict=True):
        mine = replace(checkpoint, plan=checkpoint.plan.on_stage(layers))
        held = load_params(mine, torch.bfloat16, CPU, packer=CpuPacker())
        assert sum(param.nbytes for each, param in held.items() if each != "embed.ple") == told["weight_bytes"]
        assert PagedKVCache(mine.plan, counts, torch.bfloat16).nbytes == told["kv_bytes"] + told["prefix_bytes"]


def test_the_costliest_stage_is_as_cheap_as_can_be() -> None:
    plan = from_preset("tiny:31B", "bf16", "bfloat16", "cpu").plan
    costs = [float(3 + index * 7 % 5) for index in range(len(plan.layers))]
    found = choose_stages(plan, costs, 9.0, 3)

    def worst(cuts: tuple[int, ...]) -> float:
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs)))]
        return max(*sums[:-1], sums[-1] + 9.0)

    best = min(worst(cuts) for cuts in itertools.combinations(plan.stage_starts, 2))
    assert worst(tuple(layers.start for layers in found[1:])) == best


@pytest.mark.parametrize(("size", "most", "sources"), [("E2B", 14, "13 and 14"), ("E4B", 23, "22 and 23")])
def test_more_stages_than_can_be_are_refused(size: str, most: int, sources: str) -> None:
    model = from_preset(size, "bf16", "bfloat16", "cpu")
    assert len(make_plan(model, RATES, SMALL, 1, most).stages) == most
    with pytest.raises(ConfigError, match=f"{most} at most can be cut, since layers .* of layers {sources}.* use --pp {most}"):
        make_plan(model, RATES, SMALL, 1, most + 1)


def test_stages_work_at_the_same_time_on_several_sequences() -> None:
    model = from_preset("31B", "bf16", "bfloat16", "cpu")
    one, four = (decode_speed(make_plan(model, RATES, replace(SMALL, batch=batch), 1, 4), 0) for batch in (1, 4))
    assert 3.0 < four["tok_s"] / one["tok_s"] < 4.0


# ---- the command ----


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Run the command with --json; stdout must hold that one object."""
    assert main(["plan", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "31B", "--quant", "bf16", "--tp", "2", "--device", "l40s"]
    found = plan_json(capsys, *words)
    (stage,) = found["stages"]
    assert found["fits"] is True
    assert stage["weight_bytes"] == pytest.approx(30.7e9, rel=0.01)
    assert [row["fits"] for row in found["tensor_parallel_sizes"]] == [False, True, True, True, True, True]
    assert [each["times"] for each in stage["exchanges_per_token"]] == [1, 60, 60, 1]
    assert found["needs_bytes"] == sum(
        stage[key] for key in ("weight_bytes", "kv_bytes", "prefix_bytes", "buffer_bytes", "process_bytes")
    )
    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    assert "fits: a rank needs 35.0 GB of 48.0 GB" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 120


def test_a_file_and_figures_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    figures = ["--memory", "1", "--memory-bandwidth", "20", "--flops", "0.5"]
    found = plan_json(capsys, "demo", "--context", "4096", *figures, "--tp", "2", "--link-bandwidth", "5", "--link-latency", "10")
    assert found["stored"] == "BF16"
    assert found["stages"][0]["by_rows_weight_bytes"] == 2 * 4096 * 10 * 64
    assert all(row["tok_s"] > 0 for row in found["speeds"])
    unknown = plan_json(capsys, "demo", "--memory", "0.1")
    assert unknown["fits"] is False
    assert [row["tok_s"] for row in unknown["speeds"]] == [None] * 3
    assert main(["plan", "demo", "--memory", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit: a rank needs" in shown
    assert "say --memory-bandwidth, --flops, or take a --device" in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["demo", "--tp", "3"], 1, "4 query heads can't be shared evenly by them; take a number of ranks that divides 4"),
        (["--preset", "E2B", "--pp", "15"], 1, "14 at most can be cut"),
        (["--preset", "13B"], 1, "known are E2B, E4B, 12B, 26B-A4B, 31B"),
        (["--preset", "E2B", "--device", "tpu"], 1, "expected cpu, cuda, h100"),
        (["--preset", "E2B", "--quant", "q5"], 2, "expected q4_0, mlx4"),
        (["--preset", "E2B", "--kv", "fp8"], 2, "cpu is a CPU; use int8"),
        (["--preset", "E2B", "--kv", "int8", "--device", "h100"], 2, "h100 is a GPU; use fp8"),
        (["--preset", "E2B", "--context", "200000"], 1, "131072 tokens at most"),
        (["demo", "--preset", "E2B"], 2, "give either MODEL or --preset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_is_said(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == code
    assert said in " ".join(capsys.readouterr().err.split())


def test_devices_are_plausible() -> None:
    for device in DEVICES.values():
        figures = (device.memory_bytes, device.bandwidth, device.flops, device.link_bandwidth, device.link_latency_s)
        assert all(figure is None or (math.isfinite(figure) and figure > 0) for figure in figures)
        assert device.place in ("cpu", "cuda")
