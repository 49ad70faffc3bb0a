"""A typed reader of `vision_config` and `audio_config`, in Hugging Face's spelling.

Owns the keys of the towers; absent and null keys mean what they mean in transformers. Read on request only (`ModelConfig.vision`,
`ModelConfig.audio`), so that no tower keeps a decoder from loading. Refuses to know tensors: read `tower_plan.py` next. Standard
library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcutter.config_keys import Keys
from gemcutter.errors import ConfigError


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision encoder of E2B, E4B, 26B-A4B and 31B, in the published spelling of its keys."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    patch_size: int = 16  # pixels
    pooling_kernel_size: int = 3  # patches
    position_embedding_size: int = 10240  # rows an axis
    default_output_length: int = 280  # soft tokens an image
    rope_theta: float = 100.0
    rms_norm_eps: float = 1e-6
    use_clipped_linears: bool = False
    standardize: bool = False


@dataclass(frozen=True, slots=True)
class UnifiedVisionConfig:
    """The 12B's embedder of merged patches, in the published spelling of its keys."""

    mm_embed_dim: int = 3840
    mm_posemb_size: int = 1120  # rows an axis
    patch_size: int = 16  # pixels
    pooling_kernel_size: int = 3  # patches
    num_soft_tokens: int = 280  # an image
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """The audio encoder of E2B and E4B, in the published spelling of its keys."""

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    subsampling_conv_channels: tuple[int, int] = (128, 32)
    conv_kernel_size: int = 5
    attention_chunk_size: int = 12
    attention_context_left: int = 13  # the query's own position included
    attention_context_right: int = 0
    attention_logit_cap: float = 50.0
    attention_invalid_logits_value: float = -1e9
    residual_weight: float = 0.5
    gradient_clipping: float = 1e10
    output_proj_dims: int = 1536
    rms_norm_eps: float = 1e-6
    use_clipped_linears: bool = True


@dataclass(frozen=True, slots=True)
class UnifiedAudioConfig:
    """The 12B's embedder of raw audio frames, in the published spelling of its keys."""

    audio_embed_dim: int = 640  # samples a soft token
    rms_norm_eps: float = 1e-6


def read_vision(
    raw: Mapping[str, Any], model_type: str = "gemma4", ignore: Sequence[str] = (), where: str = "vision_config"
) -> VisionConfig | UnifiedVisionConfig:
    """Return the typed `vision_config` of a model of `model_type`, which messages call `where`.

    `ignore` holds patterns of unknown keys to pass over. Raises ConfigError with every problem found.
    """
    keys = _open(raw, "vision", model_type, where)
    found = _unified_vision(keys) if _is_unified(model_type) else _vision(keys)
    _close(keys, where, ignore)
    return found


def read_audio(
    raw: Mapping[str, Any], model_type: str = "gemma4", ignore: Sequence[str] = (), where: str = "audio_config"
) -> AudioConfig | UnifiedAudioConfig:
    """Return the typed `audio_config` of a model of `model_type`, which messages call `where`.

    `ignore` holds patterns of unknown keys to pass over. Raises ConfigError with every problem found.
    """
    keys = _open(raw, "audio", model_type, where)
    found = _unified_audio(keys) if _is_unified(model_type) else _audio(keys)
    _close(keys, where, ignore)
    return found


def _is_unified(model_type: str) -> bool:
    return model_type.startswith("gemma4_unified")


def _open(raw: Mapping[str, Any], tower: str, model_type: str, where: str) -> Keys:
    if model_type.startswith("gemma3"):
        raise ConfigError(f"{tower}_config: the towers of Gemma 3 are not supported; its text decoder loads without them")
    keys = Keys(raw, f"{where}.", [])
    kind = f"gemma4_unified_{tower}" if _is_unified(model_type) else f"gemma4_{tower}"
    keys.text("model_type", (kind,), kind)
    keys.seen.update(("dtype", "torch_dtype"))
    return keys


def _close(keys: Keys, where: str, ignore: Sequence[str]) -> None:
    """Raise ConfigError for all that was wrong; the remedy is the same for every key."""
    keys.refuse_rest(ignore)
    if keys.problems:
        count = f"{len(keys.problems)} problem{'s' if len(keys.problems) > 1 else ''}"
        raise ConfigError(
            f"{where} does not describe a tower of Gemma 4 ({count}); take it from the original checkpoint's config.json, "
            "or load the text decoder alone",
            keys.problems,
        )


