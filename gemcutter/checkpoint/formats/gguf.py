"""GGUF checkpoints of Gemma 4 and Gemma 3, as llama.cpp's converter, its quantizer and Ollama write them.

Owns the translation from their tensor names and metadata keys; refuses to know bytes (`gguf_file.py`, `quant/gguf_blocks.py`) and
which layer needs what (`plan.py`). Metadata is put into the published spelling of config.json and read by `config.py`, so that
both say the same of one model. What a file does not say comes from its tensors: whether values have a projection of their own,
and how many pairs rotate. Norms of Gemma 3 have their 1 added already. Source: llama.cpp's gguf-py and its conversion scripts.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gemcutter import config as configs
from gemcutter.checkpoint.container.gguf_file import ASSISTANT, TENSOR_TYPES, Array
from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.plan import ModelPlan
from gemcutter.sidecar.small_file import shown
from gemcutter.sidecar.tokenizer_json import MARKER

if TYPE_CHECKING:  # headers are read without torch
    from gemcutter.quant.packed import Packed

NAME = "GGUF"

ARCHITECTURE = "general.architecture"
CENTROIDS = 32  # nearest ones whose tokens an assistant may draft, as in all that are published; no key says so
DENSE = ("F32", "F16", "BF16")
# Those that `quant/gguf_blocks.py` decodes, listed here so that a header can be judged without torch.
BLOCKS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    *("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "MXFP4", "NVFP4"),
)
BLOCK_VALUES = {name: values for name, values, _ in TENSOR_TYPES.values()}
# Projectors and towers that Ollama puts into the same file.
TOWER_PREFIXES = {"v.": "(vision tower)", "mm.a.": "(audio tower)", "mm.": "(vision tower)", "a.": "(audio tower)"}
ROPE_DIVISORS = "rope_freqs.weight"
FLOAT32 = 6  # as the container numbers them
MOST_DIVISORS = 1 << 16  # one for each pair of a head's dimensions; real files have 256
SWITCHED_OFF = 1e29  # a divisor above this stops a pair: converters write 1e30

GLOBALS: dict[str, tuple[str, str | None]] = {
    "token_embd.weight": ("embed.tokens", None),
    "per_layer_token_embd.weight": ("embed.ple", None),
    "per_layer_model_proj.weight": ("ple.in", None),
    "per_layer_proj_norm.weight": ("ple.norm", None),
    "output_norm.weight": ("norm", None),
    "output.weight": ("head", None),
    "nextn.pre_projection.weight": ("draft.in", None),
    "nextn.post_projection.weight": ("draft.out", None),
    "masked_embd_centroids.weight": ("draft.centroids", None),
    "masked_embd_ordering": ("draft.order", None),
}
LAYERED: dict[str, tuple[str, str | None]] = {
    "attn_norm.weight": ("attn.norm", None),
    "attn_q.weight": ("attn.in", "q"),
    "attn_k.weight": ("attn.in", "k"),
    "attn_v.weight": ("attn.in", "v"),
    "attn_qkv.weight": ("attn.in", None),
    "attn_q_norm.weight": ("attn.q_norm", None),
    "attn_k_norm.weight": ("attn.k_norm", None),
    "attn_output.weight": ("attn.out", None),
    "post_attention_norm.weight": ("attn.post_norm", None),
    "ffn_norm.weight": ("mlp.norm", None),
    "ffn_gate.weight": ("mlp.in", "gate"),
    "ffn_up.weight": ("mlp.in", "up"),
    "ffn_down.weight": ("mlp.out", None),
    "post_ffw_norm.weight": ("mlp.post_norm", None),
    "post_ffw_norm_1.weight": ("mlp.branch_norm", None),
    "pre_ffw_norm_2.weight": ("moe.norm", None),
    "post_ffw_norm_2.weight": ("moe.branch_norm", None),
    "ffn_gate_inp.weight": ("moe.router", None),
    "ffn_gate_inp.scale": ("moe.router_scale", None),
    "ffn_gate_up_exps.weight": ("moe.in", None),
    "ffn_gate_exps.weight": ("moe.in", "gate"),
    "ffn_up_exps.weight": ("moe.in", "up"),
    "ffn_down_exps.weight": ("moe.out", None),
    "ffn_down_exps.scale": ("moe.expert_scale", None),
    "inp_gate.weight": ("ple.gate", None),
    "proj.weight": ("ple.out", None),
    "post_norm.weight": ("ple.post_norm", None),
    "layer_output_scale.weight": ("scale", None),
}
LAYER = re.compile(r"blk\.([0-9]{1,9})\.(.+)")

# Keys of a model that say nothing about the decoder's maths.
IGNORED = ("vocab_size", "attention.causal", "vision.*", "audio.*", "mm.*")
MAX_LAYERS = 4096


def sniff(source: Source) -> bool:
    """Recognise the one key that every GGUF file has."""
    return ARCHITECTURE in source.metadata


def translate(name: str) -> tuple[str | None, str | None]:
    """Return a tensor's canonical name and part; None for what the format does not know."""
    for prefix, kind in TOWER_PREFIXES.items():
        if name.startswith(prefix):
            return kind, None
    layer = LAYER.fullmatch(name)
    if layer and layer[2] in LAYERED:
        canonical, part = LAYERED[layer[2]]
        return f"layers.{int(layer[1])}.{canonical}", part
    return GLOBALS.get(name, (None, None))


