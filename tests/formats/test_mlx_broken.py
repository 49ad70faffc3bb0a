"""MLX checkpoints that contradict their config or themselves: every module that does not fit is named in one error.

Read `test_mlx.py` for what loads, `formats/mlx.py` for the rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import mlx
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.write.synth import write_size
from gemcutter.errors import CheckpointError
from tests.mlx_files import Recipe, affine, convert, micro, schemes, small


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Write the two sizes that have all traits between them."""
    folder = tmp_path_factory.mktemp("sizes")
    for like in ("E2B", "26B-A4B"):
        write_size(small(like), folder / like)
    return {like: folder / like for like in ("E2B", "26B-A4B")}


# ---- what the config says ----


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_overrides_are_checked_against_what_is_stored(key: str, sizes: Mapping[str, Path], tmp_path: Path) -> None:
    """A field that is left out says nothing: mlx-lm writes routers of mxfp4 models without their mode."""
    claims = {
        "model.embed_tokens": {"bits": 8, "group_size": 32},
        "model.layers.0.mlp.up_proj": False,
        "layers.1.mlp.up_proj": {"bits": 2},
        "model.layers.2.mlp.up_proj": {"group_size": 32, "bits": 4, "mode": "affine"},
        "model.layers.3.mlp.up_proj": True,
    }
    kinds = {"embed_tokens": affine(8, 32), "layers.0.mlp.up_proj": None, "layers.1.mlp.up_proj": affine(2, 64)}
    packed, _ = convert(
        sizes["E2B"],
        tmp_path,
        lambda own: kinds.get(own, affine(4, 32)),
        **{key: {"mode": "mxfp4", "bits": 4, "group_size": 32} | claims},
    )
    found = schemes(open_checkpoint(packed))
    assert found["embed.tokens"] == "affine8g32"
    assert found["layers.0.mlp.in"] == found["layers.1.mlp.in"] == "mixed"
    raw = json.loads((packed / "config.json").read_text())
    raw[key] |= {
        "model.embed_tokens": {"bits": 4, "group_size": 32},
        "model.layers.0.mlp.up_proj": {"bits": 4},
        "model.layers.1.mlp.up_proj": False,
        "layers.1.mlp.up_proj": False,
        "model.layers.2.mlp.up_proj": {"group_size": "32", "bits": 4, "mode": "mxfp4"},
        "model.layers.3.mlp.up_proj": 4,
        "model.layers.4.self_attn.v_proj": {"bits": True, "group_size": None},  # null says nothing
    }
    (packed / "config.json").write_text(json.dumps(raw))
    assert_refused(
        packed,
        "embed.tokens: model.safetensors:model.embed_tokens.weight: config.json has it in bits 4, the stored",
        "layers.0.mlp.in[up]: model.safetensors:model.layers.0.mlp.up_proj.weight: config.json has it quantized, and it is not",
        "layers.1.mlp.in[up]: model.safetensors:model.layers.1.mlp.up_proj.weight: config.json has it not quantized, and it is",
        "safetensors:model.layers.2.mlp.up_proj.weight: config.json has it in group_size '32', mode '",
        "an object or false expected in quantization, found 4",
        "layers.4.attn.in[v]: model.safetensors:model.layers.4.self_attn.v_proj.weight: config.json has it in bits True",
    )


