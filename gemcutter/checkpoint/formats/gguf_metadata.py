"""Writes the metadata of a GGUF file as llama.cpp reads it: the decoder, the tokenizer, the sampling defaults.

Owns the keys under `gemma4.` and `tokenizer.`, with the type of each value. Refuses to know bytes (`write_gguf.py`) and tensors
(`gguf.py`, which also reads what this writes). Source: the files that llama.cpp's converter makes of this family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemcutter.checkpoint.container.gguf_file import ASSISTANT, Array
from gemcutter.config import ModelConfig
from gemcutter.errors import CheckpointError
from gemcutter.plan import Attn, ModelPlan
from gemcutter.sidecar.templates import DEFAULT
from gemcutter.sidecar.tokenizer_json import add_config_tokens, check_kind

Entry = tuple[str, str, object]

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # llama.cpp's kinds of tokens
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Markers that a chat parser must see in the text: as control tokens they would not be printed.
VISIBLE = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
TEMPLATE = "tokenizer.chat_template"
SCORE = -1000.0  # of every piece: the merges say in which order a text is put together
# llama.cpp's number for a file most of which is stored so; of the mixtures with one block type, the plainest.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "IQ3_S": 26,
    "IQ3_XXS": 23,
    "IQ2_S": 28,
    "IQ2_XS": 20,
    "IQ2_XXS": 19,
    "IQ1_M": 31,
    "IQ1_S": 24,
    "TQ2_0": 37,
    "TQ1_0": 36,
    "BF16": 32,
    "MXFP4": 38,
    "NVFP4": 39,
}
UNKNOWN_TYPE = 1024  # "guessed": a file that does not say
# Of another GGUF file: how it was laid out, not what is in it.
OF_THE_FILE = ("general.alignment", "split.")
KEPT = ("tokenizer.", "general.")  # also where weights change
OWN = ("gemcutter.",)  # written anew
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
FALLBACKS = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
ARRAY_KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "", "u64", "i64", "f64")  # by GGUF's numbers
SCALAR_KINDS = {bool: "bool", int: "u32", float: "f32", str: "str"}
SAMPLING = {"top_k": "i32", "top_p": "f32", "temperature": "f32"}


def describe(config: ModelConfig, plan: ModelPlan, name: str, usual_type: str) -> list[Entry]:
    """Return what the decoder is; `usual_type` is how most of its bytes are stored."""
    own, layers = ASSISTANT if plan.is_drafter else "gemma4", plan.layers
    widest = next(layer for layer in layers if layer.attn is Attn.GLOBAL)
    narrow = next((layer for layer in layers if layer.attn is Attn.SLIDING), widest)
    found: list[Entry] = [
        ("general.architecture", "str", own),
        ("general.type", "str", "model"),
        ("general.name", "str", name),
        ("general.file_type", "u32", FILE_TYPES.get(usual_type, UNKNOWN_TYPE)),
        ("general.quantization_version", "u32", 2),
        (f"{own}.block_count", "u32", len(layers)),
        (f"{own}.context_length", "u32", plan.context),
        (f"{own}.embedding_length", "u32", plan.hidden),
        _one_or_each(f"{own}.feed_forward_length", [layer.mlp_width for layer in layers]),
        (f"{own}.attention.head_count", "u32", widest.heads),
        _one_or_each(f"{own}.attention.head_count_kv", [layer.kv_heads for layer in layers]),
        (f"{own}.attention.layer_norm_rms_epsilon", "f32", plan.eps),
        (f"{own}.attention.key_length", "u32", widest.head_dim),
        (f"{own}.attention.value_length", "u32", widest.head_dim),
        (f"{own}.attention.key_length_swa", "u32", narrow.head_dim),
        (f"{own}.attention.value_length_swa", "u32", narrow.head_dim),
        (f"{own}.attention.sliding_window", "u32", config.text.sliding_window),
        (f"{own}.attention.sliding_window_pattern", "[bool]", [layer.attn is Attn.SLIDING for layer in layers]),
        (f"{own}.attention.shared_kv_layers", "u32", sum(not layer.writes for layer in layers)),
        (f"{own}.rope.freq_base", "f32", widest.rope.theta),
        (f"{own}.rope.freq_base_swa", "f32", narrow.rope.theta),
        (f"{own}.rope.dimension_count", "u32", widest.head_dim),
        (f"{own}.rope.dimension_count_swa", "u32", narrow.head_dim),
        (f"{own}.embedding_length_per_layer_input", "u32", plan.ple_dim),
    ]
    if plan.backbone is not None:
        found.append((f"{own}.embedding_length_out", "u32", plan.backbone))
        found.append((f"{own}.nextn_predict_layers", "u32", len(layers)))
    if plan.softcap is not None:
        found.append((f"{own}.final_logit_softcapping", "f32", plan.softcap))
    if widest.moe:
        found.append((f"{own}.expert_count", "u32", widest.moe.experts))
        found.append((f"{own}.expert_used_count", "u32", widest.moe.top_k))
        found.append((f"{own}.expert_feed_forward_length", "u32", widest.moe.width))
    return found


def frequencies(plan: ModelPlan) -> list[float]:
    """Return the divisors of the global layers' rotary frequencies: 1, and for pairs that do not rotate one that stops them."""
    rope = next(layer.rope for layer in plan.layers if layer.attn is Attn.GLOBAL)
    return [1.0 if pair < rope.pairs else 1e30 for pair in range(rope.head_dim // 2)]


def tokenizer(
    raw: Mapping[str, Any], special: Mapping[str, Any], templates: Mapping[str, str], vocab: int, origin: str
) -> list[Entry]:
    """Format the tokenizer of `raw`, a tokenizer.json; `special` is tokenizer_config.json, `templates` are the chat templates.

    Raises CheckpointError if it is not BPE with byte fallback, or has pieces beyond the model's `vocab`.
    """
    check_kind(raw, origin)
    raw, _ = add_config_tokens(dict(raw), special)
    model = raw["model"]
    added = [token for token in raw.get("added_tokens") or () if isinstance(token, dict) and "content" in token]
    ids: dict[str, Any] = {**model["vocab"], **{token["content"]: token.get("id") for token in added}}
    bad = [piece for piece, id in ids.items() if not isinstance(piece, str) or type(id) is not int or not 0 <= id < vocab]
    if bad:
        raise CheckpointError(f"{origin}: {len(bad)} pieces have no id below the model's {vocab:,}, such as {bad[0]!r:.80}")
    pieces: list[str | None] = [None] * vocab
    for piece, id in ids.items():
        pieces[id] = piece
    marked = {token["content"] for token in added if token.get("special")}
    kinds = [UNUSED if piece is None else _kind(piece, marked) for piece in pieces]
    return [
        ("tokenizer.ggml.model", "str", "gemma4"),
        ("tokenizer.ggml.tokens", "[str]", [f"[PAD{id}]" if piece is None else piece for id, piece in enumerate(pieces)]),
        ("tokenizer.ggml.scores", "[f32]", [SCORE] * vocab),
        ("tokenizer.ggml.token_type", "[i32]", kinds),
        ("tokenizer.ggml.merges", "[str]", _merges(model.get("merges"), origin)),
        *_named_ids(ids, special),
        ("tokenizer.ggml.add_bos_token", "bool", True),
        ("tokenizer.ggml.add_eos_token", "bool", False),
        ("tokenizer.ggml.add_space_prefix", "bool", False),
        *_chat_templates(templates),
    ]


def _chat_templates(templates: Mapping[str, str]) -> list[Entry]:
    """Format chat templates: the default, those with names of their own, and the list of those names."""
    names = [name for name in templates if name != DEFAULT]
    found: list[Entry] = [(TEMPLATE if name == DEFAULT else f"{TEMPLATE}.{name}", "str", templates[name]) for name in templates]
    return [*found, *([("tokenizer.chat_templates", "[str]", names)] if names else [])]


def sampling(generation: Mapping[str, Any]) -> list[Entry]:
    """Format the sampling defaults of a generation_config.json."""
    numbers = {key: generation.get(key) for key in SAMPLING}
    return [
        (f"general.sampling.{'temp' if key == 'temperature' else key}", SAMPLING[key], value)
        for key, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and (SAMPLING[key] == "f32" or value == int(value))
    ]


def carried_over(metadata: Mapping[str, Any], described: Sequence[Entry], *, is_copy: bool) -> list[Entry]:
    """Format again what another GGUF file says, beside what is described anew of its decoder.

    A copy says all that its source did, its name and file type included; where weights change, the name, the tokenizer, the
    sampling and the origin are kept.
    """
    found = list[Entry]()
    for key, kind, value in described:
        is_kept = key == "general.name" or (is_copy and key == "general.file_type")
        old = metadata.get(key) if is_kept else None
        found.append((key, kind, value if old is None else old))
    known = {key for key, _, _ in described}
    for key, value in metadata.items():
        if key in known or key.startswith((*OF_THE_FILE, *OWN)) or not (is_copy or key.startswith(KEPT)):
            continue
        if isinstance(value, Array):
            found.append((key, f"[{ARRAY_KINDS[value.kind]}]", value.decode()))
        else:
            found.append((key, _scalar_kind(key, value), value))
    return found


def _scalar_kind(key: str, value: object) -> str:
    """Return how a number or a text is stored: as llama.cpp reads it, and wide enough."""
    if type(value) is int and not 0 <= value < 1 << 32:
        return "u64" if value > 0 else "i32" if value >= -(1 << 31) else "i64"
    return SAMPLING.get(key.removeprefix("general.sampling."), SCALAR_KINDS[type(value)])


def _one_or_each(key: str, values: Sequence[int]) -> Entry:
    return (key, "u32", values[0]) if len(set(values)) == 1 else (key, "[i32]", list(values))


def _kind(piece: str, marked: set[str]) -> int:
    if piece in VISIBLE:
        return USER_DEFINED
    if piece in marked:
        return CONTROL
    return BYTE if BYTE_PIECE.fullmatch(piece) else NORMAL


def _merges(merges: object, origin: str) -> list[str]:
    """Format merges as two pieces with a space between, which no piece of this family holds."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{origin} holds no merges; use the tokenizer.json of a Gemma 4 checkpoint")
    spelled = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges]
    wrong = [merge for merge in spelled if merge.count(" ") != 1]
    if wrong:
        raise CheckpointError(f"{origin}: a merge is two pieces without spaces, found {wrong[0]!r:.80}")
    return spelled


def _named_ids(ids: Mapping[str, int], special: Mapping[str, Any]) -> list[Entry]:
    found: list[Entry] = []
    for name, key in NAMED.items():
        piece = special.get(f"{name}_token")
        text = piece.get("content") if isinstance(piece, dict) else piece
        id = ids.get(text) if isinstance(text, str) else None
        id = ids.get(FALLBACKS[name]) if id is None else id
        if id is not None:
            found.append((f"tokenizer.ggml.{key}_token_id", "u32", id))
    return found
