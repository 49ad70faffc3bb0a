"""GGUF projectors: the towers in files beside a model, as llama.cpp's converter writes them, and those in Ollama's models.

Owns the names of towers in both dialects, what their metadata says of them, and how their values are laid out otherwise than in
Hugging Face's files. Ollama keeps towers in the model's own file; some of its names mean another tensor than llama.cpp's, which
the names beside them tell. Sizes that no key names are read from shapes. Refuses to know bytes and which parameter needs what.
Source: llama.cpp's conversion scripts and Ollama's converter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import StoredTensor, rearranged
from gemcutter.checkpoint.formats import gguf
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.param_spec import ParamKind
from gemcutter.sidecar.small_file import shown
from gemcutter.tower_config import AudioConfig, UnifiedAudioConfig, UnifiedVisionConfig, VisionConfig, read_audio, read_vision
from gemcutter.tower_plan import BOUNDS, CHANNELS, TowerPlan, UnifiedVisionPlan

if TYPE_CHECKING:  # headers are read without torch
    from torch import Tensor

PROJECTOR = "clip"  # the architecture of a file of towers
# What a projector of a Gemma 4 calls itself, and the model type whose tower it is.
TYPES = {"gemma4v": "gemma4", "gemma4a": "gemma4", "gemma4uv": "gemma4_unified", "gemma4ua": "gemma4_unified"}
CLAMPS = "v.clamp_data"  # Ollama's: the bounds of all linears of the vision tower, then four of the projector, which has none
CLAMPED = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
OLLAMA = ("mm.a.fc.weight", "a.blk.0.layer_pre_norm.weight")  # only in its files: they tell what ambiguous names mean

Name = tuple[str, str | None]  # canonical, and the part of it that is stored under the name

GLOBALS: dict[str, Name] = {
    "v.patch_embd.weight": ("vision.patch", None),
    "v.patch_embd.bias": ("vision.patch.bias", None),
    "v.patch_norm.1.weight": ("vision.patch_norm", None),
    "v.patch_norm.1.bias": ("vision.patch_norm.bias", None),
    "v.patch_norm.2.weight": ("vision.norm", None),
    "v.patch_norm.2.bias": ("vision.norm.bias", None),
    "v.patch_norm.3.weight": ("vision.position_norm", None),
    "v.patch_norm.3.bias": ("vision.position_norm.bias", None),
    "v.position_embd.weight": ("vision.positions", None),
    "v.std_bias": ("vision.std_bias", None),
    "v.std_scale": ("vision.std_scale", None),
    "mm.input_projection.weight": ("vision.out", None),
    "a.conv1d.0.weight": ("audio.conv.0", None),
    "a.conv1d.0.norm.weight": ("audio.conv.0.norm", None),
    "a.conv1d.1.weight": ("audio.conv.1", None),
    "a.conv1d.1.norm.weight": ("audio.conv.1.norm", None),
    "a.input_projection.weight": ("audio.in", None),
    "a.pre_encode.out.weight": ("audio.last", None),
    "a.pre_encode.out.bias": ("audio.last.bias", None),
    "mm.a.input_projection.weight": ("audio.out", None),
}
OLLAMA_GLOBALS: dict[str, Name] = {
    "a.pre_encode.out.weight": ("audio.in", None),
    "mm.a.fc.weight": ("audio.last", None),
    "mm.a.fc.bias": ("audio.last.bias", None),
}
QKV: dict[str, Name] = {f"attn_{part}": ("attn.in", part) for part in ("q", "k", "v")}
LINEARS: dict[str, dict[str, Name]] = {
    "v": QKV
    | {
        "attn_out": ("attn.out", None),
        "ffn_gate": ("mlp.in", "gate"),
        "ffn_up": ("mlp.in", "up"),
        "ffn_down": ("mlp.out", None),
    },
    "a": QKV
    | {
        "attn_out": ("attn.out", None),
        "conv_pw1": ("conv.in", None),
        "conv_pw2": ("conv.out", None),
        "ffn_up": ("ff1.in", None),
        "ffn_down": ("ff1.out", None),
        "ffn_up_1": ("ff2.in", None),
        "ffn_down_1": ("ff2.out", None),
        "attn_k_rel": ("attn.relative", None),
    },
}
VECTORS: dict[str, dict[str, str]] = {
    "v": {
        "ln1": "attn.norm",
        "attn_q_norm": "attn.q_norm",
        "attn_k_norm": "attn.k_norm",
        "attn_post_norm": "attn.post_norm",
        "ln2": "mlp.norm",
        "ffn_post_norm": "mlp.post_norm",
    },
    "a": {
        "attn_pre_norm": "attn.norm",
        "per_dim_scale": "attn.q_scale",
        "attn_post_norm": "attn.post_norm",
        "conv_norm": "conv.norm",
        "conv_dw": "conv.depthwise",
        "norm_conv": "conv.inner_norm",
        "ln2": "norm",
        "ffn_norm": "ff1.norm",
        "ffn_post_norm": "ff1.post_norm",
        "ffn_norm_1": "ff2.norm",
        "ffn_post_norm_1": "ff2.post_norm",
    },
}
OLLAMA_VECTORS = {"ln1": "attn.norm", "ln2": "attn.post_norm", "layer_pre_norm": "norm", "linear_pos": "attn.relative"}
LAYER = re.compile(r"([va])\.blk\.([0-9]{1,9})\.(\w+)\.(\w+)")
TOWERS = {"v": "vision", "a": "audio"}


def has_towers(source: Source) -> bool:
    """Return whether a GGUF file holds towers, as projectors and Ollama's models do."""
    return any(next(tensors_of(source, tower), None) is not None for tower in TOWERS.values())