def test_a_mode_that_mlx_does_not_have_is_refused(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    claims = {"bits": 4, "group_size": 32, "mode": "nf4", "a": {"mode": ["mxfp4"]}, "b": {"mode": "affine"}}
    packed, _ = convert(sizes["E2B"], tmp_path, lambda own: affine(4, 32), quantization=claims)
    assert_refused(packed, "quantization.mode: expected one of affine, mxfp4", "quantization['a'].mode: expected one of affine")


def test_quantized_files_of_other_kinds_are_not_taken_for_mlx(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    """AWQ and GPTQ have scales, too."""
    tensors = load_file(sizes["E2B"] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors |= {f"{name}.qweight": torch.zeros(8, 64, dtype=torch.int32), f"{name}.scales": torch.zeros(2, 64)}
    del tensors[f"{name}.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    raw = json.loads((sizes["E2B"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "awq"}}))
    assert not mlx.sniff(Source.open(tmp_path))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


# ---- what does not fit ----


def assert_refused(folder: Path, *fragments: str) -> None:
    """Check that a checkpoint is refused for exactly as many reasons, each of which some problem names."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    problems = caught.value.problems
    for fragment in fragments:
        assert sum(fragment in problem for problem in problems) == 1, (fragment, problems)
    assert len(problems) == len(fragments), problems


AFFINE = affine(4, 32)


@dataclass(frozen=True, slots=True)
class Broken:
    """A module of the decoder in which some arrays are replaced, or left out where the new one is None."""

    own: str
    arrays: Mapping[str, Tensor | None]
    complaint: str
    recipe: Recipe = AFFINE


def words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint32)


def octets(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


BROKEN = [  # every module is [128, 64] or wider: 8 words and 2 groups a row
    Broken("layers.0.mlp.gate_proj", {"scales": None}, "no scales beside weight and biases"),
    Broken("layers.0.mlp.up_proj", {"weight": None}, "no weight beside scales"),
    Broken("layers.0.mlp.down_proj", {"biases": None}, "biases: missing beside weight and scales"),
    Broken("layers.1.mlp.gate_proj", {"scales": None, "biases": None}, "no scales beside weight"),
    Broken("layers.1.mlp.up_proj", {"weight": words(128, 14)}, "14 words of 32 bits do not hold 64 columns of 1, 2, 3"),
    Broken("layers.1.mlp.down_proj", {"weight": words(64, 0)}, "0 words of 32 bits do not hold 128 columns"),
    Broken("layers.2.mlp.gate_proj", {"weight": words(128, 7)}, "7 words of 32 bits do not hold 64 columns"),
    Broken("layers.2.mlp.up_proj", {"scales": torch.zeros(128, 3)}, "scales: 3 groups do not divide 64 columns"),
    Broken("layers.2.mlp.down_proj", {"scales": torch.zeros(64, 0)}, "scales: 0 groups do not divide 128 columns"),
    Broken("layers.3.mlp.gate_proj", {"scales": torch.zeros(2, 128)}, "expected, found [128, 8] and [2, 128]"),
    Broken("layers.3.mlp.up_proj", {"scales": torch.zeros(())}, "expected, found [128, 8] and []"),
    Broken("layers.3.mlp.down_proj", {"weight": words(), "scales": torch.zeros(())}, "expected, found [] and []"),
    Broken("layers.4.mlp.gate_proj", {"biases": torch.zeros(128, 1)}, "[128, 2] like the scales expected, found F32"),
    Broken("layers.4.mlp.up_proj", {"biases": octets(128, 2)}, "like the scales expected, found U8 [128, 2]"),
    Broken("layers.4.mlp.down_proj", {"weight": torch.zeros(64, 16)}, "weight: U32 expected, found F32"),
    Broken("layers.5.mlp.gate_proj", {"scales": torch.zeros(128, 2, dtype=torch.int32)}, "U8 expected, found I32"),
    Broken("layers.5.mlp.up_proj", {"scales": octets(128, 1)}, "fit none of mxfp4 (4 bits, groups of 32)", micro("mxfp4")),
    Broken("layers.5.mlp.down_proj", {"biases": torch.zeros(64, 4)}, "biases: mxfp4 has none", micro("mxfp4")),
    Broken("layers.6.mlp.gate_proj", {"weight": words(128, 12)}, "12 words and 2 scale bytes", micro("mxfp4")),
    Broken("layers.6.mlp.up_proj", {"global_scale": torch.zeros(1)}, "only nvfp4 has one, and this is mxfp8", micro("mxfp8")),
    Broken("layers.6.mlp.down_proj", {"global_scale": torch.zeros(1)}, "only nvfp4 has one, and this is affine"),
    Broken("layers.7.mlp.gate_proj", {"global_scale": torch.zeros(2)}, "one F32 number", micro("nvfp4")),
    Broken("layers.7.mlp.up_proj", {"global_scale": octets(1)}, "one F32 number", micro("nvfp4")),
    Broken("layers.7.mlp.down_proj", {"weight": words(64, 17), "scales": torch.zeros(64, 3)}, "128 columns; weight: 17 words"),
    Broken("layers.8.input_layernorm", {"weight": words(64)}, "no scales beside weight"),
    Broken("layers.8.post_attention_layernorm", {"scales": torch.ones(64)}, "[rows, ...]"),
]  # fmt: skip


def test_all_that_is_broken_is_told_at_once(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    recipes = {each.own: each.recipe for each in BROKEN}
    packed, _ = convert(sizes["E2B"], tmp_path, lambda own: recipes.get(own, affine(4, 32)))
    tensors = load_file(packed / "model.safetensors")
    for each in BROKEN:
        for ending, array in each.arrays.items():
            tensors.pop(f"model.{each.own}.{ending}", None)
            if array is not None:
                tensors[f"model.{each.own}.{ending}"] = array
    tensors |= {"model.layers.9.self_attn.z_proj.scales": torch.zeros(1), "model.layers.99.mlp.up_proj.weight": words(1, 1)}
    for ending in ("weight", "scales", "biases"):
        tensors[f"model.layers.9.mlp.up_proj.{ending}"] = tensors[f"model.layers.9.mlp.up_proj.{ending}"][:-1].clone()
        tensors[f"language_model.layers.9.self_attn.k_proj.{ending}"] = tensors[
            f"model.layers.9.self_attn.k_proj.{ending}"
        ].clone()
        del tensors[f"model.layers.9.mlp.down_proj.{ending}"]
    save_file(tensors, packed / "model.safetensors", {"format": "mlx"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(packed)
    problems = list(caught.value.problems)
    for each in BROKEN:
        found = [problem for problem in problems if f"model.{each.own}." in problem]
        assert len(found) == 1, (each, found)
        assert found[0].startswith("packing    layers.")
        assert each.complaint in found[0], found
        problems.remove(found[0])
    rest = ["duplicate  layers.9.attn.in[k]", "missing    layers.9.mlp.out", "shape      layers.9.mlp.in[up] (128, 64) expected"]
    rest += ["unknown    model.safetensors:model.layers.9.self_attn.z_proj", "unknown    model.safetensors:model.layers.99.mlp"]
    assert len(problems) == len(rest)
    for start, problem in zip(sorted(rest), problems, strict=True):
        assert problem.startswith(start), problem


def test_absurd_layer_numbers_are_unknown(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    names = [f"model.layers.{number}.experts.switch_glu.up_proj.weight" for number in ("9" * 5000, "٣")]
    packed, _ = convert(sizes["26B-A4B"], tmp_path, lambda own: affine(4, 32), extra={name: words(1, 1, 1) for name in names})
    assert_refused(packed, f"unknown    model.safetensors:{names[0]}", f"unknown    model.safetensors:{names[1]}")
