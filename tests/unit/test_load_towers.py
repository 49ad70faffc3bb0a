"""Towers are matched as strictly as the decoder, and only where they are asked for: else none of their bytes is read.

Owns release names and `save_pretrained`'s, written from random wrappers. Read `test_load.py` for the decoder's own loading,
`parity/test_vision.py` and `parity/test_audio_tower.py` for what the towers compute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.errors import CheckpointError, ConfigError, RequestError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_model
from tests.topologies import TOLERANCE, relative_error
from tests.wrappers import (
    AUDIO,
    VISION,
    audio_plan,
    build_wrapper,
    cut_drawings,
    cut_tones,
    official_rows,
    official_sound_rows,
    vision_plan,
)

UNEQUAL = [(60, 90, 70), (30, 300, 70)]
LENGTHS = [7000, 16000]  # samples
MODELS = {size: build_wrapper(size, hears=size in AUDIO) for size in VISION}
PUBLISHED = {  # of the 12B, whose names inside transformers are others
    "model.embed_vision.multimodal_embedder.": "model.embed_vision.",
    "model.embed_vision.p": "model.vision_embedder.p",
}


def published(name: str) -> str:
    for inside, outside in PUBLISHED.items():
        if name.startswith(inside):
            return name.replace(inside, outside, 1)
    return name


def save(folder: Path, size: str, change: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> Path:
    """Write a wrapper with its config, its tensors changed."""
    folder.mkdir()
    model = MODELS[size]
    (folder / "config.json").write_text(model.config.to_json_string())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def options(folder: Path, *media: str) -> LoadOptions:
    return LoadOptions(model=str(folder), dtype="float32", media=media or ("image",))


@pytest.mark.parametrize("size", VISION)
def test_saved_towers_compute_what_transformers_does(size: str, tmp_path: Path) -> None:
    model, media = MODELS[size], ("image", "audio") if size in AUDIO else ("image",)
    images = cut_drawings(model, UNEQUAL)
    sounds = cut_tones(model, LENGTHS) if size in AUDIO else []
    wanted = [*official_rows(model, images), *(official_sound_rows(model, sounds) if sounds else [])]

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if size == "12B":
                tensors[published(name)] = tensors.pop(name)
        tensors["model.embed_vision.embedding.weight"] = torch.ones(3, 3)  # of an older design

    folders = (save(tmp_path / "inside", size), save(tmp_path / "published", size, rename), tmp_path / "official")
    model.save_pretrained(folders[-1])
    for folder in folders:
        opened = open_model(options(folder, *media))
        assert opened.vision is not None
        assert (opened.audio is not None) == (size in AUDIO)
        found = [*opened.vision.encode(images), *(opened.audio.encode(sounds) if opened.audio is not None else [])]
        for each, other in zip(found, wanted, strict=True):
            assert relative_error(each, other) < TOLERANCE


def test_only_the_towers_that_are_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = set[str](), LazyTensor.torch

    def torch_of(self: LazyTensor) -> Tensor:
        read.add(self.name)
        return original(self)

    monkeypatch.setattr(LazyTensor, "torch", torch_of)
    folder = save(tmp_path / "model", "E2B")
    kinds = {name: hf.tower_kind(hf.strip(name)) for name in load_file(folder / "model.safetensors")}
    asked: dict[str, tuple[str, ...]] = {"image": ("(vision tower)",), "audio": ("(audio tower)",), "": ()}
    asked["image,audio"] = (*asked["image"], *asked["audio"])
    for media, wanted in asked.items():
        read.clear()
        opened = open_model(LoadOptions(model=str(folder), media=tuple(filter(None, media.split(",")))))
        assert (opened.vision is not None, opened.audio is not None) == ("image" in media, "audio" in media)
        for kind in ("(vision tower)", "(audio tower)"):
            stored = {name for name, each in kinds.items() if each == kind}
            assert stored
            assert read & stored == (stored if kind in wanted else set())
        assert read
        notes = " ".join(opened.checkpoint.notes(loaded=tuple(kind.strip("()") for kind in wanted)))
        assert ("vision tower not loaded" in notes, "audio tower not loaded" in notes) == (
            "image" not in media,
            "audio" not in media,
        )


def test_what_does_not_fit_is_one_error_with_the_files_own_names(tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        layer = "model.vision_tower.encoder.layers."
        del tensors[f"{layer}0.self_attn.q_proj.linear.weight"]
        del tensors[f"{layer}1.mlp.down_proj.input_max"]
        tensors[f"{layer}2.self_attn.q_norm.weight"] = torch.ones(7)
        tensors[f"{layer}1.self_attn.o_proj.weight"] = torch.ones(2, 2)
        tensors["model.embed_vision.embedding_projection.weight"] = torch.ones(4, 4, dtype=torch.long)[:, :2].contiguous()

    with pytest.raises(CheckpointError) as raised:
        open_model(options(save(tmp_path / "model", "E2B", damage)))
    text = "\n".join(raised.value.problems)
    assert "the vision tower does not match the plan (5 problems, nothing was allocated)" in str(raised.value)
    for expected in (
        r"missing    vision.layers.0.attn.in\[q\] \(32, 32\): model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
        r"missing    vision.layers.1.mlp.out.input_max \(\): other layers have one",
        r"shape      vision.layers.2.attn.q_norm \(16,\) expected, .* has \(7,\)",
        r"unknown    .*o_proj.weight: not part of this model; --ignore",
        r"shape      vision.out \(48, 32\) expected",
    ):
        assert re.search(expected, text), text


def test_what_does_not_fit_of_an_audio_tower_is_one_error_too(tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.audio_tower.layers.0.lconv1d.depthwise_conv1d.weight"]
        del tensors["model.audio_tower.layers.1.self_attn.k_proj.output_max"]
        tensors["model.audio_tower.subsample_conv_projection.layer0.conv.weight"] = torch.ones(128, 1, 3, 2)
        tensors["model.audio_tower.output_proj.scale"] = torch.ones(2)

    folder = save(tmp_path / "model", "E2B", damage)
    with pytest.raises(CheckpointError) as raised:
        open_model(options(folder, "audio"))
    assert "the audio tower does not match the plan (4 problems, nothing was allocated)" in str(raised.value)
    text = "\n".join(raised.value.problems)
    for expected in (
        r"missing    audio.layers.0.conv.depthwise .*: model.audio_tower.layers.0.lconv1d.depthwise_conv1d.weight",
        r"missing    audio.layers.1.attn.in.k.output_max \(\): other layers have one",
        r"shape      audio.conv.0 \(128, 1, 3, 3\) expected, .* has \(128, 1, 3, 2\)",
        r"unknown    .*output_proj.scale: not part of this model; --ignore",
    ):
        assert re.search(expected, text), text
    assert open_model(options(folder, "image")).vision is not None


def test_a_checkpoint_without_bounds_clips_nothing(tmp_path: Path) -> None:
    def unclip(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("_min", "_max"))]:
            del tensors[name]

    opened = open_model(options(save(tmp_path / "model", "E4B", unclip)))
    assert opened.vision is not None
    images = cut_drawings(MODELS["E4B"], UNEQUAL[:1])
    assert relative_error(opened.vision.encode(images)[0], official_rows(MODELS["E4B"], images)[0]) > 1e-2


def test_models_without_a_tower_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this model has no vision tower"):
        open_model(LoadOptions(model="demo", media=("image",)))

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if hf.tower_kind(hf.strip(name)) is not None]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"this model has no audio tower .* no audio_config.; load it without sounds"):
        open_model(options(save(tmp_path / "deaf", "31B"), "audio"))
    mute = save(tmp_path / "mute", "E4B", drop)
    with pytest.raises(CheckpointError, match="the files hold no audio tower, only its config"):
        open_model(options(mute, "audio"))
    bare = save(tmp_path / "bare", "31B", drop)
    with pytest.raises(CheckpointError, match="the files hold no vision tower, only its config"):
        open_model(options(bare))
    assert open_model(LoadOptions(model=str(bare))).vision is None
    raw = json.loads((bare / "config.json").read_text())
    raw["vision_config"]["use_bidirectional_magic"] = True
    (bare / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="vision_config"):
        open_model(options(bare))


@pytest.mark.parametrize("size", VISION)
def test_every_name_can_be_spelled(size: str) -> None:
    specs = [*vision_plan(MODELS[size]).params(), *(audio_plan(MODELS[size]).params() if size in AUDIO else ())]
    for spec in specs:
        for part in [name for name, _ in spec.parts] or [None]:
            assert hf_towers.translate(hf.strip(hf_towers.spell(spec.name, part))) == (spec.name, part)


def test_auto_loads_the_towers_that_there_are(tmp_path: Path) -> None:
    def towers(folder: Path | str) -> bool:
        return open_model(LoadOptions(model=str(folder), dtype="float32", media=("auto",), context=64)).vision is not None

    def without_tower(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "vision" in name]:
            del tensors[name]

    assert towers(save(tmp_path / "whole", "E2B"))
    assert not towers(save(tmp_path / "stripped", "E2B", without_tower))
    assert not towers("demo")

    def cut_one(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if "vision_tower" in name)]

    with pytest.raises(CheckpointError, match="vision tower"):
        towers(save(tmp_path / "damaged", "E2B", cut_one))


@pytest.mark.parametrize("media", ["image", ["image"], ("sound",), (1,), ("image", None)])
def test_media_is_a_tuple_of_names(media: object) -> None:
    with pytest.raises(RequestError, match="media: expected some of auto, image, audio"):
        LoadOptions(model="demo", media=media)  # type: ignore[arg-type]
