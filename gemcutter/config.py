"""A typed reader of `config.json` in Hugging Face's spelling, of Gemma 4 and of Gemma 3's text models.

Owns the foreign keys: every key is read, ignored by name, or an error, and all errors come at once.
Refuses to know layer arithmetic: which layer owns what is decided in `plan.py`, from the values read here.
Read `plan.py` next. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemcutter import tower_config
from gemcutter.config_keys import IGNORED as IGNORED  # public as config.IGNORED
from gemcutter.config_keys import Keys
from gemcutter.errors import ConfigError
from gemcutter.tower_config import AudioConfig, UnifiedAudioConfig, UnifiedVisionConfig, VisionConfig

SLIDING, FULL = "sliding_attention", "full_attention"

# Towers have a reader of their own, `tower_config.py`; here their objects are kept as they stand.
TOWERS = ("vision_config", "audio_config")
TEXT_TYPES = ("gemma4_text", "gemma4_unified_text", "gemma3_text")
WRAPPER_TYPES = ("gemma4", "gemma4_unified", "gemma3")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary parameters of one attention type; `kind` is "default", "proportional" or "linear"."""

    kind: str
    theta: float
    partial: float = 1.0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder's part of a config, typed, in the published spelling of its keys."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    layer_types: tuple[str, ...]
    rope: Mapping[str, RopeConfig]
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    final_logit_softcapping: float | None = None
    num_kv_shared_layers: int = 0
    attention_k_eq_v: bool = False
    use_double_wide_mlp: bool = False
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    per_layer: Mapping[int, Mapping[str, int]] | None = None  # None: the config has no such key
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    bidirectional: str | None = None
    pad_token_id: int = 0
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: float = 1.0  # Gemma 4 does not scale its queries, and norms its values
    has_v_norm: bool = True

    @property
    def is_spelled_by_layer(self) -> bool:
        """Return whether only per_layer_config gives the sizes of global layers, as transformers 5.15 and later write it."""
        return bool(self.per_layer) and self.global_head_dim is None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole config.json: the decoder, what surrounds it, and what a drafter adds."""

    text: TextConfig
    model_type: str
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    towers: tuple[str, ...] = ()
    quantization: Mapping[str, Any] | None = None
    backbone_hidden_size: int | None = None
    num_centroids: int = 0
    centroid_top_k: int = 0
    norm_offset: float = 0.0  # added to the norms' weights: Gemma 3 stores how far they are from 1
    tower_keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # each tower's object, unread
    ignore: tuple[str, ...] = ()  # patterns of unknown keys that its reader passes over
    notes: tuple[str, ...] = ()  # what of the file was not believed, and why

    @property
    def vision(self) -> VisionConfig | UnifiedVisionConfig | None:
        """Return the typed `vision_config`, None without one. Raises ConfigError for bad keys, which no decoder cares for."""
        keys = self.tower_keys.get("vision")
        return tower_config.read_vision(keys, self.model_type, self.ignore) if keys else None

    @property
    def audio(self) -> AudioConfig | UnifiedAudioConfig | None:
        """Return the typed `audio_config`, None without one. Raises ConfigError for bad keys, which no decoder cares for."""
        keys = self.tower_keys.get("audio")
        return tower_config.read_audio(keys, self.model_type, self.ignore) if keys else None

    @property
    def is_drafter(self) -> bool:
        """Return whether this is an assistant: a drafter whose layers all read their target's keys and values."""
        return self.backbone_hidden_size is not None


