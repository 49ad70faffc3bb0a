"""Synthetic checkpoints: all traits of their size are there, transformers and gemcutter agree, nothing is written by halves."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gemcutter
from gemcutter import config as configs
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.write import synth
from gemcutter.checkpoint.write.synth import SIZES, Size, shrink, spell_config, write_checkpoint, write_size
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.model.text import Decoder
from gemcutter.plan import Attn, ModelPlan, Proj, derive

# Parameters of the published decoders: totals of the model cards less the towers.
PUBLISHED = {
    "E2B": 4_628_569_344,
    "E4B": 7_463_013_376,
    "12B": 11_907_350_272,
    "26B-A4B": 25_233_141_760,
    "31B": 30_697_345_280,
}
PROMPT_TOKENS = 150  # more than two windows of any small size

sizes = pytest.mark.parametrize("like", SIZES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write every size once, small."""
    root = tmp_path_factory.mktemp("synth")
    for like in SIZES:
        write_checkpoint(like, root / like)
    return {like: root / like for like in SIZES}


def plan_of(size: Size) -> ModelPlan:
    return derive(configs.read(spell_config(size)))


def traits(plan: ModelPlan) -> set[tuple[Any, ...]]:
    """Describe the kinds of layers that a plan has, apart from their widths."""
    first = plan.layers[0]
    return {
        (
            layer.attn,
            layer.proj,
            layer.heads,
            layer.kv_heads,
            layer.head_dim / first.head_dim,
            layer.mlp_width / first.mlp_width,
            layer.rope.theta,
            layer.rope.pairs / layer.head_dim,
            layer.window is None,
            layer.moe is None,
            layer.ple_dim > 0,
        )
        for layer in plan.layers
    }


@sizes
def test_true_geometry_has_the_published_number_of_parameters(like: str) -> None:
    assert plan_of(SIZES[like]).num_params() == PUBLISHED[like]


@sizes
def test_shrinking_keeps_every_trait(like: str) -> None:
    full, small = plan_of(SIZES[like]), plan_of(shrink(SIZES[like]))
    assert traits(small) == traits(full)
    assert [layer.attn for layer in small.layers] == [layer.attn for layer in full.layers][: len(small.layers)]
    assert (small.softcap, small.bidirectional, small.context) == (full.softcap, full.bidirectional, full.context)
    assert small.num_params() < 10_000_000


@pytest.mark.parametrize("like", ["E2B", "E4B"])
def test_small_readers_have_sources_of_both_kinds_after_other_writers(like: str) -> None:
    plan = plan_of(shrink(SIZES[like]))
    readers = plan.layers[plan.first_reader :]
    assert {(layer.attn, layer.kv_layer) for layer in readers} == {(attn, plan.last_writer(attn)) for attn in Attn}
    assert all(sum(layer.attn is attn for layer in plan.writers) > 1 for attn in Attn)


def test_sizes_differ_where_they_should() -> None:
    small = {like: plan_of(shrink(size)) for like, size in SIZES.items()}
    assert {like for like, plan in small.items() if any(layer.proj is Proj.Q_ONLY for layer in plan.layers)} == {"E2B", "E4B"}
    assert {like for like, plan in small.items() if any(layer.proj is Proj.QK_ONLY for layer in plan.layers)} == {
        "12B",
        "26B-A4B",
        "31B",
    }
    assert {like for like, plan in small.items() if plan.layers[0].moe} == {"26B-A4B"}
    assert {like for like, plan in small.items() if len({layer.mlp_width for layer in plan.layers}) == 2} == {"E2B"}


@sizes
@pytest.mark.parametrize("full", [False, True])
def test_config_is_what_transformers_writes(like: str, full: bool, tmp_path: Path) -> None:
    raw = spell_config(SIZES[like] if full else shrink(SIZES[like]))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again | {"transformers_version": raw["transformers_version"]} == raw


@sizes
@torch.inference_mode()
def test_transformers_computes_the_same_logits(like: str, folders: dict[str, Path]) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folders[like], dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    oracle, report = loaded
    assert not any(report.values()), report
    ids = torch.randint(100, 4096, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0))
    wanted = oracle(input_ids=ids[None], use_cache=False).logits[0]

    checkpoint = open_checkpoint(folders[like])
    assert not checkpoint.matched.notes(checkpoint.plan)
    decoder = Decoder(checkpoint.plan, load_params(checkpoint, torch.float32, torch.device("cpu")))
    engine = Engine(decoder, context=256, max_batched_tokens=64)
    engine.submit(Request(tuple(ids.tolist()), max_tokens=0, hidden_states=True))
    events = [event for _ in range(3) for event in engine.step()]
    assert events[-1].prompt is not None
    found = decoder.logits(torch.cat(events[-1].prompt.hidden_states))

    assert (found - wanted).abs().max() <= 2e-5
    assert 0.5 < wanted.std() < 2  # neither flat nor beyond the bend of the soft cap
    assert len(wanted.argmax(-1).unique()) > PROMPT_TOKENS / 2  # every position has something of its own to say


@pytest.mark.parametrize("like", ["E2B", "12B"])
def test_public_api_loads_it_with_tokenizer_and_template(like: str, folders: dict[str, Path]) -> None:
    model = gemcutter.load(str(folders[like]), context=256)
    answer = model.chat([{"role": "user", "content": "What is a lantern?"}], max_tokens=3, ignore_eos=True)
    assert len(answer.tokens) == 3
    assert model.tokenizer.vocab_size <= model.plan.vocab


def test_same_seed_gives_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    written = write_checkpoint("E2B", tmp_path / "again")
    assert written[-1].name == "config.json"
    assert {path.name for path in written} == {path.name for path in folders["E2B"].iterdir()}
    assert all(path.read_bytes() == (folders["E2B"] / path.name).read_bytes() for path in written)
    write_checkpoint("E2B", tmp_path / "other", seed=1)
    tensors = [Source.open(folder).tensors for folder in (folders["E2B"], tmp_path / "other")]
    assert all(not tensor.torch().equal(tensors[1][name].torch()) for name, tensor in tensors[0].items())


def test_large_tables_take_one_block_of_memory_and_repeat_no_row(tmp_path: Path) -> None:
    tracemalloc.start()
    write_size(replace(shrink(SIZES["12B"]), vocab=262144), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    table = Source.open(tmp_path).tensors["model.embed_tokens.weight"].torch()
    assert table.nbytes > 60e6 > 30e6 > peak
    for row in (0, 8191, 262143):
        assert (table == table[row]).all(1).sum() == 1


def test_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty, it holds notes\.txt; choose another folder"):
        write_checkpoint("E2B", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("inside", ["", "deep/down"])
def test_file_in_the_way_is_named(inside: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file.*choose another"):
        write_checkpoint("E2B", tmp_path / "file" / inside)


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "COPIED", (*synth.COPIED, "absent.json"))
    with pytest.raises(CheckpointError, match=r"absent\.json can't be written"):
        write_checkpoint("E2B", tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_size_and_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no size '27B'; known are E2B, E4B, 12B, 26B-A4B, 31B"):
        write_checkpoint("27B", tmp_path)
    with pytest.raises(ConfigError, match="seed: expected 0 or more, found -1"):
        write_checkpoint("E2B", tmp_path, seed=-1)
    assert not list(tmp_path.iterdir())


def test_geometry_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="writes keys and values"):
        write_size(replace(shrink(SIZES["E2B"]), readers=12), tmp_path)  # no global layer is left to read from
    assert not list(tmp_path.iterdir())
