"""Gemma 4 wrappers in miniature: a decoder of `topologies.SIZES` beside towers with the traits of its size.

Owns random models of transformers, the oracle, under which every norm, bound and position matters; their towers over the same
weights; and images and sounds as batches of the official processors. Refuses to judge. Read `parity/test_vision.py` and
`parity/test_audio_tower.py` for the towers alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma4 import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
)
from transformers.models.gemma4_unified import (
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
    modeling_gemma4_unified,
)

from gemcutter import config as configs
from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.engine.media import MediaSpan
from gemcutter.engine.request import Request
from gemcutter.media.audio import SoundFrames, SoundShape, cut_sound
from gemcutter.media.image import ImagePatches, PatchShape, cut_image
from gemcutter.model.audio import AudioTower
from gemcutter.model.text import Decoder
from gemcutter.model.vision import VisionTower
from gemcutter.ops.types import Param
from gemcutter.param_spec import ParamKind
from gemcutter.quant import Weight
from gemcutter.tower_plan import AudioPlan, UnifiedAudioPlan, UnifiedVisionPlan, VisionPlan, derive_towers
from tests.images import drawing
from tests.sounds import RATE, tones
from tests.topologies import SIZES, Raw, build_decoder, plan_of, prompt

IMAGE, BOI, EOI, SOUND, VIDEO, BOA, EOA = range(50, 57)  # ids of media, within the vocabulary
MEDIA_IDS = {
    "image_token_id": IMAGE,
    "boi_token_id": BOI,
    "eoi_token_id": EOI,
    "audio_token_id": SOUND,
    "video_token_id": VIDEO,
    "boa_token_id": BOA,
    "eoa_token_index": EOA,
}
SMALL: Raw = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "position_embedding_size": 4096}
VISION: dict[str, Raw] = {
    "E2B": SMALL | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "use_clipped_linears": True},
    "E4B": SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "use_clipped_linears": True},
    "26B-A4B": SMALL | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24, "standardize": True},
    "31B": SMALL | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12, "standardize": True},
    "12B": {"mm_embed_dim": 40, "output_proj_dims": 40, "mm_posemb_size": 1120},
}
AUDIO: dict[str, Raw] = {
    "E2B": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "subsampling_conv_channels": [128, 4]}
    | {"output_proj_dims": 40},
    "E4B": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "subsampling_conv_channels": [128, 6]}
    | {"output_proj_dims": 56},
    "12B": {"audio_embed_dim": 640},
}


def build_wrapper(
    size: str, seed: int = 0, hears: bool = False, of_audio: Raw | None = None, **of_vision: Any
) -> PreTrainedModel:
    """Build the transformers model of a size with its vision tower, and its audio tower if it `hears`: random, in float32."""
    text = {key: value for key, value in SIZES[size].items() if key != "model_type"}
    vision, audio = VISION[size] | of_vision, AUDIO[size] | (of_audio or {}) if hears else {}
    if size == "12B":
        config: Any = Gemma4UnifiedConfig(
            text_config=Gemma4UnifiedTextConfig(**text),
            vision_config=Gemma4UnifiedVisionConfig(**vision),
            audio_config=Gemma4UnifiedAudioConfig(**audio) if hears else None,
            **MEDIA_IDS,
        )
        model_class: Any = Gemma4UnifiedForConditionalGeneration
    else:
        config = Gemma4Config(
            text_config=Gemma4TextConfig(**text, experts_implementation="eager"),
            vision_config=Gemma4VisionConfig(**vision),
            audio_config=Gemma4AudioConfig(**audio) if hears else None,
            **MEDIA_IDS,
        )
        model_class = Gemma4ForConditionalGeneration
    config._attn_implementation = "eager"
    model: PreTrainedModel = model_class(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw matrices that keep the size of what they multiply, vectors around 1, and bounds that cut some values off."""
    text = model.config.text_config
    sizes = {
        "embed_tokens.weight": 5.0,
        "embedding_projection.weight": 5.0,  # soft tokens are as large as others
        "router.proj.weight": 2 * text.hidden_size**0.5,
        "per_layer_input_gate.weight": 0.2,
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name.endswith(("inv_freq", "embed_scale", "inv_timescales", "softcap")):
            continue
        if name.endswith(("_min", "_max")):
            bound = (2.0 if "input" in name else 1.5) * float(torch.empty(()).uniform_(0.7, 1.3, generator=generator))
            tensor.fill_(bound if name.endswith("_max") else -bound)
        elif tensor.dim() < 2:
            tensor.uniform_(0.5, 1.5, generator=generator)
            if "vision" in name and name.endswith(("q_norm.weight", "k_norm.weight")):
                tensor.mul_(0.4)  # sharper attention would blow up rounding
        else:
            fan_in = text.hidden_size_per_layer_input if "embed_tokens_per_layer" in name else tensor.shape[-1]
            size = next((size for suffix, size in sizes.items() if name.endswith(suffix)), 1.0)
            tensor.normal_(0.0, size * fan_in**-0.5, generator=generator)


def raw_config(model: PreTrainedModel) -> Raw:
    """Return the config as `save_pretrained` spells it."""
    raw: Raw = json.loads(model.config.to_json_string())
    return raw


def vision_plan(model: PreTrainedModel) -> VisionPlan | UnifiedVisionPlan:
    """Return the plan of a model's vision tower."""
    plan = derive_towers(configs.read(raw_config(model))).vision
    assert plan is not None
    return plan


def audio_plan(model: PreTrainedModel) -> AudioPlan | UnifiedAudioPlan:
    """Return the plan of a model's audio tower."""
    plan = derive_towers(configs.read(raw_config(model))).audio
    assert plan is not None
    return plan


def _tower_params(
    model: PreTrainedModel, plan: VisionPlan | UnifiedVisionPlan | AudioPlan | UnifiedAudioPlan, kind: str, dtype: torch.dtype
) -> dict[str, Param]:
    """Return a tower's parameters; every tensor of the plan must be there, and none may be left over."""
    stored = {name: tensor for name, tensor in model.state_dict().items() if hf.tower_kind(hf.strip(name)) == kind}
    found = {hf_towers.translate(hf.strip(name)): tensor for name, tensor in stored.items()}
    params = dict[str, Param]()
    for spec in plan.params():
        parts = tuple(part for part, _ in spec.parts)
        tensors = tuple(found.pop((spec.name, part)) for part in parts or (None,))
        is_matrix = spec.kind is ParamKind.MATRIX
        params[spec.name] = Weight(tuple(each.to(dtype) for each in tensors), parts) if is_matrix else tensors[0].float()
    assert not found, sorted(map(str, found))
    return params


def build_tower(model: PreTrainedModel, dtype: torch.dtype = torch.float32, kernels: str = "auto") -> VisionTower:
    """Build the vision tower over a model's weights."""
    plan = vision_plan(model)
    return VisionTower(plan, _tower_params(model, plan, "(vision tower)", dtype), dtype, "cpu", kernels)


def build_audio_tower(model: PreTrainedModel, dtype: torch.dtype = torch.float32, kernels: str = "auto") -> AudioTower:
    """Build the audio tower over a model's weights."""
    plan = audio_plan(model)
    return AudioTower(plan, _tower_params(model, plan, "(audio tower)", dtype), dtype, "cpu", kernels)


def sound_shape(plan: AudioPlan | UnifiedAudioPlan) -> SoundShape:
    """Return how a tower's sounds are cut."""
    return SoundShape(plan.hidden if isinstance(plan, UnifiedAudioPlan) else None)


def cut_tones(model: PreTrainedModel, lengths: Sequence[int]) -> list[SoundFrames]:
    """Return sounds of so many samples as a model's tower reads them."""
    return [cut_sound((tones(length, length), RATE), sound_shape(audio_plan(model))) for length in lengths]


def padded_sounds(sounds: Sequence[SoundFrames]) -> dict[str, Tensor]:
    """Return sounds as one batch of the official processors: zeros, masked, after each that is not the longest."""
    longest = max(len(sound.values_FC) for sound in sounds) + 1
    values = torch.zeros(len(sounds), longest, sounds[0].values_FC.shape[1])
    is_valid = torch.zeros(len(sounds), longest, dtype=torch.bool)
    for index, sound in enumerate(sounds):
        count = len(sound.values_FC)
        values[index, :count], is_valid[index, :count] = sound.values_FC, True
    return {"input_features": values, "input_features_mask": is_valid}


@torch.no_grad()
def official_sound_rows(model: PreTrainedModel, sounds: Sequence[SoundFrames]) -> list[Tensor]:
    """Return what transformers makes of a batch of sounds: the valid rows of each."""
    found = model.model.get_audio_features(**padded_sounds(sounds), return_dict=True)
    return [rows[is_valid] for rows, is_valid in zip(found.pooler_output, found.attention_mask, strict=True)]


def patch_shape(plan: VisionPlan | UnifiedVisionPlan) -> PatchShape:
    """Return how a tower's images are cut."""
    return PatchShape(plan.patch, plan.pool, isinstance(plan, UnifiedVisionPlan))


def cut_drawings(model: PreTrainedModel, sizes: Sequence[tuple[int, int, int]]) -> list[ImagePatches]:
    """Return images, each given by height, width and budget, as a model's tower reads them."""
    shape = patch_shape(vision_plan(model))
    return [cut_image(drawing(height, width), budget, shape) for height, width, budget in sizes]


def padded(images: Sequence[ImagePatches]) -> dict[str, Tensor]:
    """Return images as one batch of the official processors: zeros, at position -1, after each that is not the longest.

    The length is a multiple of nine, and of two patches side by side, as official batches have it.
    """
    longest = max(len(image.levels_PC) for image in images)
    values = torch.zeros(len(images), longest, images[0].levels_PC.shape[1])
    positions = torch.full((len(images), longest, 2), -1)
    for index, image in enumerate(images):
        count = len(image.levels_PC)
        values[index, :count], positions[index, :count] = image.levels_PC / 255, image.positions()
    return {"pixel_values": values, "image_position_ids": positions}


@torch.no_grad()
def official_rows(model: PreTrainedModel, images: Sequence[ImagePatches]) -> list[Tensor]:
    """Return what transformers makes of a batch of images: the rows of each."""
    return list(model.model.get_image_features(**padded(images), return_dict=True).pooler_output)


# ---- whole prompts ----


def build_text(model: PreTrainedModel, kernels: str = "auto") -> Decoder:
    """Build the decoder over a model's weights."""
    state = {
        name: tensor for name, tensor in model.state_dict().items() if not hf.strip(name).startswith(tuple(hf.TOWER_PREFIXES))
    }
    renamed = {name.replace("model.language_model.", "model."): tensor for name, tensor in state.items()}
    source = cast(PreTrainedModel, SimpleNamespace(state_dict=lambda: renamed))
    return build_decoder(source, plan_of(raw_config(model)), kernels=kernels)


Media = ImagePatches | SoundFrames | tuple[ImagePatches, ...]  # a tuple holds the frames of a video
MARKERS = {ImagePatches: (BOI, IMAGE, EOI), SoundFrames: (BOA, SOUND, EOA), tuple: (BOI, VIDEO, EOI)}
TIME = (7, 11, 8)  # ids that stand before a frame


def media_request(
    towers: Sequence[VisionTower | AudioTower], parts: Sequence[int | Media], seed: int = 0, **fields: Any
) -> Request:
    """Make a request of so many random tokens here, and an image, a sound or the frames of a video there, between markers."""
    ids, spans = list[int](), list[MediaSpan]()
    for index, part in enumerate(parts):
        if isinstance(part, int):
            ids += [2 + token % 40 for token in prompt(part, seed=100 * seed + index)]
            continue
        is_sound = isinstance(part, SoundFrames)
        encode: Any = next(tower.encode for tower in towers if isinstance(tower, AudioTower if is_sound else VisionTower))
        begin, placeholder, end = MARKERS[type(part)]
        for each in part if isinstance(part, tuple) else (part,):
            ids += [*(TIME if isinstance(part, tuple) else ()), begin]
            spans.append(MediaSpan(len(ids), each.digest, encode([each])[0], is_block=not is_sound))
            ids += [*[placeholder] * each.soft_tokens, end]
    return Request(tuple(ids), media=tuple(spans), **fields)


@torch.no_grad()
def official_logits(model: PreTrainedModel, request: Request, media: Sequence[Media] = ()) -> Tensor:
    """Return transformers' logits [N, V] of all rows of a prompt with images, videos and sounds.

    For the 12B the masks are made as for the other sizes: its own class lets rows of an image see each other in global layers,
    too, and beyond the window.
    """
    ids = torch.tensor([request.prompt])
    kinds = (ids == IMAGE) + 2 * (ids == VIDEO) + 3 * (ids == SOUND)
    given: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": kinds}
    if images := [each for each in media if isinstance(each, ImagePatches)]:
        given |= padded(images)
    if videos := [each for each in media if isinstance(each, tuple)]:
        frames = padded([frame for video in videos for frame in video])
        given |= {"pixel_values_videos": frames["pixel_values"], "video_position_ids": frames["image_position_ids"]}
        given["num_frames_per_video"] = torch.tensor([len(video) for video in videos])
    if sounds := [each for each in media if isinstance(each, SoundFrames)]:
        given |= padded_sounds(sounds)
    if isinstance(model, Gemma4UnifiedForConditionalGeneration):
        text = model.config.text_config
        masks = modeling_gemma4_unified.create_masks_for_vision_model(
            config=text,
            inputs_embeds=torch.zeros(1, ids.shape[1], text.hidden_size),
            attention_mask=None,
            cache=None,
            position_ids=torch.arange(ids.shape[1])[None],
            block_sequence_ids=modeling_gemma4_unified.get_block_sequence_ids_for_mask(kinds, device=ids.device),
        )
        given["attention_mask"] = masks
    logits: Tensor = model(**given, use_cache=False).logits[0]
    return logits
