"""What lies beside a checkpoint's weights: tokenizer, chat template, generation defaults, and what they lack.

Owns the reading of those files for a report, from the small ones alone: a tokenizer of 32 MB, or a remote one, is measured and
not read. Refuses to tokenize and to render. Read `text/tokenizer.py` and `text/chat.py` for the files' real readers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemcutter.checkpoint.container.source import Source
from gemcutter.config import ModelConfig
from gemcutter.errors import GemcutterError
from gemcutter.sidecar.small_file import shown

PUBLISHED_VOCAB = 262_144
PUBLISHED_ENDS = {"<eos>": 1, "<turn|>": 106, "<|tool_response>": 50}  # ids in the released vocabulary
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
SAMPLED = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p"}  # as generation_config.json and GGUF spell them
ID = re.compile(r"[0-9]{1,9}")
SMALL_TOKENIZER_BYTES = 1 << 20  # a vocabulary that is read for its markers; the released one is thirty times as large


@dataclass(slots=True)
class SidecarFiles:
    """What was found; `remarks` says what is amiss and what it leads to."""

    tokenizer: str | None = None
    tokenizer_bytes: int | None = None
    template: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    end_markers: dict[str, int | None] = field(default_factory=dict)
    add_bos_token: bool | None = None
    pad_token: str | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_sidecar_files(source: Source, config: ModelConfig | None) -> SidecarFiles:
    """Read what lies beside the weights; damaged files become problems."""
    found = SidecarFiles()
    if any(file.suffix == ".gguf" for file in source.files):
        _read_gguf(source.metadata, found)  # its readers look for end markers in the vocabulary, whatever the metadata say
    else:
        _read_files(source, found)
        if config is not None and not any(found.end_markers.values()) and config.text.vocab_size == PUBLISHED_VOCAB:
            found.end_markers = dict(PUBLISHED_ENDS)
    found.eos_token_ids = tuple(sorted({*found.eos_token_ids, *(config.eos_token_ids if config else ())}))
    if found.tokenizer is None and not (config is not None and config.is_drafter):
        found.problems.append(f"there is no {TOKENIZER}; copy it from the original checkpoint")
    found.remarks += _remarks(found, config)
    return found


# ---- files ----


def _read_files(source: Source, found: SidecarFiles) -> None:
    options = _read_json(source, TOKENIZER_CONFIG, found) or {}
    generation = _read_json(source, GENERATION, found)
    found.tokenizer_bytes = source.size_of_sidecar(TOKENIZER)
    found.tokenizer = TOKENIZER if found.tokenizer_bytes is not None else None
    found.template, text = _find_template(source, options, found)
    pad, add_bos = options.get("pad_token"), options.get("add_bos_token")
    found.pad_token = pad if isinstance(pad, str) else pad.get("content") if isinstance(pad, dict) else None
    found.add_bos_token = add_bos if isinstance(add_bos, bool) else None
    found.end_markers = _find_markers(source, options, text, found)
    found.eos_token_ids = _ids((generation or {}).get("eos_token_id"))
    found.sampling = _numbers({name: (generation or {}).get(name) for name in SAMPLED})
    if generation is None:
        found.remarks.append(f"no {GENERATION}: engines fall back to their own sampling and to the end tokens of config.json")
    processor = _read_json(source, "processor_config.json", found)
    if processor is not None and "feature_extractor" not in processor and any("audio_tower." in name for name in source.tensors):
        found.remarks.append("processor_config.json has no feature_extractor: some engines then ignore audio, silently")


def _read_json(source: Source, name: str, found: SidecarFiles) -> dict[str, Any] | None:
    try:
        return source.read_json(name)
    except GemcutterError as error:
        found.problems.append(str(error))
        return None


def _find_template(source: Source, options: Mapping[str, Any], found: SidecarFiles) -> tuple[str | None, str]:
    """Return where the chat template is, and its text."""
    try:
        raw = source.read_sidecar(TEMPLATE)
    except (ValueError, GemcutterError) as error:
        found.problems.append(f"{TEMPLATE}: {error}")
        return None, ""
    if raw is not None:
        return TEMPLATE, raw.decode("utf-8", errors="replace")
    for name, holder in ((TEMPLATE_JSON, _read_json(source, TEMPLATE_JSON, found) or {}), (TOKENIZER_CONFIG, options)):
        if holder.get("chat_template"):
            return name, str(holder["chat_template"])
    return None, ""


def _find_markers(source: Source, options: Mapping[str, Any], template: str, found: SidecarFiles) -> dict[str, int | None]:
    """Return the ids of the markers that end a turn, as far as small files tell; tool calls only if the template knows them."""
    wanted = [piece for piece in PUBLISHED_ENDS if piece != "<|tool_response>" or piece in template]
    listed: list[Any] = []
    decoder = options.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        listed = [{**token, "id": int(id)} for id, token in decoder.items() if ID.fullmatch(id) and isinstance(token, dict)]
    elif source.remote is None and (found.tokenizer_bytes or SMALL_TOKENIZER_BYTES + 1) <= SMALL_TOKENIZER_BYTES:
        tokens = (_read_json(source, TOKENIZER, found) or {}).get("added_tokens")
        listed = tokens if isinstance(tokens, list) else []
    ids = {str(token.get("content")): token.get("id") for token in listed if isinstance(token, dict)}
    return {piece: number if isinstance(number := ids.get(piece), int) else None for piece in wanted}


# ---- GGUF, which has all of it in its metadata ----


def _read_gguf(metadata: Mapping[str, Any], found: SidecarFiles) -> None:
    if "tokenizer.ggml.tokens" in metadata:
        found.tokenizer = f"in the file ({shown(metadata.get('tokenizer.ggml.model'))})"
    template = metadata.get("tokenizer.chat_template")
    found.template = "in the file" if isinstance(template, str) else None
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    found.add_bos_token = add_bos if isinstance(add_bos, bool) else None
    found.eos_token_ids = _ids(metadata.get("tokenizer.ggml.eos_token_id"))
    found.pad_token = None if metadata.get("tokenizer.ggml.padding_token_id") is None else "in the file"
    found.sampling = _numbers({name: metadata.get(f"general.sampling.{key}") for name, key in SAMPLED.items()})


# ---- what it leads to ----


def _remarks(found: SidecarFiles, config: ModelConfig | None) -> Iterator[str]:
    is_drafter = config is not None and config.is_drafter
    if found.tokenizer is None:
        return
    if found.template is None and not is_drafter:
        yield "no chat template: conversations can't be rendered (right for a base model)"
    if found.add_bos_token is False:
        yield "add_bos_token is false: engines that obey it leave <bos> out of raw prompts, which ruins them"
    if found.pad_token is None:
        yield "no pad token is named: engines that pad batches choose one themselves"
    ends = {piece: id for piece, id in found.end_markers.items() if id is not None and id not in found.eos_token_ids}
    if ends and found.template is not None:
        listed = ", ".join(f"{piece} ({id})" for piece, id in ends.items())
        yield f"end tokens {list(found.eos_token_ids)} leave out {listed}: engines that go by the files run on past them"


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(id for id in values if isinstance(id, int) and not isinstance(id, bool))
