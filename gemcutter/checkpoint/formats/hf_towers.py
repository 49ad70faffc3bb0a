"""Tensor names of vision and audio towers in Hugging Face layouts, and their canonical ones.

Owns the names of towers and of their projectors; `hf.py` strips prefixes and tells towers from the decoder. Refuses to know
shapes. Source: google/gemma-4-* and transformers; the 12B's published names differ from those inside transformers, and both are
read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import StoredTensor, rearranged
from gemcutter.checkpoint.formats import hf
from gemcutter.param_spec import ParamKind, ParamSpec
from gemcutter.tower_plan import TowerPlan

Name = tuple[str, str | None]  # canonical, and the part of it that is stored under the name

GLOBALS: dict[str, str] = {
    "vision_tower.patch_embedder.input_proj.weight": "vision.patch",
    "vision_tower.patch_embedder.position_embedding_table": "vision.positions",
    "vision_tower.std_bias": "vision.std_bias",
    "vision_tower.std_scale": "vision.std_scale",
    "embed_vision.embedding_projection.weight": "vision.out",
    "embed_vision.multimodal_embedder.embedding_projection.weight": "vision.out",
    "vision_embedder.patch_ln1.weight": "vision.patch_norm",
    "vision_embedder.patch_ln1.bias": "vision.patch_norm.bias",
    "vision_embedder.patch_dense.weight": "vision.patch",
    "vision_embedder.patch_dense.bias": "vision.patch.bias",
    "vision_embedder.patch_ln2.weight": "vision.norm",
    "vision_embedder.patch_ln2.bias": "vision.norm.bias",
    "vision_embedder.pos_embedding": "vision.positions",
    "vision_embedder.pos_norm.weight": "vision.position_norm",
    "vision_embedder.pos_norm.bias": "vision.position_norm.bias",
    "audio_tower.subsample_conv_projection.layer0.conv.weight": "audio.conv.0",
    "audio_tower.subsample_conv_projection.layer0.norm.weight": "audio.conv.0.norm",
    "audio_tower.subsample_conv_projection.layer1.conv.weight": "audio.conv.1",
    "audio_tower.subsample_conv_projection.layer1.norm.weight": "audio.conv.1.norm",
    "audio_tower.subsample_conv_projection.input_proj_linear.weight": "audio.in",
    "audio_tower.output_proj.weight": "audio.last",
    "audio_tower.output_proj.bias": "audio.last.bias",
    "embed_audio.embedding_projection.weight": "audio.out",
}
QKV: dict[str, Name] = {f"self_attn.{part}_proj": ("attn.in", part) for part in ("q", "k", "v")}
# Linears of layers: their weights end with ".linear.weight", their clip bounds with the bound's name.
LINEARS: dict[str, dict[str, Name]] = {
    "vision": QKV
    | {
        "self_attn.o_proj": ("attn.out", None),
        "mlp.gate_proj": ("mlp.in", "gate"),
        "mlp.up_proj": ("mlp.in", "up"),
        "mlp.down_proj": ("mlp.out", None),
    },
    "audio": QKV
    | {
        "self_attn.post": ("attn.out", None),
        "lconv1d.linear_start": ("conv.in", None),
        "lconv1d.linear_end": ("conv.out", None),
        "feed_forward1.ffw_layer_1": ("ff1.in", None),
        "feed_forward1.ffw_layer_2": ("ff1.out", None),
        "feed_forward2.ffw_layer_1": ("ff2.in", None),
        "feed_forward2.ffw_layer_2": ("ff2.out", None),
    },
}
LAYERED: dict[str, dict[str, str]] = {
    "vision": {
        "input_layernorm.weight": "attn.norm",
        "self_attn.q_norm.weight": "attn.q_norm",
        "self_attn.k_norm.weight": "attn.k_norm",
        "post_attention_layernorm.weight": "attn.post_norm",
        "pre_feedforward_layernorm.weight": "mlp.norm",
        "post_feedforward_layernorm.weight": "mlp.post_norm",
    },
    "audio": {
        "norm_pre_attn.weight": "attn.norm",
        "self_attn.per_dim_scale": "attn.q_scale",
        "self_attn.relative_k_proj.weight": "attn.relative",
        "norm_post_attn.weight": "attn.post_norm",
        "lconv1d.pre_layer_norm.weight": "conv.norm",
        "lconv1d.depthwise_conv1d.weight": "conv.depthwise",
        "lconv1d.conv_norm.weight": "conv.inner_norm",
        "norm_out.weight": "norm",
        **{f"feed_forward{n}.pre_layer_norm.weight": f"ff{n}.norm" for n in (1, 2)},
        **{f"feed_forward{n}.post_layer_norm.weight": f"ff{n}.post_norm" for n in (1, 2)},
    },
}
VESTIGES = re.compile(r"embed_(?:vision|audio)\.embedding\.")  # of an older design
LAYER = re.compile(r"(vision|audio)_tower\.(?:encoder\.)?layers\.([0-9]{1,9})\.(.+)")
LINEAR = re.compile(r"(.+?)\.(?:linear\.weight|((?:input|output)_(?:min|max)))")


def pieces(source: Source, tower: str, plan: TowerPlan) -> Iterator[StoredTensor]:
    """Yield the stored tensors of a tower, "vision" or "audio", under their canonical names; `name` None for unknown ones."""
    specs = {spec.name: spec for spec in plan.params()}
    for tensor in tensors_of(source, tower):
        yield channels_first(piece(tensor), specs)


def tensors_of(source: Source, tower: str) -> Iterator[LazyTensor]:
    """Yield the tensors of a tower and its projector, without leftovers of other designs and engines."""
    for tensor in source.tensors.values():
        bare = hf.strip(tensor.name)
        if hf.tower_kind(bare) == f"({tower} tower)" and not hf.VESTIGES.search(bare) and not VESTIGES.match(bare):
            yield tensor


def piece(tensor: LazyTensor) -> StoredTensor:
    """Name one tensor of a tower canonically; `name` stays None for what the format does not know."""
    name, part = translate(hf.strip(tensor.name)) or (None, None)
    return StoredTensor(name, part, tensor)


def channels_first(piece: StoredTensor, specs: Mapping[str, ParamSpec]) -> StoredTensor:
    """Return a convolution with its channels where the plan has them; MLX keeps them last, whatever else a file looks like."""
    spec, data = specs.get(piece.name or ""), piece.data
    if spec is None or spec.kind is not ParamKind.CONV or not isinstance(data, LazyTensor) or data.shape == spec.shape:
        return piece
    if len(data.shape) != len(spec.shape) or (data.shape[0], data.shape[-1], *data.shape[1:-1]) != spec.shape:
        return piece  # which the match reports
    return replace(piece, data=rearranged(data, spec.shape, lambda stored: stored.movedim(-1, 1)))


def translate(bare: str) -> Name | None:
    """Return the canonical name and part of a tower's tensor, stored under `bare` after its prefix; None for what is unknown."""
    inner = re.sub(r"^embed_vision\.(?=patch_|pos_)", "vision_embedder.", bare)  # as transformers names them itself
    if inner in GLOBALS:
        return GLOBALS[inner], None
    layer = LAYER.fullmatch(bare)
    if not layer:
        return None
    tower, index, rest = layer.groups()
    prefix = f"{tower}.layers.{int(index)}."
    if rest in LAYERED[tower]:
        return prefix + LAYERED[tower][rest], None
    linear = LINEAR.fullmatch(rest)
    if not linear or linear[1] not in LINEARS[tower]:
        return None
    name, part = LINEARS[tower][linear[1]]
    if linear[2]:
        return ".".join([prefix + name, *([part] if part else []), linear[2]]), None
    return prefix + name, part


def spell(name: str, part: str | None) -> str:
    """Return the name that `save_pretrained` writes for a tower's canonical parameter or part; the inverse of `translate`."""
    owned = [own for own, canonical in GLOBALS.items() if canonical == name]
    if owned:
        return f"model.{owned[0]}"
    tower, _, rest = name.partition(".layers.")
    index, _, rest = rest.partition(".")
    prefix = f"model.vision_tower.encoder.layers.{index}." if tower == "vision" else f"model.audio_tower.layers.{index}."
    for own, canonical in LAYERED[tower].items():
        if canonical == rest:
            return prefix + own
    for own, linear in LINEARS[tower].items():
        if linear == (rest, part):
            return f"{prefix}{own}.linear.weight"
        stem, _, bound = rest.rpartition(".")
        if ".".join(filter(None, linear)) == stem:
            return f"{prefix}{own}.{bound}"
    raise KeyError(name)