def read(raw: Mapping[str, Any], source: str = "config.json", ignore: Sequence[str] = ()) -> ModelConfig:
    """Read a config.json object (nested or flat, published or per-layer spelling).

    `ignore` holds patterns of keys to pass over. Raises ConfigError with every problem found.
    """
    problems: list[str] = []
    top = Keys(raw, "", problems)
    model_type = top.text("model_type", TEXT_TYPES + WRAPPER_TYPES + DRAFTER_TYPES, "gemma4_text")
    if not top.has("model_type"):
        problems.append("model_type: missing; a Gemma 4 config has one of gemma4, gemma4_text, gemma4_unified, gemma4_assistant")
    if problems:  # another family: the rest would only be noise
        raise ConfigError(f"{source} is not a Gemma 4 config", problems)
    nested = model_type not in TEXT_TYPES
    inner = Keys(top.table("text_config"), "text_config.", problems) if nested else top
    if nested:
        inner.text("model_type", [name for name in TEXT_TYPES if name[:6] == model_type[:6]], model_type)
    towers = {name.removesuffix("_config"): table for name in TOWERS if (table := top.table(name))}
    tied = top.flag("tie_word_embeddings", inner.flag("tie_word_embeddings", True))
    eos = tuple(dict.fromkeys(top.ids("eos_token_id") + (inner.ids("eos_token_id") if nested else ())))
    top.ids("pad_token_id"), top.ids("bos_token_id")
    dtype = str(
        raw.get("dtype") or raw.get("torch_dtype") or inner.raw.get("dtype") or inner.raw.get("torch_dtype") or "bfloat16"
    )
    top.seen.update(("dtype", "torch_dtype"))
    inner.seen.update(("dtype", "torch_dtype"))
    quantization = (top.table("quantization_config"), top.table("quantization"))
    backbone, centroids, centroid_top_k = _drafter(top, model_type)
    is_gemma3 = model_type.startswith("gemma3")
    text = _gemma3_text(inner, tied) if is_gemma3 else _text(inner, tied)
    if nested:
        inner.refuse_rest(ignore)
    top.refuse_rest(ignore)
    if problems:
        raise ConfigError(f"{source} does not describe a Gemma 4 model ({_count(problems)})", problems)
    return ModelConfig(
        text,
        model_type,
        dtype,
        eos,
        tuple(towers),
        quantization[0] or quantization[1] or None,
        backbone,
        centroids,
        centroid_top_k,
        norm_offset=1.0 if is_gemma3 else 0.0,
        tower_keys=towers,
        ignore=tuple(ignore),
    )


def _count(problems: list[str]) -> str:
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"


def _drafter(top: Keys, model_type: str) -> tuple[int | None, int, int]:
    if model_type not in DRAFTER_TYPES:
        return None, 0, 0
    backbone = top.integer("backbone_hidden_size")
    ordered = top.flag("use_ordered_embeddings", False)
    centroids = top.integer("num_centroids", 2048)
    top_k = top.integer("centroid_intermediate_top_k", 32)
    return (backbone, centroids, top_k) if ordered else (backbone, 0, 0)


