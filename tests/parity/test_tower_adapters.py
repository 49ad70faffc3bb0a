"""Adapters that change the towers, against PEFT's own modules in transformers: merged, and beside the weights for a request.

Owns every linear of every kind of tower and its projector, clipped ones among them, whose bounds hold around the product and the
change together. What requests see of it is `tests/unit/test_adapted_media.py`'s, the decoder's part `test_adapters.py`'s.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemcutter import native
from gemcutter.checkpoint.formats import hf
from gemcutter.checkpoint.formats.lora import open_adapter
from gemcutter.errors import CheckpointError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import OpenModel, open_model
from gemcutter.media.audio import cut_sound
from gemcutter.media.image import cut_image
from gemcutter.ops.cpu.tower_ops import Pieces
from gemcutter.tower_plan import TowerPlans
from tests.adapters import tower_tensors, write_adapter
from tests.images import drawing
from tests.sounds import tones
from tests.topologies import TOLERANCE, relative_error
from tests.wrappers import (
    AUDIO,
    VISION,
    build_wrapper,
    cut_drawings,
    cut_tones,
    official_rows,
    official_sound_rows,
    patch_shape,
    sound_shape,
)

peft = pytest.importorskip("peft")

UNEQUAL = [(60, 90, 70), (40, 160, 70)]  # heights, widths and budgets of images
LENGTHS = [7000, 16000]  # samples of sounds
PROJECTORS = Path(__file__).parents[1] / "goldens" / "projectors"
PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"k_proj.linear": 2, "embedding_projection": 5},
    "alpha_pattern": {"layers.1.self_attn.q_proj.linear": 9, "v_proj.linear": 2},
}


@cache
def wrapper(size: str) -> PreTrainedModel:
    return build_wrapper(size, seed=5, hears=size in AUDIO)


def linears(model: PreTrainedModel) -> list[str]:
    """Name every linear of the towers and their projectors."""
    modules = model.named_modules()
    return [name for name, each in modules if isinstance(each, nn.Linear) and hf.tower_kind(hf.strip(f"{name}.weight"))]


def save_base(folder: Path, size: str) -> Path:
    folder.mkdir(parents=True)
    model = wrapper(size)
    (folder / "config.json").write_text(model.config.to_json_string())
    save_file(
        {name: each.clone() for name, each in model.state_dict().items() if name != "lm_head.weight"},
        folder / "model.safetensors",
    )
    return folder


def adapt(folder: Path, size: str, seed: int = 1, **options: Any) -> PreTrainedModel:
    """Write an adapter of all linears of the towers with PEFT; return the model that PEFT changes."""
    model = copy.deepcopy(wrapper(size))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=linears(model), **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    wrapped.save_pretrained(folder)
    found: PreTrainedModel = wrapped.base_model.model.eval()
    return found


def media_of(size: str) -> tuple[str, ...]:
    return ("image", "audio") if size in AUDIO else ("image",)


def opened(base: Path, size: str, **options: Any) -> OpenModel:
    return open_model(LoadOptions(model=str(base), dtype="float32", media=media_of(size), **options))


def official(model: PreTrainedModel, size: str) -> list[Tensor]:
    """Return what transformers makes of two images, and of two sounds where the model hears."""
    sounds = official_sound_rows(model, cut_tones(model, LENGTHS)) if size in AUDIO else []
    return [*official_rows(model, cut_drawings(model, UNEQUAL)), *sounds]


def rows(model: OpenModel, adapter: str | None = None) -> list[Tensor]:
    """Return what our towers make of the same images and sounds, for a request with an adapter."""
    found = list[Tensor]()
    if (vision := model.vision) is not None:
        images = [cut_image(drawing(height, width), budget, patch_shape(vision.plan)) for height, width, budget in UNEQUAL]
        found += vision.encode(images, vision.bodies.of(adapter))
    if (audio := model.audio) is not None:
        sounds = [cut_sound((tones(length, length), 16_000), sound_shape(audio.plan)) for length in LENGTHS]
        found += audio.encode(sounds, audio.bodies.of(adapter))
    return found


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(relative_error(each, other) for each, other in zip(found, wanted, strict=True))


def nearest(found: list[Tensor], wanted: list[Tensor]) -> float:
    return min(relative_error(each, other) for each, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["plain", "patterns"])
@pytest.mark.parametrize("size", VISION)
def test_towers_compute_what_peft_does(size: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, folder = save_base(tmp_path / "base", size), tmp_path / "adapter"
    model = adapt(folder, size, **options)
    wanted, plain = official(model, size), official(wrapper(size), size)
    assert nearest(wanted, plain) > 0.01
    merged = opened(base, size, adapter=str(folder))
    assert furthest(rows(merged), wanted) < TOLERANCE
    kinds = [f"{medium} tower merged" for medium in ("vision", "audio")[: len(media_of(size))]]
    assert all(
        any(f"changes of the {kind}; what they change is held as float32" in note for note in merged.notes) for kind in kinds
    )
    for kernels in ("auto", "reference"):
        beside = opened(base, size, adapters={"a": str(folder)}, kernels=kernels)
        assert beside.decoder.adapters == ("a",)
        assert furthest(rows(beside, "a"), wanted) < TOLERANCE
        assert furthest(rows(beside), plain) < TOLERANCE


def test_each_adapter_has_rows_of_its_own(tmp_path: Path) -> None:
    base, folders = save_base(tmp_path / "base", "E2B"), {name: str(tmp_path / name) for name in "ab"}
    wanted = {name: official(adapt(Path(folder), "E2B", seed=seed), "E2B") for seed, (name, folder) in enumerate(folders.items())}
    model = opened(base, "E2B", adapters=folders)
    for name, each in wanted.items():
        assert furthest(rows(model, name), each) < TOLERANCE
    assert nearest(wanted["a"], wanted["b"]) > 0.01
    digests = {name: (model.vision.bodies.of(name).digest, model.audio.bodies.of(name).digest) for name in ("a", "b", None)}  # type: ignore[union-attr]
    assert digests[None] == ("", "")
    assert len({each for pair in digests.values() for each in pair}) == 5


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_adapted_layers_are_computed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = save_base(tmp_path / "base", "E2B"), tmp_path / "adapter"
    adapt(folder, "E2B")
    model, ran, run = opened(base, "E2B", adapters={"a": str(folder)}), list[int](), Pieces.run
    monkeypatch.setattr(Pieces, "run", lambda self, rows, *more: (ran.append(rows), run(self, rows, *more)))
    rows(model)
    plain, ran[:] = list(ran), []
    rows(model, "a")
    assert ran == plain
    assert ran


def test_bfloat16_adds_changes_of_full_precision(tmp_path: Path) -> None:
    base, folder = save_base(tmp_path / "base", "E2B"), tmp_path / "adapter"
    wanted = official(adapt(folder, "E2B"), "E2B")
    model = open_model(LoadOptions(model=str(base), dtype="bfloat16", media=("image", "audio"), adapters={"a": str(folder)}))
    assert furthest(rows(model, "a"), wanted) < 0.05 < nearest(rows(model), wanted)


def test_the_towers_of_a_projector_are_changed_alike(tmp_path: Path) -> None:
    """The adapter's names are Hugging Face's, and patches lie otherwise in a projector."""
    folder, adapter = PROJECTORS / "E2B", tmp_path / "adapter"
    plans = TowerPlans(*(getattr(opened(folder, "E2B"), tower).plan for tower in ("vision", "audio")))
    write_adapter(adapter, tower_tensors(plans))
    changes = {"adapters": {"a": str(adapter)}}
    own = opened(folder, "E2B", **changes)
    wanted, plain = rows(own, "a"), rows(own)
    assert nearest(wanted, plain) > 0.01
    projector = opened(folder, "E2B", mmproj=str(folder / "mmproj-f32.gguf"), **changes)
    assert furthest(rows(projector, "a"), wanted) < 1e-6
    for name in ("mmproj-f32.gguf", "mmproj-q8_0.gguf"):
        merged = opened(folder, "E2B", mmproj=str(folder / name), adapter=str(adapter))
        assert furthest(rows(merged), wanted) < (1e-5 if "f32" in name else 0.03)


# ---- what is counted, and what is refused ----


@pytest.fixture(scope="module")
def e2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "E2B", "E2B")


def test_changes_of_towers_that_are_not_loaded_are_counted(e2b: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapt(folder, "E2B")
    count = {
        kind: sum(hf.tower_kind(hf.strip(f"{name}.weight")) == f"({kind})" for name in linears(wrapper("E2B")))
        for kind in ("vision tower", "audio tower")
    }
    for option in ({"adapter": str(folder)}, {"adapters": {"a": str(folder)}}):
        model = open_model(LoadOptions(model=str(e2b), dtype="float32", media=("image",), **option))
        assert f"adapter adapter: {count['audio tower']} changes of the audio tower not loaded" in model.notes
        assert not any("changes of the vision tower not loaded" in note for note in model.notes)
        with pytest.raises(CheckpointError, match=r"changes nothing in the decoder; .*those apply where the towers are loaded"):
            open_model(LoadOptions(model=str(e2b), dtype="float32", **option))


def test_what_can_not_be_applied_is_refused_by_name(e2b: Path, tmp_path: Path) -> None:
    model = opened(e2b, "E2B")
    plans = TowerPlans(model.vision.plan, model.audio.plan)  # type: ignore[union-attr]
    prefix = "base_model.model.model."
    bad = {
        f"{prefix}audio_tower.layers.0.lconv1d.depthwise_conv1d": (3, 5),
        f"{prefix}audio_tower.subsample_conv_projection.layer0.conv": (3, 9),
        f"{prefix}vision_tower.encoder.layers.0.self_attn.q_proj": (3, 32),  # the clamps would be within
        f"{prefix}vision_tower.encoder.layers.7.self_attn.q_proj.linear": (3, 32),
        f"{prefix}vision_tower.encoder.layers.0.self_attn.k_proj.linear": (3, 31),
        f"{prefix}vision_tower.patch_embedder.position_embedding_table": (3, 32),
    }
    tensors = {f"{name}.lora_A.weight": torch.ones(shape) for name, shape in bad.items()}
    tensors |= {f"{name}.lora_B.weight": torch.ones(32, 3) for name in bad}
    with pytest.raises(CheckpointError) as raised:
        open_adapter(write_adapter(tmp_path, tensors), model.checkpoint.plan, towers=plans)
    text = "\n".join(raised.value.problems)
    for words in (
        "audio.layers.0.conv.depthwise is no matrix that rows are multiplied with",
        "audio.conv.0 is no matrix that rows are multiplied with",
        "self_attn.q_proj.lora_A.weight: not part of this model",
        "layers.7.self_attn.q_proj.linear.lora_A.weight: the model has no vision.layers.7.attn.in",
        "shape      vision.layers.0.attn.in[k] (3, 32) expected for rank 3",
        "position_embedding_table.lora_A.weight: not part of this model",
    ):
        assert words in text, text
    assert "it was made for" not in str(raised.value)
