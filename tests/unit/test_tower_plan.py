"""The towers' plans, against published parameter counts, transformers' modules and a stored release's names and shapes.

No count is taken from the plan's own sizes. Read `test_config.py` for the decoder's keys, which stay readable beside any tower.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gemcutter import config
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.errors import ConfigError
from gemcutter.param_spec import ParamKind
from gemcutter.plan import derive
from gemcutter.tower_plan import AudioPlan, TowerPlans, UnifiedVisionPlan, VisionPlan, derive_towers

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
Raw = dict[str, Any]
Shapes = dict[tuple[str, str | None], tuple[int, ...]]

# Tower and projector of vision, of audio; the 12B's published counts are sums of both.
COUNTS: dict[str, tuple[tuple[int, int] | None, tuple[int, int] | None]] = {
    "E2B": ((167_364_608, 1_179_648), (304_824_608, 2_359_296)),
    "E4B": ((167_364_608, 1_966_080), (304_824_608, 3_932_160)),
    "12B": ((49_922_304 - 3840 * 3840, 3840 * 3840), (0, 2_457_600)),
    "26B-A4B": ((569_548_080, 3_244_032), None),
    "31B": ((569_548_080, 6_193_152), None),
}
# Of the whole model; the decoder's share is test_plan.py's, and both must add up.
TOTALS = {
    "E2B": 5_104_297_504,
    "E4B": 7_941_100_832,
    "12B": 11_959_730_176,
    "26B-A4B": 25_805_933_872,
    "31B": 31_273_086_512,
}


def load(size: str) -> Raw:
    raw: Raw = json.loads((GOLDENS / "configs" / f"gemma-4-{size}-it.json").read_text(encoding="utf-8"))
    return raw


def towers_of(raw: Raw) -> TowerPlans:
    return derive_towers(config.read(raw))


def planned(plans: TowerPlans) -> Shapes:
    """List what a checkpoint stores of the towers: tensors, or parts of them, with their shapes."""
    found: Shapes = {}
    for spec in plans.params():
        for part, rows in spec.parts or ((None, 0),):
            found[spec.name, part] = spec.shape if part is None else (rows, *spec.shape[1:])
    return found


def translated(stored: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Name stored tensors canonically; all names must be known and differ."""
    found: Shapes = {}
    for name, shape in stored.items():
        canonical = hf_towers.translate(hf.strip(name))
        assert canonical is not None, name
        assert canonical not in found, name
        found[canonical] = tuple(shape)
    return found


def is_tower(name: str) -> bool:
    return hf.strip(name).startswith(tuple(hf.TOWER_PREFIXES))


def modules_of(raw: Raw) -> dict[str, tuple[int, ...]]:
    """List the tensors of transformers' towers, without allocating any."""
    kind = "".join(part.capitalize() for part in raw["model_type"].split("_"))
    oracle = getattr(transformers, f"{kind}Config").from_dict(copy.deepcopy(raw))
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(oracle)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if is_tower(name)}


@pytest.mark.parametrize("size", COUNTS)
def test_counts_are_the_published_ones(size: str) -> None:
    plans = towers_of(load(size))
    found = tuple(
        plan and (plan.num_params() - plan.projector.elements, plan.projector.elements) for plan in (plans.vision, plans.audio)
    )
    assert found == COUNTS[size]
    assert derive(config.read(load(size))).num_params() + plans.num_params() == TOTALS[size]


@pytest.mark.parametrize("size", COUNTS)
def test_tensors_are_those_of_transformers(size: str) -> None:
    assert planned(towers_of(load(size))) == translated(modules_of(load(size)))


def test_tensors_are_those_of_a_stored_release() -> None:
    raw = json.loads((GOLDENS / "tiny-e-release-config.json").read_text())
    sources = [Source.open(GOLDENS / f"tiny-e-release-{name}.safetensors") for name in ("extra", "audio")]
    stored = {name: tensor.shape for source in sources for name, tensor in source.tensors.items() if is_tower(name)}
    assert planned(towers_of(raw)) == translated(stored)
    assert len(stored) == 155 + 62