def spell(name: str, part: str | None) -> str:
    """Return the name that llama.cpp's converter writes for a canonical parameter or part; the inverse of `translate`."""
    section, _, rest = name.partition(".")
    if section != "layers":
        return next(own for own, canonical in GLOBALS.items() if canonical == (name, part))
    index, _, rest = rest.partition(".")
    return f"blk.{index}." + next(own for own, canonical in LAYERED.items() if canonical == (rest, part))


def pieces(source: Source, plan: ModelPlan) -> Iterator[StoredTensor]:
    """Yield every stored tensor under its canonical name, but for the rope's divisors, which `config` has read."""
    for tensor in source.tensors.values():
        if tensor.name != ROPE_DIVISORS:
            yield _decoder_piece(tensor, *translate(tensor.name), plan)


def _decoder_piece(tensor: LazyTensor, name: str | None, part: str | None, plan: ModelPlan) -> StoredTensor:
    found = piece(tensor, name, part)
    if name == "embed.ple" and tensor.dtype in BLOCKS and plan.ple_dim % BLOCK_VALUES[tensor.dtype]:
        blocks = f"{tensor.dtype}'s blocks of {BLOCK_VALUES[tensor.dtype]}"
        return replace(found, fault=f"{blocks} span several layers of {plan.ple_dim} values each")
    return found


def piece(tensor: LazyTensor, name: str | None, part: str | None) -> StoredTensor:
    """Return a stored tensor under its canonical name, packed where it is stored in blocks."""
    if name is None or name.startswith("(") or tensor.dtype in DENSE or len(tensor.shape) < 2:
        return StoredTensor(name, part, tensor)
    if tensor.dtype not in BLOCKS:
        able = ", ".join((*DENSE, *BLOCKS))
        return StoredTensor(
            name, part, tensor, f"{tensor.dtype} is not read, only {able}; take another quantization of this model"
        )
    return StoredTensor(name, part, PackedTensor(tensor.name, tensor.dtype, tensor.shape, (tensor,), partial(_unpack, tensor)))


def _unpack(tensor: LazyTensor) -> Packed:
    from gemcutter.quant import gguf_blocks

    return gguf_blocks.from_arrays(tensor.raw(), tensor.dtype, tensor.shape)


# ---- metadata as a config ----


