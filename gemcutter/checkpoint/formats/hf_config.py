"""Writes config.json as transformers and mlx-lm need it.

Owns the spelling of configs that are written: what a source's own config keeps, what a text model's config says when its
wrapper's towers are gone, and all keys of a config made from nothing but the typed one. Refuses to know tensors. Read
`gemcutter/config.py` for the reader, which must find the same model in what this writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemcutter.config import DRAFTER_TYPES, FULL, SLIDING, WRAPPER_TYPES, ModelConfig
from gemcutter.plan import Attn, ModelPlan

QUANTIZATION = ("quantization", "quantization_config")
# Keys that a wrapper's config has at its top, and a text model's config needs too; the wrapper's word counts.
SHARED = ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype", "transformers_version")
CLASSES = {"gemma4_text": "Gemma4ForCausalLM", "gemma4_unified_text": "Gemma4UnifiedForCausalLM"}


def for_transformers(
    raw: Mapping[str, Any] | None, config: ModelConfig, plan: ModelPlan, dtype: str, *, wraps: bool
) -> dict[str, Any]:
    """Return the config of an unquantized checkpoint: the source's own where it has one (`raw`), else spelled from the typed one.

    Without `wraps`, a wrapper's config becomes that of the text model inside it.
    """
    found = {key: value for key, value in (raw or spell(config, plan)).items() if key not in QUANTIZATION}
    return _with_dtype(found if wraps or config.is_drafter else _flat(found, config), dtype)


def for_mlx(
    raw: Mapping[str, Any] | None, config: ModelConfig, plan: ModelPlan, dtype: str, quantization: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the config of an MLX checkpoint, with the published keys, which mlx-lm knows, in place of per-layer ones.

    `quantization` holds the settings of all modules, and an object under the name of each one that differs.
    """
    found = {key: value for key, value in (raw or spell(config, plan)).items() if key not in QUANTIZATION}
    if config.model_type in WRAPPER_TYPES + DRAFTER_TYPES:
        inner = {key: value for key, value in found["text_config"].items() if key != "per_layer_config"}
        found["text_config"] = inner | _text(config, plan)
    else:
        found = {key: value for key, value in found.items() if key != "per_layer_config"} | _text(config, plan)
        # mlx-lm has no module for the text model of the unified family, whose decoder is the same.
        found |= {"model_type": "gemma4_text", "architectures": [CLASSES["gemma4_text"]]}
    found = _with_dtype(found, dtype)
    return found if quantization is None else found | {key: dict(quantization) for key in QUANTIZATION}


def spell(config: ModelConfig, plan: ModelPlan) -> dict[str, Any]:
    """Return the config of a text model, or of an assistant, from the typed one alone."""
    unified = config.model_type.startswith("gemma4_unified")
    kind = "gemma4_unified_text" if unified else "gemma4_text"
    text = _spell_text(config, plan, kind)
    if not config.is_drafter:
        return text
    centroids = {"num_centroids": config.num_centroids, "centroid_intermediate_top_k": config.centroid_top_k}
    return {
        "architectures": [f"Gemma4{'Unified' if unified else ''}AssistantForCausalLM"],
        "model_type": config.model_type,
        "backbone_hidden_size": config.backbone_hidden_size,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "use_ordered_embeddings": config.num_centroids > 0,
        **(centroids if config.num_centroids else {}),
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
    }


def _spell_text(config: ModelConfig, plan: ModelPlan, kind: str) -> dict[str, Any]:
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "attention_bias": False,
        "bos_token_id": config.text.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": config.text.pad_token_id,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "use_bidirectional_attention": config.text.bidirectional,
        **_text(config, plan),
    }


def _text(config: ModelConfig, plan: ModelPlan) -> dict[str, Any]:
    """Format everything that shapes the decoder with the published keys."""
    text = config.text
    first = {layer.attn: layer for layer in reversed(plan.layers)}
    widest, narrowest = first[Attn.GLOBAL], first.get(Attn.SLIDING, first[Attn.GLOBAL])
    return {
        "attention_k_eq_v": text.attention_k_eq_v,
        "enable_moe_block": text.num_experts > 0,
        "final_logit_softcapping": text.final_logit_softcapping,
        "global_head_dim": widest.head_dim,
        "head_dim": narrowest.head_dim,
        "hidden_size": text.hidden_size,
        "hidden_size_per_layer_input": text.hidden_size_per_layer_input,
        "intermediate_size": text.intermediate_size,
        "layer_types": [FULL if layer.attn is Attn.GLOBAL else SLIDING for layer in plan.layers],
        "max_position_embeddings": text.max_position_embeddings,
        "moe_intermediate_size": text.moe_intermediate_size or None,
        "num_attention_heads": text.num_attention_heads,
        "num_experts": text.num_experts or None,
        "num_global_key_value_heads": widest.kv_heads if text.attention_k_eq_v else None,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": narrowest.kv_heads,
        "num_kv_shared_layers": text.num_kv_shared_layers,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": {
            kind: {"rope_type": rope.kind, "rope_theta": rope.theta}
            | ({"partial_rotary_factor": rope.partial} if rope.partial != 1.0 else {})
            | ({"factor": rope.factor} if rope.factor != 1.0 else {})
            for kind, rope in text.rope.items()
        },
        "sliding_window": text.sliding_window,
        "top_k_experts": text.top_k_experts or None,
        "use_double_wide_mlp": text.use_double_wide_mlp,
        "vocab_size": text.vocab_size,
        "vocab_size_per_layer_input": text.vocab_size_per_layer_input,
    }


def _flat(found: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Take the text model's config out of a wrapper's."""
    if config.model_type not in WRAPPER_TYPES:
        return found
    kind = f"{config.model_type}_text"
    outer = {key: found[key] for key in SHARED if found.get(key) is not None}
    inner: dict[str, Any] = found["text_config"]
    return inner | outer | {"model_type": kind, "architectures": [CLASSES[kind]]}


def _with_dtype(found: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the dtype of the dense weights, wherever the config speaks of it."""
    changed = {key: value for key, value in found.items() if key != "torch_dtype"} | {"dtype": dtype}
    if "text_config" in changed:
        changed["text_config"] = {key: value for key, value in changed["text_config"].items() if key != "torch_dtype"} | {
            "dtype": dtype
        }
    return changed