def test_published_names_of_the_12b_are_read() -> None:
    inside = modules_of(load("12B"))
    published = {
        name.replace("multimodal_embedder.", "")
        if "multimodal_embedder" in name
        else name.replace("embed_vision.p", "vision_embedder.p"): shape
        for name, shape in inside.items()
    }
    assert published.keys() != inside.keys()
    assert translated(published) == translated(inside)


@pytest.mark.parametrize(
    "name", ["vision_tower.encoder.layers.0.mlp.foo.linear.weight", "audio_tower.layers.x.norm_out.weight", "embed_audio.norm"]
)
def test_unknown_names_stay_unknown(name: str) -> None:
    assert hf_towers.translate(name) is None


def test_every_rank_holds_towers_whole_and_names_are_unique() -> None:
    for size in COUNTS:
        specs = list(towers_of(load(size)).params())
        assert {spec.shard_axis for spec in specs} == {None}
        assert len({spec.name for spec in specs}) == len(specs)


@pytest.mark.parametrize(("size", "bounds"), [("E2B", 928), ("31B", 0)])  # 4 of 112 linears of vision, 120 of audio
def test_clip_bounds_default_to_no_clipping(size: str, bounds: int) -> None:
    scalars = [spec for spec in towers_of(load(size)).params() if spec.kind is ParamKind.SCALAR]
    assert len(scalars) == bounds
    for spec in scalars:
        assert spec.buffer
        assert spec.default == (-math.inf if spec.name.endswith("_min") else math.inf)


def test_facts_that_decide_modules() -> None:
    small, large, unified = (towers_of(load(size)) for size in ("E2B", "26B-A4B", "12B"))
    assert isinstance(small.vision, VisionPlan)
    assert isinstance(large.vision, VisionPlan)
    assert isinstance(small.audio, AudioPlan)
    assert isinstance(unified.vision, UnifiedVisionPlan)
    assert (small.vision.patch_values, small.vision.soft_token_pixels, small.vision.soft_tokens) == (768, 48, 280)
    assert (small.vision.clipped, small.vision.standardized) == (True, False)
    assert (large.vision.clipped, large.vision.standardized) == (False, True)
    assert (large.vision.num_layers, large.vision.hidden, large.vision.heads, large.vision.head_dim) == (27, 1152, 16, 72)
    assert (small.audio.past, small.audio.relative_positions, small.audio.context) == (12, 13, 24)
    assert (small.audio.conv_values, small.audio.head_dim, small.audio.ff_width) == (1024, 128, 4096)
    assert (unified.vision.patch_values, unified.vision.layer_norm_eps, unified.vision.eps) == (6912, 1e-5, 1e-6)
    assert (small.vision.out, large.vision.out, unified.vision.out) == (1536, 2816, 3840)


@pytest.mark.parametrize("size", ["E2B", "12B"])
@pytest.mark.parametrize("absent", ["gone", "null"])
def test_absent_and_null_keys_mean_what_transformers_means(size: str, absent: str) -> None:
    raw = load(size)
    for tower in ("vision_config", "audio_config"):
        keys = set(raw[tower]) - {"model_type"}
        raw[tower] = {"model_type": raw[tower]["model_type"]} | (dict.fromkeys(keys) if absent == "null" else {})
    expected = load(size)
    if size == "E2B":
        expected["vision_config"]["use_clipped_linears"] = False
    assert towers_of(raw) == towers_of(expected)


