"""A model whose layers are cut into stages against the same in one process: the same numbers, for every format and trait."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemcutter import native
from gemcutter.benchmark.synthetic import plan_of
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.load.packed_weight_cache import PackedWeightCache
from gemcutter.checkpoint.write.synth import SIZES, write_checkpoint
from gemcutter.engine.request import Request
from gemcutter.errors import ConfigError, KernelError, NumericError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_model
from gemcutter.model.pipeline import Pipeline
from gemcutter.parallel.stages import cut_stages
from gemcutter.plan import ModelPlan
from gemcutter.quant.packing import CpuPacker
from gemcutter.shard import Place
from tests.parallel.test_parity import MODELS, answers, asked_of_one, compare, model, path_of, requests_of
from tests.parallel.test_together import reply_to_drawing, texts
from tests.trained import trained

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

EXACT = 1e-6  # largest difference over largest logit: the same sums, in steps of other rows


@pytest.mark.parametrize("name", MODELS)
def test_two_stages_say_what_one_process_says(name: str) -> None:
    path = path_of(name)
    requests, wanted = asked_of_one(path)
    with model(path, pipeline_parallel=2) as two:
        assert two.plan.stage is not None
        assert two.plan.stage.first > 0
        compare(wanted, answers(two, requests), EXACT)
        compare(wanted, answers(two, requests), EXACT)  # from the prefix cache


@pytest.mark.parametrize("size", SIZES)
def test_every_size_in_every_number_of_stages(size: str, tmp_path: Path) -> None:
    write_checkpoint(size, tmp_path / "model")
    path = str(tmp_path / "model")
    with model(path) as one:
        requests = requests_of(one.plan.vocab)
        wanted, most = answers(one, requests), len(one.plan.stage_starts) + 1
    for stages in {2, most}:
        with model(path, pipeline_parallel=stages) as many:
            assert many.decoder.most_begun == stages
            compare(wanted, answers(many, requests), EXACT)
    with pytest.raises(ConfigError, match=f"{most + 1} pipeline stages: {most} at most can be cut"):
        open_model(LoadOptions(model=path, pipeline_parallel=most + 1))


@pytest.mark.parametrize("name", ["tiny-e", "tiny-a-mlx-4bit"])
def test_stages_whose_layers_are_shared_by_ranks(name: str) -> None:
    path = path_of(name)
    requests, wanted = asked_of_one(path)
    with model(path, 2, pipeline_parallel=2) as four:
        assert four.plan.rank is not None
        assert four.plan.stage is not None
        compare(wanted, answers(four, requests))


@pytest.mark.parametrize(
    "how",
    [
        {"kernels": "reference"},
        {"max_batched_tokens": 16, "max_num_seqs": 3},
        {"max_batched_tokens": 2, "max_num_seqs": 2},
        {"quant": "q4"},
        {"kv": "int8"},
        {"speculate": "ngram"},
        {"context": 400, "max_num_seqs": 8, "prefix_cache_bytes": 0},
    ],
)
def test_ways_to_compute(how: dict[str, object]) -> None:
    requests, wanted = asked_of_one("demo", **how)
    with model("demo", pipeline_parallel=3, **how) as three:
        compare(wanted, answers(three, requests), 5e-3 if how.get("kv") else 2e-5)  # codes may fall to the other side


def test_steps_follow_each_other_through_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps are under way at a time, of one long prompt as of many sequences, and each sequence is in one of them."""
    most, begin = [0], Pipeline.begin

    def count(self: Pipeline, *args: Any) -> Any:
        found = begin(self, *args)
        most[0] = max(most[0], len(self.begun))
        return found

    monkeypatch.setattr(Pipeline, "begin", count)
    with model("demo", pipeline_parallel=3, max_batched_tokens=48, prefix_cache_bytes=0) as three:
        long = Request(tuple(range(5, 605)), max_tokens=1)
        three.loop.complete([long])
        assert most[0] == 3
        most[0] = 0
        three.loop.complete([Request((5, each + 9), max_tokens=12) for each in range(6)])
        assert most[0] == 3
        assert three.engine.scheduler.most_begun == 3


def test_requests_that_come_and_go() -> None:
    """Prompts of which many begin alike, on few pages, some cancelled: the replies of those that end are one process'."""
    draw = random.Random(3)
    beginnings = [tuple(draw.randrange(5, 4000) for _ in range(180)) for _ in range(3)]
    prompts = [(*draw.choice(beginnings)[: draw.randrange(20, 180)], draw.randrange(5, 4000)) for _ in range(24)]
    requests = [Request(prompt, max_tokens=draw.randrange(4, 30), priority=draw.randrange(2)) for prompt in prompts]
    sizes = {"context": 256, "max_num_seqs": 5, "max_batched_tokens": 64}
    with model("demo", **sizes) as one:
        wanted = [[event.token for event in events] for events in one.loop.complete(requests)]
    with model("demo", pipeline_parallel=2, **sizes) as two:
        for _ in range(3):
            others = [two.loop.submit(replace(each, max_tokens=200), lambda event: None) for each in draw.sample(requests, 4)]
            found = two.loop.complete_each(requests, len(requests))
            for place, events in found:
                assert [event.token for event in events] == wanted[place]
                if others and draw.random() < 0.5:
                    two.loop.cancel(others.pop())
            for other in others:
                two.loop.cancel(other)
        assert two.loop.run(lambda engine: len(engine.scheduler.running) + len(engine.scheduler.waiting)) == 0


