"""Synthetic assistants: the released configs, key for key; each loads in transformers and drafts for the target of its size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gemcutter
from gemcutter import config as configs
from gemcutter import native
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.write.synth import SIZES, shrink, spell_config, write_checkpoint
from gemcutter.checkpoint.write.synth_assistant import (
    ASSISTANTS,
    AssistantSize,
    find_assistant,
    shrink_assistant,
    spell_assistant,
    write_assistant,
)
from gemcutter.cli import main
from gemcutter.errors import ConfigError
from gemcutter.plan import derive
from tests.trained import GOLDENS

# Parameters of the published assistants; the config of 12B's was derived from its number, 423 M.
PUBLISHED = {"E2B": 77_731_328, "E4B": 78_517_760, "12B": 422_856_960, "26B-A4B": 419_711_232, "31B": 469_518_592}
EXACT = "reference" if native.missing() else "auto"  # kernels whose rows never depend on their neighbours

sizes = pytest.mark.parametrize("like", SIZES)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Write a target and an assistant of every size once, small."""
    root = tmp_path_factory.mktemp("pairs")
    for like in SIZES:
        write_checkpoint(like, root / like, seed=3)
        write_assistant(like, root / f"{like}-assistant", seed=3)
    return {like: (root / like, root / f"{like}-assistant") for like in SIZES}


@sizes
def test_the_true_geometry_is_the_published_one(like: str) -> None:
    published = json.loads((GOLDENS / "configs" / f"gemma-4-{like}-it-assistant.json").read_text())
    found = spell_assistant(ASSISTANTS[like], SIZES[like])
    found["text_config"] |= {"eos_token_id": published["text_config"]["eos_token_id"]}  # the demo has one more
    assert found == published
    target = derive(configs.read(spell_config(SIZES[like])))
    assert derive(configs.read(found), target).num_params() == PUBLISHED[like]


@sizes
def test_small_ones_keep_their_traits_and_fit_small_targets(like: str) -> None:
    full, small = (
        derive(configs.read(spell_assistant(own, target)), derive(configs.read(spell_config(target))))
        for own, target in ((ASSISTANTS[like], SIZES[like]), (shrink_assistant(ASSISTANTS[like]), shrink(SIZES[like])))
    )
    assert [(layer.attn, layer.heads, layer.kv_heads) for layer in small.layers] == [
        (layer.attn, layer.heads, layer.kv_heads) for layer in full.layers
    ]
    assert (small.centroids > 0, small.centroid_top_k) == (full.centroids > 0, full.centroid_top_k)
    assert small.centroids == 0 or small.centroid_top_k < small.centroids < small.vocab
    assert small.num_params() < 2_000_000


@sizes
def test_transformers_loads_every_tensor(like: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    folder = pairs[like][1]
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    stored = Source.open(folder).tensors
    assert len(stored) == (50 if ASSISTANTS[like].centroids else 48)  # as many as the released files have
    for name, value in model.state_dict().items():
        if name in stored:
            assert torch.equal(value.float(), stored[name].torch().float()), name
    if model.masked_embedding is not None:
        order = model.masked_embedding.token_ordering
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(len(order)))
        assert not torch.equal(order, torch.arange(len(order)))
    assert model.config.backbone_hidden_size == AutoConfig.from_pretrained(pairs[like][0]).hidden_size


@sizes
def test_replies_with_it_are_those_without(like: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    """Noise guesses noise, so that hardly a draft is right; every reply goes past the window of the small target."""
    target, assistant = (str(folder) for folder in pairs[like])
    asked: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}
    loaded: dict[str, Any] = {"dtype": "float32", "kernels": EXACT, "context": 256}
    with gemcutter.load(target, **loaded) as model:
        wanted = model.chat("What is a lantern?", **asked)
    with gemcutter.load(target, draft_model=assistant, speculate="mtp", draft_tokens=3, **loaded) as model:
        found = model.chat("What is a lantern?", **asked)
    assert found.tokens == wanted.tokens
    assert found.metrics.drafted_tokens > 30
    assert found.metrics.accepted_tokens < 20


@sizes
def test_inspect_and_doctor_pass_it(like: str, pairs: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(pairs[like][1])
    assert main(["inspect", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_drafter"]
    assert [layer["projection"] for layer in found["layers"]] == ["q"] * 4
    assert main(["doctor", folder, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["problems"]
    assert not report["remarks"]
    assert {"loads"} == {each["verdict"] for each in report["verdicts"] if each["engine"] == "gemcutter"}


@sizes
@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_a_way_round_through_other_formats_changes_no_byte(
    like: str, to: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    other = tmp_path / ("other.gguf" if to == "gguf" else "other")
    convert(pairs[like][1], other, to, "none")
    assert open_checkpoint(other).plan == open_checkpoint(pairs[like][1]).plan
    convert(other, tmp_path / "back", "hf", "none")
    first, last = (Source.open(folder).tensors for folder in (pairs[like][1], tmp_path / "back"))
    assert first.keys() == last.keys()
    assert all(torch.equal(tensor.torch(), last[name].torch()) for name, tensor in first.items())


def test_seeds_decide_the_bytes(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    written = write_assistant("E2B", tmp_path / "again", seed=3)
    assert {path.name for path in written} == {path.name for path in pairs["E2B"][1].iterdir()}
    assert all(path.read_bytes() == (pairs["E2B"][1] / path.name).read_bytes() for path in written)
    write_assistant("E2B", tmp_path / "other", seed=4)
    tensors = [Source.open(folder).tensors for folder in (pairs["E2B"][1], tmp_path / "other")]
    assert all(not tensor.torch().equal(tensors[1][name].torch()) for name, tensor in tensors[0].items())


def test_the_command_writes_one_of_either_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--like", "e2b-Assistant", str(tmp_path / "a")]) == 0
    assert "gemcutter inspect" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "a").plan.is_drafter
    assert main(["tiny", "--like", "9B-assistant", str(tmp_path / "b")]) == 2
    assert "or one of these with -assistant behind it" in capsys.readouterr().err


def test_names_of_sizes_and_assistants_are_told_apart() -> None:
    assert [find_assistant(name) for name in ("26b-assistant", "E4B-ASSISTANT", "E2B")] == ["26B-A4B", "E4B", None]
    with pytest.raises(ConfigError, match="there is no size '9b'"):
        find_assistant("9B-assistant")


def test_centroids_that_leave_tokens_over_are_refused() -> None:
    with pytest.raises(ConfigError, match="100 do not divide a vocabulary of 262144 evenly"):
        spell_assistant(AssistantSize(64, 64, heads=4, centroids=100), SIZES["E2B"])
