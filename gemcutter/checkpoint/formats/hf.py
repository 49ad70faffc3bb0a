"""Hugging Face layouts: the released files, what `save_pretrained` writes, and the unquantised QAT exports.

Owns the translation from their tensor names to canonical ones; refuses to know shapes and which layer needs what. Towers are
told apart before any rule looks at `layers.N`, because a tower's layers carry the decoder's names. Source: the layouts of
google/gemma-4-* and transformers.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gemcutter import config as configs
from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import StoredTensor
from gemcutter.errors import CheckpointError
from gemcutter.plan import ModelPlan

NAME = "Hugging Face safetensors"

DENSE = ("BF16", "F16", "F32", "F64", "I64", "BOOL")
WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")  # of torch.compile, of data parallel training, of peft
PREFIXES = ("model.language_model.model.", "model.language_model.", "language_model.model.", "language_model.", "model.")
TOWER_PREFIXES = {
    "vision_tower.": "(vision tower)",
    "embed_vision.": "(vision tower)",
    "vision_embedder.": "(vision tower)",
    "audio_tower.": "(audio tower)",
    "embed_audio.": "(audio tower)",
}
# Leftovers that carry no weights of the decoder: vestiges of an older design, generated tables, scales of a quantised cache.
VESTIGES = re.compile(r"rotary_emb\.|\.inv_freq$|_embedding_norm\.|\.softcap$|\.(?:[kv]_cache_scale|[kv]_scale)$")
GLOBALS: dict[str, tuple[str, str | None]] = {
    "embed_tokens.weight": ("embed.tokens", None),
    "embed_tokens_per_layer.weight": ("embed.ple", None),
    "per_layer_model_projection.weight": ("ple.in", None),
    "per_layer_projection_norm.weight": ("ple.norm", None),
    "norm.weight": ("norm", None),
    "lm_head.weight": ("head", None),
    "pre_projection.weight": ("draft.in", None),
    "post_projection.weight": ("draft.out", None),
    "masked_embedding.centroids.weight": ("draft.centroids", None),
    "masked_embedding.token_ordering": ("draft.order", None),
}
LAYERED: dict[str, tuple[str, str | None]] = {
    "input_layernorm.weight": ("attn.norm", None),
    "self_attn.q_proj.weight": ("attn.in", "q"),
    "self_attn.k_proj.weight": ("attn.in", "k"),
    "self_attn.v_proj.weight": ("attn.in", "v"),
    "self_attn.q_norm.weight": ("attn.q_norm", None),
    "self_attn.k_norm.weight": ("attn.k_norm", None),
    "self_attn.o_proj.weight": ("attn.out", None),
    "post_attention_layernorm.weight": ("attn.post_norm", None),
    "pre_feedforward_layernorm.weight": ("mlp.norm", None),
    "mlp.gate_proj.weight": ("mlp.in", "gate"),
    "mlp.up_proj.weight": ("mlp.in", "up"),
    "mlp.down_proj.weight": ("mlp.out", None),
    "post_feedforward_layernorm.weight": ("mlp.post_norm", None),
    "post_feedforward_layernorm_1.weight": ("mlp.branch_norm", None),
    "pre_feedforward_layernorm_2.weight": ("moe.norm", None),
    "post_feedforward_layernorm_2.weight": ("moe.branch_norm", None),
    "router.proj.weight": ("moe.router", None),
    "router.scale": ("moe.router_scale", None),
    "router.per_expert_scale": ("moe.expert_scale", None),
    "experts.gate_up_proj": ("moe.in", None),
    "experts.down_proj": ("moe.out", None),
    "per_layer_input_gate.weight": ("ple.gate", None),
    "per_layer_projection.weight": ("ple.out", None),
    "post_per_layer_input_norm.weight": ("ple.post_norm", None),
    "layer_scalar": ("scale", None),
}
LAYER = re.compile(r"layers\.([0-9]{1,9})\.(?:moe\.)?(.+)")


def sniff(source: Source) -> bool:
    """Take whatever no other format claims."""
    return True


def config(source: Source, ignore: Sequence[str] = ()) -> configs.ModelConfig:
    """Read the config beside the weights. Raises CheckpointError if there is none or the weights are quantized, ConfigError for
    bad keys.
    """
    found = read_config(source, ignore)
    if found.quantization is not None:
        is_ignored = any(fnmatch.fnmatchcase("quantization_config", pattern) for pattern in ignore)
        if is_ignored or is_dense(source):
            note = "config.json speaks of quantized weights, and none are: its quantization_config was passed over"
            return replace(found, quantization=None, notes=(note,))
        kind = found.quantization.get("quant_method") or found.quantization.get("mode") or "MLX affine"
        raise CheckpointError(
            f"{source.path}: the weights are quantized in a way that no format here reads ({kind}). "
            "Use the checkpoint that it was made from, and --quant q4, or pass --ignore quantization_config"
        )
    return found


def is_dense(source: Source) -> bool:
    """Return whether no tensor is packed, whatever the config says."""
    return all(tensor.dtype in DENSE for tensor in source.tensors.values())


def read_config(source: Source, ignore: Sequence[str] = ()) -> configs.ModelConfig:
    """Read the config beside the weights, quantized or not. Raises CheckpointError if there is none, ConfigError for bad keys."""
    raw = source.read_json("config.json")
    if raw is None and source.read_json("adapter_config.json") is not None:
        raise CheckpointError(f"{source.folder} is an adapter: load the model that it is for, with --adapter {source.folder}")
    if raw is None:
        raise CheckpointError(f"{source.folder}: no config.json beside the weights; copy it from the original checkpoint")
    return configs.read(raw, str(source.folder / "config.json"), ignore)


def pieces(source: Source, plan: ModelPlan) -> Iterator[StoredTensor]:
    """Yield every stored tensor under its canonical name."""
    for tensor in source.tensors.values():
        yield translate(tensor)


def translate(tensor: LazyTensor) -> StoredTensor:
    """Name one tensor canonically; `name` stays None for what the format does not know."""
    bare = strip(tensor.name)
    if (kind := tower_kind(bare)) is not None:
        return StoredTensor(kind, None, tensor)
    if VESTIGES.search(bare):
        return StoredTensor("(leftovers of other engines)", None, tensor)
    if bare in GLOBALS:
        return StoredTensor(*GLOBALS[bare], tensor)
    layer = LAYER.fullmatch(bare)
    if layer and layer[2] in LAYERED:
        name, part = LAYERED[layer[2]]
        return StoredTensor(f"layers.{int(layer[1])}.{name}", part, tensor)
    return StoredTensor(None, None, tensor)


def tower_kind(bare: str) -> str | None:
    """Return which tower a tensor is of, such as "(vision tower)", by its name after its prefix; None for the decoder's."""
    return next((kind for prefix, kind in TOWER_PREFIXES.items() if bare.startswith(prefix)), None)


def strip(name: str) -> str:
    """Take off whichever wrapper's prefix a name carries."""
    while name.startswith(WRAPPERS):
        name = name.removeprefix(next(prefix for prefix in WRAPPERS if name.startswith(prefix)))
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def spell(name: str, part: str | None) -> str:
    """Return the name that `save_pretrained` writes for a canonical parameter or part; the inverse of `translate`."""
    section, _, rest = name.partition(".")
    if section != "layers":
        own = next(hf for hf, canonical in GLOBALS.items() if canonical == (name, part))
        return (
            own if own.split(".")[0] in ("lm_head", "pre_projection", "post_projection", "masked_embedding") else f"model.{own}"
        )
    index, _, rest = rest.partition(".")
    own = next(hf for hf, canonical in LAYERED.items() if canonical == (rest, part))
    return f"model.layers.{index}.{own}"