def tensors_of(source: Source, tower: str) -> Iterator[LazyTensor]:
    """Yield the tensors of a tower, "vision" or "audio", and its projector."""
    return (tensor for tensor in source.tensors.values() if gguf.translate(tensor.name)[0] == f"({tower} tower)")


# ---- names ----


def pieces(source: Source, tower: str, plan: TowerPlan) -> Iterator[StoredTensor]:
    """Yield the stored tensors of a tower, "vision" or "audio", under their canonical names; `name` None for unknown ones."""
    is_ollama = not source.tensors.keys().isdisjoint(OLLAMA)
    specs = {spec.name: spec for spec in plan.params()}
    for tensor in tensors_of(source, tower):
        if tensor.name == CLAMPS:
            yield from _clamps(tensor)
            continue
        name, part = translate(tensor.name, is_ollama) or (None, None)
        spec, piece = specs.get(name or ""), gguf.piece(tensor, name, part)
        if spec is None or piece.fault is not None:
            yield piece
        elif spec.name == "vision.positions" and isinstance(plan, UnifiedVisionPlan):
            yield _arranged(piece, spec.shape, _swap_axes, 3)
        elif spec.name.startswith("vision.patch") and spec.name != "vision.patch.bias":
            yield _arranged(piece, spec.shape, partial(_channels_last, side=_side(spec.shape[-1])))
        elif spec.name.endswith("attn.q_scale"):
            yield _arranged(piece, spec.shape, _inverse_softplus)
        elif spec.kind in (ParamKind.SCALAR, ParamKind.CONV):
            yield _arranged(piece, spec.shape, lambda found, shape=spec.shape: found.reshape(shape))  # one value, or an axis of 1
        else:
            yield piece


def translate(own: str, is_ollama: bool = False) -> Name | None:
    """Return the canonical name and part of a tower's tensor, of llama.cpp's dialect or Ollama's; None for what is unknown."""
    if is_ollama and own in OLLAMA_GLOBALS:
        return OLLAMA_GLOBALS[own]
    if own in GLOBALS:
        return GLOBALS[own]
    layer = LAYER.fullmatch(own)
    if not layer:
        return None
    kind, index, module, ending = layer.groups()
    prefix = f"{TOWERS[kind]}.layers.{int(index)}."
    vectors = VECTORS[kind] | (OLLAMA_VECTORS if is_ollama and kind == "a" else {})
    if ending == "weight" and module in vectors:
        return prefix + vectors[module], None
    if module not in LINEARS[kind] or ending not in ("weight", *BOUNDS):
        return None
    name, part = LINEARS[kind][module]
    return (prefix + name, part) if ending == "weight" else (".".join(filter(None, (prefix + name, part, ending))), None)