def _vision(keys: Keys) -> VisionConfig:
    heads = keys.integer("num_attention_heads", 12)
    config = VisionConfig(
        hidden_size=keys.integer("hidden_size", 768),
        intermediate_size=keys.integer("intermediate_size", 3072),
        num_hidden_layers=keys.integer("num_hidden_layers", 16, high=4096),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", 64),
        patch_size=keys.integer("patch_size", 16),
        pooling_kernel_size=keys.integer("pooling_kernel_size", 3),
        position_embedding_size=keys.integer("position_embedding_size", 10240),
        default_output_length=keys.integer("default_output_length", 280),
        rope_theta=_axial_rope(keys),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        use_clipped_linears=keys.flag("use_clipped_linears", False),
        standardize=keys.flag("standardize", False),
    )
    keys.text("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    keys.seen.add("max_position_embeddings")  # of the rotary embedding, which has no table
    if keys.flag("attention_bias", False):
        keys.problem("attention_bias", "no tower of Gemma 4 has attention biases; expected false, found true")
    if config.head_dim % 4:
        keys.problem("head_dim", f"expected a multiple of 4, a half with rotary pairs for each axis, found {config.head_dim}")
    _same(keys, "global_head_dim", config.head_dim, "head_dim")
    if heads % config.num_key_value_heads:
        keys.problem(
            "num_key_value_heads", f"expected a divisor of num_attention_heads {heads}, found {config.num_key_value_heads}"
        )
    return config


def _axial_rope(keys: Keys) -> float:
    """Return theta of the rotary embedding over both axes; released files call it "default", later ones "axial"."""
    theta = keys.number("rope_theta", 100.0)
    inner = Keys(keys.table("rope_parameters"), f"{keys.where}rope_parameters.", keys.problems)
    inner.text("rope_type", ("default", "axial"), "axial")
    theta = inner.number("rope_theta", theta)
    inner.refuse_rest(())
    return theta


def _unified_vision(keys: Keys) -> UnifiedVisionConfig:
    config = UnifiedVisionConfig(
        mm_embed_dim=keys.integer("mm_embed_dim", 3840),
        mm_posemb_size=keys.integer("mm_posemb_size", 1120),
        patch_size=keys.integer("patch_size", 16),
        pooling_kernel_size=keys.integer("pooling_kernel_size", 3),
        num_soft_tokens=keys.integer("num_soft_tokens", 280),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
    )
    _same(keys, "model_patch_size", config.patch_size * config.pooling_kernel_size, "patch_size x pooling_kernel_size")
    _same(keys, "output_proj_dims", config.mm_embed_dim, "mm_embed_dim")
    return config


def _audio(keys: Keys) -> AudioConfig:
    config = AudioConfig(
        hidden_size=keys.integer("hidden_size", 1024),
        num_hidden_layers=keys.integer("num_hidden_layers", 12, high=4096),
        num_attention_heads=keys.integer("num_attention_heads", 8),
        subsampling_conv_channels=_channels(keys),
        conv_kernel_size=keys.integer("conv_kernel_size", 5),
        attention_chunk_size=keys.integer("attention_chunk_size", 12),
        attention_context_left=keys.integer("attention_context_left", 13),
        attention_context_right=keys.integer("attention_context_right", 0, low=0),
        attention_logit_cap=keys.number("attention_logit_cap", 50.0),
        attention_invalid_logits_value=keys.number("attention_invalid_logits_value", -1e9, low=-math.inf),
        residual_weight=keys.number("residual_weight", 0.5),
        gradient_clipping=keys.number("gradient_clipping", 1e10),
        output_proj_dims=keys.integer("output_proj_dims", 1536),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        use_clipped_linears=keys.flag("use_clipped_linears", True),
    )
    keys.text("hidden_act", ("silu",), "silu")
    if config.hidden_size % config.num_attention_heads:
        keys.problem(
            "num_attention_heads", f"expected a divisor of hidden_size {config.hidden_size}, found {config.num_attention_heads}"
        )
    return config


def _channels(keys: Keys) -> tuple[int, int]:
    key = "subsampling_conv_channels"
    if not keys.has(key):
        return 128, 32
    found = keys.raw[key]
    if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or not 1 <= n <= 2**31 for n in found):
        keys.problem(key, f"expected two integers from 1, the channels of both convolutions, found {found!r:.60}")
        return 128, 32
    return found[0], found[1]


def _unified_audio(keys: Keys) -> UnifiedAudioConfig:
    aliases = ("hidden_size", "audio_samples_per_token", "output_proj_dims")  # a soft token is a frame of raw samples
    known = next((key for key in ("audio_embed_dim", *aliases) if keys.has(key)), "audio_embed_dim")
    size = keys.integer(known, 640)
    for alias in ("audio_embed_dim", *aliases):
        _same(keys, alias, size, known)
    return UnifiedAudioConfig(size, keys.number("rms_norm_eps", 1e-6))


def _same(keys: Keys, key: str, value: int, source: str) -> None:
    """Report a key that contradicts the one that it follows from."""
    if keys.has(key) and keys.raw[key] != value and keys.where + source not in {p.split(":")[0] for p in keys.problems}:
        keys.problem(key, f"expected {value}, which is {source}, found {keys.raw[key]!r:.60}")