def _text(keys: Keys, tied: bool) -> TextConfig:
    layers = keys.integer("num_hidden_layers", high=4096)
    moe = keys.flag("enable_moe_block", False)
    ple = keys.integer("hidden_size_per_layer_input", 0, low=0)
    vocab = keys.integer("vocab_size", 262144)
    keys.text("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    if keys.flag("attention_bias", False):
        keys.problem("attention_bias", "no Gemma 4 has attention biases; expected false")
    bidirectional = keys.text("use_bidirectional_attention", ("vision", "all"), "") or None
    if bidirectional == "all":
        keys.problem("use_bidirectional_attention", '"all" makes an encoder; this engine runs causal decoders')
    config = TextConfig(
        vocab_size=vocab,
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=keys.integer("num_attention_heads"),
        num_key_value_heads=keys.integer("num_key_value_heads"),
        head_dim=keys.integer("head_dim", 256),
        sliding_window=keys.integer("sliding_window", 512),
        layer_types=_layer_types(keys, layers, ends_global=True),
        rope=_rope(keys, RopeConfig("proportional", 1e6, 0.25)),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        max_position_embeddings=keys.integer("max_position_embeddings", 131072),
        final_logit_softcapping=keys.number("final_logit_softcapping", 0.0) or None,
        num_kv_shared_layers=keys.integer("num_kv_shared_layers", 0, low=0),
        attention_k_eq_v=keys.flag("attention_k_eq_v", False),
        use_double_wide_mlp=keys.flag("use_double_wide_mlp", False),
        global_head_dim=keys.integer("global_head_dim") if keys.has("global_head_dim") else None,
        num_global_key_value_heads=_optional(keys, "num_global_key_value_heads"),
        per_layer=_per_layer(keys, layers),
        hidden_size_per_layer_input=ple,
        vocab_size_per_layer_input=keys.integer("vocab_size_per_layer_input", vocab, low=0),
        num_experts=_moe_size(keys, moe, "num_experts"),
        top_k_experts=_moe_size(keys, moe, "top_k_experts"),
        moe_intermediate_size=_moe_size(keys, moe, "moe_intermediate_size"),
        bidirectional=bidirectional,
        pad_token_id=keys.integer("pad_token_id", 0, low=0),
        bos_token_id=keys.integer("bos_token_id", 2, low=0),
        tie_word_embeddings=tied,
    )
    _check(keys, config)
    return config


def _gemma3_text(keys: Keys, tied: bool) -> TextConfig:
    """Read a Gemma 3 decoder: all layers own their keys and values, and differ in window and rope alone."""
    layers, head_dim = keys.integer("num_hidden_layers", 26, high=4096), keys.integer("head_dim", 256)
    keys.text("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    keys.seen.add("cache_implementation")
    for key in ("attention_bias", "use_bidirectional_attention"):
        if keys.flag(key, False):
            keys.problem(key, "no Gemma 3 decoder has it; expected false")
    if keys.has("attn_logit_softcapping"):
        keys.problem("attn_logit_softcapping", "no Gemma 3 caps its attention scores; expected null")
    return TextConfig(
        vocab_size=keys.integer("vocab_size", 262208),
        hidden_size=keys.integer("hidden_size", 2304),
        intermediate_size=keys.integer("intermediate_size", 9216),
        num_hidden_layers=layers,
        num_attention_heads=keys.integer("num_attention_heads", 8),
        num_key_value_heads=keys.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        global_head_dim=head_dim,
        sliding_window=keys.integer("sliding_window", 4096),
        layer_types=_layer_types(keys, layers, ends_global=False),
        rope=_rope(keys, RopeConfig("default", 1e6)),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        max_position_embeddings=keys.integer("max_position_embeddings", 131072),
        final_logit_softcapping=keys.number("final_logit_softcapping", 0.0) or None,
        pad_token_id=keys.integer("pad_token_id", 0, low=0),
        bos_token_id=keys.integer("bos_token_id", 2, low=0),
        tie_word_embeddings=tied,
        query_pre_attn_scalar=keys.number("query_pre_attn_scalar", 256.0),
        has_v_norm=False,
    )


def _optional(keys: Keys, key: str) -> int | None:
    return keys.integer(key) if keys.has(key) else None


def _moe_size(keys: Keys, moe: bool, key: str) -> int:
    if key == "moe_intermediate_size":  # an older spelling of the same key, dropped by later releases
        alias = keys.has("expert_intermediate_size")
        if alias and not keys.has(key):
            key = "expert_intermediate_size"
    if not moe:
        keys.has(key)
        return 0
    return keys.integer(key)


def _layer_types(keys: Keys, layers: int, ends_global: bool) -> tuple[str, ...]:
    period = keys.integer("sliding_window_pattern", keys.integer("_sliding_window_pattern", 6))
    if not keys.has("layer_types"):
        kinds = [SLIDING if (i + 1) % period else FULL for i in range(layers)]
        return (*kinds[:-1], FULL) if ends_global else tuple(kinds)  # the last layer is global in every Gemma 4
    kinds = keys.raw["layer_types"]
    if not isinstance(kinds, list) or any(kind not in (SLIDING, FULL) for kind in kinds):
        keys.problem("layer_types", f"expected a list of {SLIDING!r} and {FULL!r}, found {kinds!r:.80}")
        return (FULL,) * layers
    if len(kinds) != layers:
        keys.problem("layer_types", f"names {len(kinds)} layers, but num_hidden_layers is {layers}")
        return (FULL,) * layers
    return tuple(kinds)


def _rope(keys: Keys, full: RopeConfig) -> dict[str, RopeConfig]:
    """Read both ropes from `rope_parameters`, or from Gemma 3's flat keys, which some converters write for Gemma 4, too."""
    kinds = ("default", "proportional") if full.kind == "proportional" else ("default", "linear")
    local, theta = keys.number("rope_local_base_freq", 1e4), keys.number("rope_theta", full.theta)
    ropes = {SLIDING: RopeConfig("default", local), FULL: replace(full, theta=theta)}
    if keys.has("rope_scaling") and full.kind == "proportional":
        keys.problem("rope_scaling", "not part of Gemma 4; scaling is rope_parameters.<type>.factor")
    elif keys.has("rope_scaling"):
        scaling = Keys(keys.table("rope_scaling"), f"{keys.where}rope_scaling.", keys.problems)
        kind = scaling.text("rope_type", kinds, scaling.text("type", kinds, "default"))
        ropes[FULL] = RopeConfig(kind, theta, factor=scaling.number("factor", 1.0))
        scaling.refuse_rest(())
    table = keys.table("rope_parameters")
    for name, raw in table.items():
        if name not in (SLIDING, FULL) or not isinstance(raw, dict):
            keys.problem(f"rope_parameters.{name}", f"expected objects for {SLIDING} and {FULL}, found {raw!r:.60}")
            continue
        inner = Keys(raw, f"{keys.where}rope_parameters.{name}.", keys.problems)
        kind = inner.text("rope_type", kinds, ropes[name].kind)
        partial = inner.number("partial_rotary_factor", 1.0)
        if partial > 1.0 or (kind != "proportional" and partial != 1.0):
            inner.problem("partial_rotary_factor", f"{partial:g} does not go with rope_type {kind!r}")
        ropes[name] = RopeConfig(kind, inner.number("rope_theta", ropes[name].theta), partial, inner.number("factor", 1.0))
        inner.refuse_rest(())
    return ropes


def _per_layer(keys: Keys, layers: int) -> dict[int, dict[str, int]] | None:
    if not keys.has("per_layer_config"):
        return None
    overrides: dict[int, dict[str, int]] = {}
    for name, raw in keys.table("per_layer_config").items():
        if not str(name).isdecimal() or not 0 <= int(name) < layers or not isinstance(raw, dict):
            keys.problem(f"per_layer_config.{name}", f"expected an object for a layer from 0 to {layers - 1}, found {raw!r:.60}")
            continue
        inner = Keys(raw, f"{keys.where}per_layer_config.{name}.", keys.problems)
        overrides[int(name)] = {key: inner.integer(key) for key in ("head_dim", "num_key_value_heads") if inner.has(key)}
        inner.refuse_rest(())
    return overrides


def _check(keys: Keys, config: TextConfig) -> None:
    """Report keys that contradict each other; what depends on a layer's place is checked by the plan."""
    if config.num_kv_shared_layers > config.num_hidden_layers:
        keys.problem(
            "num_kv_shared_layers", f"{config.num_kv_shared_layers} of {config.num_hidden_layers} layers can't be shared"
        )
    if config.num_experts and config.top_k_experts > config.num_experts:
        keys.problem("top_k_experts", f"{config.top_k_experts} of {config.num_experts} experts can't be chosen")
    if config.layer_types[-1] != FULL:
        keys.problem("layer_types", f"the last layer must be {FULL!r}, found {config.layer_types[-1]!r}")
    if config.hidden_size_per_layer_input and not config.vocab_size_per_layer_input:
        keys.problem("vocab_size_per_layer_input", "0 rows, but hidden_size_per_layer_input asks for per-layer embeddings")