def spell(name: str, part: str | None) -> str:
    """Return the name that llama.cpp's converter writes for a tower's canonical parameter or part; the inverse of `translate`."""
    for own, canonical in GLOBALS.items():
        if canonical == (name, part):
            return own
    tower, _, rest = name.partition(".layers.")
    index, _, rest = rest.partition(".")
    prefix = f"{tower[0]}.blk.{index}."
    for own, canonical_name in VECTORS[tower[0]].items():
        if canonical_name == rest:
            return f"{prefix}{own}.weight"
    for own, canonical in LINEARS[tower[0]].items():
        stem, _, bound = rest.rpartition(".")
        if canonical == (rest, part):
            return f"{prefix}{own}.weight"
        if bound in BOUNDS and ".".join(filter(None, canonical)) == stem:
            return f"{prefix}{own}.{bound}"
    raise KeyError(name)


def _clamps(tensor: LazyTensor) -> Iterator[StoredTensor]:
    """Yield Ollama's clip bounds one by one; its converter writes zeros where there are none, and they clip nothing."""
    count = tensor.shape[0] // len(BOUNDS) - 1 if tensor.dtype == "F32" and len(tensor.shape) == 1 else 0
    if count < 1 or count % len(CLAMPED) or (count + 1) * len(BOUNDS) != tensor.shape[0]:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        yield StoredTensor("vision.clamps", None, tensor, f"F32, four bounds of seven linears a layer, expected, found {found}")
        return
    given = tensor.torch().view(-1, len(BOUNDS))
    for number in range(count):
        if not bool(given[number].any()):
            continue
        layer, module = divmod(number, len(CLAMPED))
        name, part = LINEARS["v"][CLAMPED[module]]
        for place, bound in enumerate(BOUNDS):
            offset = tensor.offset + 4 * (number * len(BOUNDS) + place)
            canonical = ".".join(filter(None, (f"vision.layers.{layer}.{name}", part, bound)))
            yield StoredTensor(canonical, None, replace(tensor, shape=(), nbytes=4, offset=offset))


# ---- values that are laid out otherwise ----


def _arranged(piece: StoredTensor, shape: tuple[int, ...], change: Any, axes: int | None = None) -> StoredTensor:
    """Return a piece whose values `change` brings into the plan's shape, where they are as many; else the piece as it is."""
    data = piece.data
    if math.prod(data.shape) != math.prod(shape) or (axes is not None and len(data.shape) != axes):
        return piece  # which the match reports
    return replace(piece, data=rearranged(data, shape, change))


def _swap_axes(stored: Tensor) -> Tensor:
    """Bring the 12B's table of positions [axis, position, hidden] into its own order, [position, axis, hidden]."""
    return stored.transpose(0, 1)


def _channels_last(stored: Tensor, side: int) -> Tensor:
    """Bring values that run over colours, rows and columns of a patch into the order rows, columns, colours."""
    lead = stored.shape[0] if stored.dim() > 1 else 1
    patch = stored.reshape(lead, CHANNELS, side, side).permute(0, 2, 3, 1)
    return patch.reshape(-1) if stored.dim() == 1 else patch.reshape(lead, -1)