class MetadataKeys:
    """The metadata of one architecture: hands out typed values, and reports what was wrong or never asked for."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self.metadata, self.prefix = metadata, prefix
        self.seen, self.problems = set[str](), list[str]()

    def problem(self, key: str, text: str) -> None:
        self.problems.append(f"{self.prefix}{key}: {text}")

    def get(self, key: str) -> Any:
        self.seen.add(key)
        return self.metadata.get(self.prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        return self.each(key, 1, default)[0]

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.problem(key, f"expected a finite number, found {shown(value)}")
            return default
        return float(f"{value:.7g}")  # stored in 32 bits: 1e-6 comes back as 9.999999974752427e-07

    def each(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """Return a number for each layer, whether stored once or as an array."""
        value = self.get(key)
        if value is None:
            if default is None:
                self.problem(key, "missing; a file of this architecture has it")
            return [default or 0] * layers
        found = [value] * layers
        if isinstance(value, Array):
            found = _decode(value, self.prefix + key) if len(value) == layers else []
        if len(found) != layers or any(isinstance(n, bool) or not isinstance(n, int) for n in found):
            what = "an integer" if layers == 1 else f"an integer, or one for each of {layers} layers"
            self.problem(key, f"expected {what}, found {shown(value)}")
            return [default or 0] * layers
        return found

    def insist(self, key: str, wanted: float) -> None:
        """Report a key whose value, if there is one, is not the only one that is possible here."""
        if self.get(key) is not None and self.number(key, wanted) != wanted:
            self.problem(key, f"expected {wanted:g}, found {shown(self.get(key))}")

    def refuse_rest(self, ignore: Sequence[str]) -> None:
        for key in sorted(self.metadata):
            own = key.removeprefix(self.prefix)
            patterns = (*(self.prefix + pattern for pattern in IGNORED), *ignore)
            if own != key and own not in self.seen and not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
                self.problem(own, f"unknown key ({shown(self.metadata[key])}); if it can't change the maths, pass --ignore {key}")


def config(source: Source, ignore: Sequence[str] = ()) -> configs.ModelConfig:
    """Read the config from the metadata. Raises CheckpointError for another architecture, ConfigError with all bad keys."""
    architecture = source.metadata[ARCHITECTURE]
    describe = (
        {"gemma4": _gemma4, ASSISTANT: _gemma4, "gemma3": _gemma3}.get(architecture) if isinstance(architecture, str) else None
    )
    where = source.files[0].name
    if describe is None:
        kind = KINDS.get(architecture) if isinstance(architecture, str) else None
        raise CheckpointError(f"{where} is {kind or f'of the architecture {shown(architecture)}'}; {_REMEDY}")
    keys = MetadataKeys(source.metadata, f"{architecture}.")
    layers = keys.integer("block_count")
    if not 0 < layers <= MAX_LAYERS:
        raise ConfigError(f"{where} does not describe a Gemma model", [f"{architecture}.block_count: {layers} layers"])
    raw = _shape(keys, source, layers) | describe(keys, source, layers)
    if architecture == ASSISTANT:
        raw = _assistant(keys, source, raw)
    keys.refuse_rest(ignore)
    if keys.problems:
        count = f"{len(keys.problems)} problem{'s' if len(keys.problems) > 1 else ''}"
        raise ConfigError(f"the metadata of {where} does not describe a Gemma model ({count})", keys.problems)
    return replace(configs.read(raw, f"the metadata of {where}", ignore), norm_offset=0.0)


KINDS = {
    "clip": "a projector for images and audio, which runs beside a model",
}
_REMEDY = "this version reads the text models gemma4 and gemma3, and gemma4-assistant: pass the file of one"


def _shape(keys: MetadataKeys, source: Source, layers: int) -> dict[str, Any]:
    """Format what both families have."""
    stops = [source.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    raw = {
        "vocab_size": _rows(source, "token_embd.weight"),
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": keys.integer("attention.head_count"),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        "sliding_window": keys.integer("attention.sliding_window"),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "eos_token_id": [stop for stop in stops if stop is not None],
        "pad_token_id": source.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return raw | {"layer_types": _layer_types(keys, layers)}


def _rows(source: Source, name: str) -> int | None:
    """Count a table's rows; None, for which a config has a default, where the match will report that the table is missing."""
    return source.tensors[name].shape[0] if name in source.tensors else None


def _layer_types(keys: MetadataKeys, layers: int) -> list[str]:
    """Read which layers see a window only: a flag for each, or the period of those that see all."""
    found = keys.get("attention.sliding_window_pattern")
    if isinstance(found, Array) and len(found) == layers:
        flags = _decode(found, "attention.sliding_window_pattern")
    else:
        period = keys.integer("attention.sliding_window_pattern", 6)
        flags = [(index + 1) % max(period, 1) != 0 for index in range(layers)]
    return [configs.SLIDING if flag else configs.FULL for flag in flags]