@pytest.mark.parametrize("write", ["to_dict", "to_diff_dict"])
@pytest.mark.parametrize("size", COUNTS)
def test_keys_that_transformers_writes_are_read(size: str, write: str) -> None:
    raw = load(size)
    kind = "".join(part.capitalize() for part in raw["model_type"].split("_")) + "Config"
    saved = json.loads(json.dumps(getattr(getattr(transformers, kind).from_dict(load(size)), write)()))
    assert towers_of(saved) == towers_of(raw)


# Every line: a size, where in its config, what it is set to, and what the one problem must say beside the key.
SPOILS: list[tuple[str, str, Any, str]] = [
    *[
        ("E2B", "vision_config.hidden_size", bad, f"expected an integer from 1 to 2147483648, found {bad!r}")
        for bad in (0, "768")
    ],
    ("E2B", "vision_config.num_hidden_layers", 10**9, "expected an integer from 1 to 4096"),
    ("E2B", "vision_config.head_dim", 66, "expected a multiple of 4"),
    ("E2B", "vision_config.num_key_value_heads", 5, "expected a divisor of num_attention_heads 12, found 5"),
    ("E2B", "vision_config.global_head_dim", 72, "expected 64, which is head_dim, found 72"),
    ("E2B", "vision_config.attention_bias", True, "expected false, found true"),
    ("E2B", "vision_config.hidden_activation", "relu", "expected one of gelu_pytorch_tanh, found 'relu'"),
    ("E2B", "vision_config.rope_parameters", {"rope_type": "yarn"}, "expected one of default, axial, found 'yarn'"),
    ("E2B", "vision_config.model_type", "siglip_vision_model", "expected one of gemma4_vision"),
    ("E2B", "vision_config.mixture", 3, "unknown key (3)"),
    ("E2B", "audio_config.hidden_act", "gelu", "expected one of silu, found 'gelu'"),
    ("E2B", "audio_config.num_attention_heads", 7, "expected a divisor of hidden_size 1024, found 7"),
    ("E2B", "audio_config.attention_context_left", 0, "expected an integer from 1"),
    *[("E2B", "audio_config.subsampling_conv_channels", bad, "expected two integers") for bad in (32, [1], [1, True], [0, 3])],
    ("12B", "vision_config.model_patch_size", 32, "expected 48, which is patch_size x pooling_kernel_size, found 32"),
    ("12B", "vision_config.output_proj_dims", 640, "expected 3840, which is mm_embed_dim, found 640"),
    ("12B", "audio_config.hidden_size", 320, "expected 640, which is audio_embed_dim, found 320"),
]


@pytest.mark.parametrize(("size", "path", "bad", "text"), SPOILS, ids=lambda value: str(value)[:40])
def test_a_bad_key_is_the_one_problem_and_the_decoder_loads(size: str, path: str, bad: Any, text: str) -> None:
    raw, (tower, key) = load(size), path.split(".")
    raw[tower][key] = bad
    found = config.read(raw)
    assert derive(found) == derive(config.read(load(size)))
    with pytest.raises(ConfigError, match=r"load the text decoder alone") as caught:
        derive_towers(found)
    (problem,) = caught.value.problems
    assert problem.startswith(path)
    assert text in problem


def test_problems_of_both_towers_come_at_once_and_patterns_pass_unknown_keys() -> None:
    raw = load("E2B")
    raw["vision_config"] |= {"patch_size": 0, "x": 1}
    raw["audio_config"]["rms_norm_eps"] = -1
    with pytest.raises(ConfigError) as caught:
        derive_towers(config.read(raw, ignore=("x",)))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "vision_config.patch_size",
        "audio_config.rms_norm_eps",
    ]


def test_models_without_towers_and_towers_of_another_family() -> None:
    raw = load("E2B")
    assert towers_of(raw["text_config"]) == TowerPlans()
    assert list(towers_of(raw | {"vision_config": None, "audio_config": None}).params()) == []
    gemma3 = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {"hidden_size": 1152}}
    with pytest.raises(ConfigError, match="towers of Gemma 3 are not supported"):
        derive_towers(config.read(gemma3))