def _side(values: int) -> int:
    """Return the side of a square patch of so many values."""
    return math.isqrt(values // CHANNELS)


def _inverse_softplus(stored: Tensor) -> Tensor:
    """Undo the softplus that converters apply to the scales of audio queries."""
    values = stored.double()
    return (values + (-(-values).expm1()).log()).to(stored.dtype)


# ---- metadata as a config ----


def vision_config(source: Source, ignore: Sequence[str] = ()) -> VisionConfig | UnifiedVisionConfig | None:
    """Return the typed config of the vision tower in a GGUF file, None where there is none.

    Raises CheckpointError for another family's projector, ConfigError with all bad keys.
    """
    keys = _keys(source, "vision")
    if keys is None:
        return None
    prefix, model_type = keys
    raw = _vision(prefix, source) if model_type == "gemma4" else _unified_vision(prefix, source)
    _insist(prefix)
    return read_vision(raw, model_type, ignore, _where(source))


def audio_config(source: Source, ignore: Sequence[str] = ()) -> AudioConfig | UnifiedAudioConfig | None:
    """Return the typed config of the audio tower in a GGUF file, None where there is none. Raises as `vision_config` does."""
    keys = _keys(source, "audio")
    if keys is None:
        return None
    prefix, model_type = keys
    raw = _audio(prefix, source) if model_type == "gemma4" else {"audio_embed_dim": prefix.integer("embedding_length")}
    _insist(prefix)
    return read_audio(raw, model_type, ignore, _where(source))


def _keys(source: Source, tower: str) -> tuple[gguf.MetadataKeys, str] | None:
    """Return the metadata of a tower and the model type that it is of; None where the file has no such tower."""
    architecture = source.metadata.get(gguf.ARCHITECTURE)
    if next(tensors_of(source, tower), None) is None:
        return None
    if architecture != PROJECTOR:  # Ollama's, whose towers are the encoders
        return gguf.MetadataKeys(source.metadata, f"{architecture}.{tower}."), "gemma4"
    found = source.metadata.get(f"clip.{tower}.projector_type", source.metadata.get("clip.projector_type"))
    if found not in TYPES:
        known = ", ".join(TYPES)
        raise CheckpointError(f"{_where(source)}: a projector of type {shown(found)}; those of Gemma 4 are {known}")
    return gguf.MetadataKeys(source.metadata, f"clip.{tower}."), TYPES[found]


def _vision(keys: gguf.MetadataKeys, source: Source) -> dict[str, Any]:
    shapes = _Shapes(source)
    heads = keys.integer("attention.head_count")
    head_dim = shapes.rows("v.blk.0.attn_q_norm.weight", keys.integer("embedding_length") // max(heads, 1))
    return {
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": shapes.rows("v.blk.0.attn_k.weight", heads * head_dim) // max(head_dim, 1),
        "head_dim": head_dim,
        "patch_size": keys.integer("patch_size"),
        "pooling_kernel_size": keys.integer("projector.scale_factor", 3),
        "position_embedding_size": shapes.axis("v.position_embd.weight", 1, 10240),
        "rms_norm_eps": keys.number("attention.layer_norm_epsilon", 1e-6),
        "use_clipped_linears": shapes.clips("v."),
        "standardize": "v.std_bias" in source.tensors,
    }


def _unified_vision(keys: gguf.MetadataKeys, source: Source) -> dict[str, Any]:
    return {
        "mm_embed_dim": keys.integer("embedding_length"),
        "mm_posemb_size": _Shapes(source).axis("v.position_embd.weight", 1, 1120),
        "patch_size": keys.integer("patch_size"),
        "pooling_kernel_size": keys.integer("projector.scale_factor", 3),
        "rms_norm_eps": keys.number("attention.layer_norm_epsilon", 1e-6),
    }


def _audio(keys: gguf.MetadataKeys, source: Source) -> dict[str, Any]:
    """Format what is known of an audio encoder; its epsilon is left out, since converters once wrote a wrong one."""
    shapes, is_ollama = _Shapes(source), not source.tensors.keys().isdisjoint(OLLAMA)
    last = "mm.a.fc.weight" if is_ollama else "a.pre_encode.out.weight"
    return {
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": keys.integer("attention.head_count"),
        "conv_kernel_size": shapes.axis("a.blk.0.conv_dw.weight", -1, 5),
        "subsampling_conv_channels": [shapes.rows("a.conv1d.0.weight", 128), shapes.rows("a.conv1d.1.weight", 32)],
        "output_proj_dims": shapes.rows(last, 1536),
        "use_clipped_linears": shapes.clips("a."),
    }


class _Shapes:
    """The shapes of a file's tensors; a default for one that is missing, which the match will report."""

    def __init__(self, source: Source) -> None:
        self._tensors: Mapping[str, LazyTensor] = source.tensors

    def axis(self, name: str, axis: int, default: int) -> int:
        tensor = self._tensors.get(name)
        return default if tensor is None or len(tensor.shape) <= max(axis, 0) else tensor.shape[axis]

    def rows(self, name: str, default: int) -> int:
        return self.axis(name, 0, default)

    def clips(self, prefix: str) -> bool:
        """Return whether any linear of a tower has bounds."""
        return (prefix == "v." and CLAMPS in self._tensors) or any(
            name.startswith(prefix) and name.endswith(tuple(f".{bound}" for bound in BOUNDS)) for name in self._tensors
        )


def _insist(keys: gguf.MetadataKeys) -> None:
    if keys.problems:
        count = f"{len(keys.problems)} problem{'s' if len(keys.problems) > 1 else ''}"
        raise ConfigError(f"the metadata does not describe a tower of Gemma 4 ({count}); convert it again", keys.problems)


def _where(source: Source) -> str:
    return f"the metadata of {source.files[0].name}"
