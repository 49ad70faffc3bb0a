"""Random assistants of the released sizes: each fits the target that `synth.py` writes of the same size.

Owns what an assistant has of its own: its widths, heads and head of centroids; all else follows from its target. Config and names
are those of the released files. Refuses to know how values are drawn and written: `synth.py` does that for every plan. Imports no
torch. Read `model/drafter.py` for what an assistant computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemcutter import config as configs
from gemcutter.checkpoint.write.synth import COPIED, SIZES, Size, find_size, narrow, shrink, special_tokens, write_config
from gemcutter.errors import ConfigError

SUFFIX = "-assistant"  # behind the name of the size that it drafts for
LAYERS = 4  # sliding ones, and a global one at the end
TOP_CENTROIDS = 32  # nearest ones whose tokens are drafted, where tokens are sorted


@dataclass(frozen=True, slots=True)
class AssistantSize:
    """What an assistant does not take over from its target. `drafts` is how many are made at a time, as published."""

    hidden: int
    mlp: int
    heads: int
    centroids: int = 0  # tokens are sorted under them; 0: the head is dense
    drafts: int = 4


ASSISTANTS = {
    "E2B": AssistantSize(256, 2048, heads=4, centroids=2048, drafts=2),
    "E4B": AssistantSize(256, 2048, heads=4, centroids=2048),
    "12B": AssistantSize(1024, 8192, heads=16),
    "26B-A4B": AssistantSize(1024, 8192, heads=16),
    "31B": AssistantSize(1024, 8192, heads=32, drafts=8),
}


def find_assistant(name: str) -> str | None:
    """Return the size whose assistant a name means, "E2B" for "e2b-assistant"; None where it means no assistant.

    Raises ConfigError for the assistant of an unknown size.
    """
    size = name.lower().removesuffix(SUFFIX)
    return None if size == name.lower() else find_size(size)


def shrink_assistant(own: AssistantSize) -> AssistantSize:
    """Make an assistant small, for a target that `shrink` made small: heads stay, and so many centroids that each has tokens."""
    return replace(own, hidden=narrow(own.hidden), mlp=narrow(own.mlp), centroids=own.centroids // 8)


def write_assistant(like: str, out: Path, *, full: bool = False, seed: int = 0) -> tuple[Path, ...]:
    """Write a random assistant for the target that `write_checkpoint` writes of the size `like` with the same `full`.

    Returns the files written. Raises ConfigError for an unknown size or seed, CheckpointError as `write_size`.
    """
    name = find_size(like)
    target, own = SIZES[name], ASSISTANTS[name]
    if not full:
        target, own = shrink(target), shrink_assistant(own)
    copied = tuple(each for each in COPIED if each != "generation_config.json")
    return write_config(spell_assistant(own, target), out, copied, {"generation_config.json": _generation(own)}, seed=seed)


def spell_assistant(own: AssistantSize, target: Size) -> dict[str, Any]:
    """Return the config.json of an assistant, key for key as the released files have it, with the demo's special tokens.

    Raises ConfigError for centroids that do not divide the vocabulary.
    """
    if own.centroids and target.vocab % own.centroids:
        raise ConfigError(f"centroids: {own.centroids} do not divide a vocabulary of {target.vocab} evenly")
    unified = "unified_" if target.family == "gemma4_unified" else ""
    return {
        "architectures": [f"Gemma4{'Unified' if unified else ''}AssistantForCausalLM"],
        "backbone_hidden_size": target.hidden,
        "centroid_intermediate_top_k": TOP_CENTROIDS,
        "dtype": "bfloat16",
        "model_type": f"gemma4_{unified}assistant",
        "num_centroids": own.centroids or ASSISTANTS["E2B"].centroids,  # as published, where none are used, too
        "text_config": _text(own, target),
        "tie_word_embeddings": True,
        "use_ordered_embeddings": own.centroids > 0,
    }


def _text(own: AssistantSize, target: Size) -> dict[str, Any]:
    """Return the config of the layers: heads as their target's of the same kind, whose keys and values they read."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": target.global_kv_heads is not None,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "final_logit_softcapping": None,
        "global_head_dim": 2 * target.head_dim,
        "head_dim": target.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": own.hidden,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": own.mlp,
        "layer_types": [configs.SLIDING] * (LAYERS - 1) + [configs.FULL],
        "max_position_embeddings": target.context,
        "model_type": f"{target.family}_text",
        "moe_intermediate_size": None,
        "num_attention_heads": own.heads,
        "num_experts": None,
        "num_global_key_value_heads": target.global_kv_heads,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": target.kv_heads,
        "num_kv_shared_layers": LAYERS,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            configs.FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            configs.SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": target.window,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": target.vocab,
        "vocab_size_per_layer_input": 0,
    } | special_tokens()


def _generation(own: AssistantSize) -> dict[str, Any]:
    return special_tokens() | {"num_assistant_tokens": own.drafts, "num_assistant_tokens_schedule": "constant"}