def test_assistants_and_smaller_models_draft() -> None:
    assistant = str(trained("tiny-e-assistant"))
    with model("demo") as plain:
        wanted = texts(plain)
    tallies = []
    for how in ({}, {"pipeline_parallel": 2}, {"pipeline_parallel": 2, "tensor_parallel": 2}):
        ranks = how.pop("tensor_parallel", 1)
        with model("demo", ranks, draft_model=assistant, draft_tokens=3, **how) as drafting:
            assert texts(drafting) == wanted
            tallies.append(drafting.engine.stats().tally)
    assert tallies[0].accepted > 0
    assert tallies[1].accepted > 0
    with model("demo", draft_model="demo", draft_tokens=3, pipeline_parallel=2) as drafting:
        assert texts(drafting) == wanted


@pytest.mark.parametrize("name", ["tiny-e", "tiny-e-mlx-4bit"])
def test_adapters_merged_apart_and_loaded_while_serving(name: str) -> None:
    path, adapter = path_of(name), str(trained("tiny-e-lora"))
    with model(path, adapter=adapter) as merged, model(path, adapters={"lamp": adapter}) as apart:
        requests = requests_of(merged.plan.vocab)
        wanted_merged, wanted_apart, wanted_plain = answers(merged, requests), texts(apart, "lamp"), texts(apart)
    with model(path, adapter=adapter, pipeline_parallel=2) as two:
        compare(wanted_merged, answers(two, requests))
    with model(path, pipeline_parallel=2) as two:
        two.load_adapter("lamp", adapter)
        assert texts(two, "lamp") == wanted_apart
        two.unload_adapter("lamp")
        two.load_adapter("other", adapter)
        assert texts(two, "other") == wanted_apart
        assert texts(two) == wanted_plain


def test_images(tmp_path: Path) -> None:
    """The tower is the leader's alone; what it makes of an image passes all stages."""
    found = [reply_to_drawing(tmp_path, 4, pipeline_parallel=stages) for stages in (1, 2)]
    assert found[0] == found[1]


def test_values_that_are_not_finite_are_found_on_whatever_stage(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_checkpoint("12B", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    (name,) = (each for each in tensors if each.endswith("layers.0.mlp.down_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with (
        model(str(tmp_path / "model"), pipeline_parallel=2) as two,
        pytest.raises(NumericError, match=r"layers 0 to \d+ on, which are in another stage"),
    ):
        two.loop.complete([Request((5, 6, 7), max_tokens=2)])


# ---- what each place holds ----


@pytest.mark.parametrize("preset", ["E2B", "E4B", "12B", "26B-A4B", "31B"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_hold_every_tensor_once(preset: str, stages: int) -> None:
    plan = plan_of(preset)
    weights = {spec.name: spec.elements for spec in plan.params()}
    cut = cut_stages(plan, weights, stages)
    assert cut[0].start == 0
    assert cut[-1].stop == len(plan.layers)
    parts = [plan.on_stage(layers) for layers in cut]
    names = [spec.name for part in parts for spec in part.params()]
    assert sorted(names) == sorted(weights)
    assert sum(len(part.writers) for part in parts) == len(plan.writers)
    for part in parts:
        assert [group.id for group in part.groups()] == [group.id for group in plan.groups()]
        assert all(layer.kv_layer in range(part.stage.first, part.stage.stop) for layer in part.own_layers if part.stage)
        assert part.all_stages == plan
    tp = [plan.shard(rank, 2).on_stage(cut[0]) for rank in range(2)]
    assert [one.rank.rank for one in tp if one.rank] == [0, 1]
    assert {spec.name for spec in tp[0].params()} == {spec.name for spec in parts[0].params()}
    assert tp[0].all_stages == plan.shard(0, 2)


def test_no_cut_parts_a_reader_from_its_source(e2b: ModelPlan) -> None:
    assert e2b.stage_starts == tuple(range(1, 14))
    with pytest.raises(ConfigError, match="layers 20 to 34 can't be a stage"):
        e2b.on_stage(range(20, 35))


@pytest.fixture
def e2b() -> ModelPlan:
    return plan_of("E2B")


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (1, 5), (2, 3), (4, 2)])
def test_places_make_a_ring_from_the_first_stage_to_the_leader(tensor: int, pipeline: int) -> None:
    for rank in range(tensor):
        at, seen = Place(rank, tensor, pipeline), list[int]()
        assert at.stage == pipeline - 1
        for _ in range(pipeline):
            following = Place(at.next, tensor, pipeline)
            assert following.previous == at.number
            assert following.shard.rank == rank
            seen.append(following.stage)
            at = following
        assert seen == list(range(pipeline))
        assert at.number == rank


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_a_process_starts() -> None:
    with pytest.raises(KernelError, match="torch finds no CUDA device here; use the device cpu"):
        open_model(LoadOptions(model="demo", device="cuda", pipeline_parallel=2))


def test_each_stage_reads_and_keeps_its_own_layers(tmp_path: Path) -> None:
    """The files of repacked weights of both stages have other names, and other tensors."""
    checkpoint = open_checkpoint(Path(path_of("tiny-a-Q4_0.gguf")))
    plan = checkpoint.plan
    cut = cut_stages(plan, {spec.name: spec.elements for spec in plan.params()}, 2)
    both = [replace(checkpoint, plan=plan.on_stage(layers)) for layers in cut]
    files = [PackedWeightCache.of(each, folder=tmp_path) for each in (checkpoint, *both)]
    assert len({file.path for file in files}) == 3
    assert len({str(file.key) for file in files}) == 3
    held = [
        load_params(each, torch.float32, torch.device("cpu"), packer=CpuPacker(), cache=file)
        for each, file in zip(both, files[1:], strict=True)
    ]
    assert not held[0].keys() & held[1].keys()
    assert held[0].keys() | held[1].keys() == {spec.name for spec in plan.params()}