def _gemma4(keys: MetadataKeys, source: Source, layers: int) -> dict[str, Any]:
    kinds, shared = _layer_types(keys, layers), keys.integer("attention.shared_kv_layers", 0)
    kv_heads, widths = keys.each("attention.head_count_kv", layers), keys.each("feed_forward_length", layers)
    first_shared = layers - min(max(shared, 0), layers)
    is_double = first_shared < layers and widths[-1] == 2 * widths[0]
    expected = [widths[0] * (2 if is_double and index >= first_shared else 1) for index in range(layers)]
    if widths != expected:
        keys.problem("feed_forward_length", f"expected {shown(expected)} with {shared} shared layers, found {shown(widths)}")
    usual = kv_heads[kinds.index(configs.SLIDING)] if configs.SLIDING in kinds else kv_heads[0]
    writers = [index for index in range(first_shared) if kinds[index] == configs.FULL]
    for name in ("key", "value"):  # one number for each kind of layer
        keys.insist(f"attention.{name}_length", keys.integer("attention.key_length"))
        keys.insist(f"attention.{name}_length_swa", keys.integer("attention.key_length_swa"))
    keys.insist("rope.dimension_count", keys.integer("attention.key_length"))
    keys.insist("rope.dimension_count_swa", keys.integer("attention.key_length_swa"))
    keys.insist("attention.scale", 1.0)
    ple = keys.integer("embedding_length_per_layer_input", 0)
    return {
        "model_type": "gemma4_text",
        "intermediate_size": widths[0],
        "use_double_wide_mlp": is_double,
        "num_kv_shared_layers": shared,
        "num_key_value_heads": usual,
        "per_layer_config": {str(i): {"num_key_value_heads": n} for i, n in enumerate(kv_heads) if n != usual},
        "head_dim": keys.integer("attention.key_length_swa"),
        "global_head_dim": keys.integer("attention.key_length"),
        "attention_k_eq_v": bool(writers) and all(_has_no_values(source, index) for index in writers),
        "hidden_size_per_layer_input": ple,
        # No key says so: models without per-layer embeddings were trained with blocks of images that see themselves.
        "use_bidirectional_attention": None if ple or keys.prefix.startswith(ASSISTANT) else "vision",
        "vocab_size_per_layer_input": _rows(source, "per_layer_token_embd.weight") if ple else None,
        "rope_parameters": {
            configs.SLIDING: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 1e4)},
            configs.FULL: {
                "rope_type": "proportional",
                "rope_theta": keys.number("rope.freq_base", 1e6),
                "partial_rotary_factor": _partial_rotary(keys, source),
            },
        },
    } | _experts(keys)


def _assistant(keys: MetadataKeys, source: Source, text: dict[str, Any]) -> dict[str, Any]:
    """Return the config of an assistant around that of its layers, all of which read their target's keys and values."""
    keys.integer("nextn_predict_layers", 0)  # the number of layers once more
    centroids = _rows(source, "masked_embd_centroids.weight")  # llama.cpp's converter leaves them out
    layers = {"num_kv_shared_layers": text["num_hidden_layers"], "use_double_wide_mlp": False}
    layers["attention_k_eq_v"] = bool(text["per_layer_config"])  # only such targets have fewer key heads in global layers
    found: dict[str, Any] = {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": keys.integer("embedding_length_out"),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "use_ordered_embeddings": centroids is not None,
        "text_config": text | layers,
    }
    if centroids is not None:
        found |= {"num_centroids": centroids, "centroid_intermediate_top_k": CENTROIDS}
    return found


def _has_no_values(source: Source, index: int) -> bool:
    return f"blk.{index}.attn_k.weight" in source.tensors and f"blk.{index}.attn_v.weight" not in source.tensors


def _experts(keys: MetadataKeys) -> dict[str, Any]:
    experts, used, width = (keys.integer(key, 0) for key in ("expert_count", "expert_used_count", "expert_feed_forward_length"))
    moe = {"enable_moe_block": True, "num_experts": experts, "top_k_experts": used, "moe_intermediate_size": width}
    return moe if experts else {}


def _partial_rotary(keys: MetadataKeys, source: Source) -> float:
    """Return the part of the pairs that rotate in global layers: the divisors of all others are huge."""
    usual, divisors = 0.25, source.tensors.get(ROPE_DIVISORS)
    if divisors is None:
        return usual
    values: list[float] = []
    if divisors.dtype == "F32" and len(divisors.shape) == 1 and divisors.shape[0] <= MOST_DIVISORS:
        values = _decode(Array(FLOAT32, divisors.shape[0], divisors.offset, divisors.nbytes, divisors.mapped), ROPE_DIVISORS)
    rotating = sum(1 for value in values if value == 1.0)
    if not rotating or not all(value >= SWITCHED_OFF for value in values[rotating:]):
        keys.problems.append(f"{divisors.origin}: expected ones and then huge divisors in F32, as in every Gemma 4")
        return usual
    return rotating / len(values)


def _gemma3(keys: MetadataKeys, source: Source, layers: int) -> dict[str, Any]:
    heads, head_dim = keys.integer("attention.head_count"), keys.integer("attention.key_length", 256)
    for name in ("value_length", "key_length_swa", "value_length_swa"):
        keys.insist(f"attention.{name}", head_dim)
    keys.insist("rope.dimension_count", head_dim)
    # Only 27B, the one with 62 layers, scales its queries by another number than the size of a head; no key says so.
    scalar = keys.integer("embedding_length") / max(heads, 1) if layers == 62 else head_dim
    scale = keys.number("attention.scale", scalar**-0.5 if scalar > 0 else 1.0)
    if not 1e-6 < scale < 1e6:
        keys.problem("attention.scale", f"found {scale:g}, which can't be")
        scale = 1.0
    scaling, factor = keys.get("rope.scaling.type"), keys.number("rope.scaling.factor", 1.0)
    if scaling not in (None, "none", "linear"):
        keys.problem("rope.scaling.type", f"expected linear or none, found {shown(scaling)}")
    return {
        "model_type": "gemma3_text",
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_key_value_heads": keys.integer("attention.head_count_kv"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar if keys.get("attention.scale") is None else scale**-2,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 1e4),
        "rope_theta": keys.number("rope.freq_base", 1e6),
        "rope_scaling": {"rope_type": "linear", "factor": factor} if scaling == "linear" else None,
    }


def _decode(array: Array, key: str) -> list[Any]:
    try:
        return array.decode()
    except ValueError as error:
        raise CheckpointError(f"{array.stored.path}: the metadata {key} {error}") from error


# ---- what else the metadata brings: vocabulary, chat template, sampling ----

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token", "mask": "mask_token"}
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer is made of: pieces by id, and merges, "left right", best first, or else the score of each plain piece.

    `markers` are ids that stand for no text, `unused` those of pieces that only pad the vocabulary; `literals` are found in a
    text before anything is merged; `special_tokens` are pieces under the names that chat templates use.
    """

    pieces: list[str]
    merges: list[str] | None
    scores: dict[str, float]
    markers: list[int]
    literals: list[int]
    unused: list[int]
    special_tokens: dict[str, str]


def vocabulary(source: Source) -> Vocabulary | None:
    """Read the vocabulary, None if the file has none. Raises CheckpointError for one that is damaged or not of Gemma's kind."""
    tokens, types, scores, merges = (
        source.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "scores", "merges")
    )
    if tokens is None:
        return None
    pieces: list[str] = _list(source, "tokens", tokens, str)
    kinds: list[int] = _list(source, "token_type", types, int, len(pieces))
    others = [i for i, kind in enumerate(kinds) if kind != NORMAL]  # a few thousand
    pairs: list[str] | None = None if merges is None else _list(source, "merges", merges, str)
    for merge in pairs or ():
        if not 0 < merge.find(" ") < len(merge) - 1:
            raise CheckpointError(
                f"{source.files[0]}: tokenizer.ggml.merges holds {shown(merge)}, expected two pieces and a space"
            )
    plain = dict[str, float]()
    if pairs is None:
        ranks: list[float] = _list(source, "scores", scores, float, len(pieces))
        plain = dict(zip(pieces, ranks, strict=True))
        for i in others:
            if kinds[i] in (CONTROL, USER_DEFINED, BYTE, UNKNOWN):
                plain.pop(pieces[i], None)
    hidden = {i for i in others if kinds[i] in (CONTROL, UNKNOWN)}
    hidden |= {i for i, piece in enumerate(pieces) if piece[:1] == "<" and MARKER.fullmatch(piece)}
    literals = [i for i in others if kinds[i] == USER_DEFINED and i not in hidden]
    unused = [i for i in others if kinds[i] == UNUSED]
    ids = {name: source.metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL.items()}
    named = {name: pieces[i] for name, i in ids.items() if isinstance(i, int) and i < len(pieces)}
    return Vocabulary(pieces, pairs, plain, sorted(hidden), literals, unused, named)


def _list(source: Source, name: str, value: object, kind: type, count: int | None = None) -> list[Any]:
    key = f"tokenizer.ggml.{name}"
    found = _decode(value, key) if isinstance(value, Array) and count in (None, len(value)) else None
    if not found or not isinstance(found[0], kind):
        what = f"{kind.__name__} for each of {count} tokens" if count else kind.__name__
        raise CheckpointError(
            f"{source.files[0]}: the metadata {key} is {shown(value)}, expected an array of {what}; convert the model again"
        )
    return found


TEMPLATE = "tokenizer.chat_template"


def chat_templates(source: Source) -> Iterator[tuple[str, str, str]]:
    """Yield each chat template's name, key and text, the default first; none where the file has none, as base models."""
    for key in sorted(key for key in source.metadata if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")):
        text = source.metadata[key]
        if isinstance(text, str):
            yield key.removeprefix(TEMPLATE).removeprefix(".") or "default", key, text


def generation(source: Source) -> dict[str, Any]:
    """Format the sampling that the file recommends as generation_config.json would."""
    found = {own: source.metadata.get(f"general.sampling.{key}") for key, own in SAMPLING.items()}
    return {
        own: float(f"{value:.7g}") if isinstance(value, float) else value for own, value in found.items() if value is not None
    }
