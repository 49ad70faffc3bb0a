"""What a tokenizer.json may hold, and what tokenizer_config.json adds to it.

Owns the check of its parts, before any library meets them: only the pieces that this family's tokenizers are made of, because
others can hang, abort or take all memory on some text. Refuses to encode. Read `text/tokenizer.py` for who asks,
`text/bpe.py` for the encoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import shown

# What a tokenizer.json of Gemma's kind says beside vocabulary, merges and added tokens. Its splits at spaces find none.
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PRE_TOKENIZERS = (None, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False})
# Converters mark some of these as plain text; no merges make them, and no text means them.
MARKER = re.compile(r'<\|[a-z_"]+\|?>|<[a-z_]+\|>|<unused[0-9]+>')
ID = re.compile(r"[0-9]{1,9}")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SHOWN = 3  # tokens that a note lists


def check_kind(raw: Mapping[str, Any], origin: str) -> None:
    """Raise CheckpointError, with every problem, unless a tokenizer is put together as this family's are."""
    problems = list(_problems(raw))
    if problems:
        raise CheckpointError(
            f"{origin} is not a tokenizer of Gemma's kind; use the tokenizer.json of a Gemma 4 checkpoint", problems
        )


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        yield f"model: expected BPE with a vocabulary, found {shown(model if not isinstance(model, dict) else model.get('type'))}"
    elif model.get("dropout"):
        yield f"model.dropout: expected none, found {shown(model['dropout'])}: one text would get other ids each time"
    normalizer, pre_tokenizer = _unpacked(raw.get("normalizer")), _unpacked(raw.get("pre_tokenizer"))
    if normalizer not in (None, NORMALIZER):
        yield f"normalizer: expected one that replaces spaces with \u2581, found {shown(normalizer)}"
    if pre_tokenizer not in PRE_TOKENIZERS:
        yield f"pre_tokenizer: expected none, or a split at spaces, found {shown(pre_tokenizer)}"
    added = raw.get("added_tokens")
    if not isinstance(added, list | None):
        yield f"added_tokens: expected a list, found {shown(added)}"
        return
    wrong = [token for token in added or () if not _is_token(token)]
    if wrong:
        yield f"added_tokens: {len(wrong)} entries are no tokens with a text and an id, such as {shown(wrong[0])}"


def _unpacked(part: Any) -> Any:
    """Return the single member of a sequence, which means the same."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        members = part.get("normalizers", part.get("pretokenizers"))
        return members[0] if isinstance(members, list) and len(members) == 1 else part
    return part


def _is_token(token: object) -> bool:
    return (
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
        and 0 <= token["id"] < 2**31
        and all(isinstance(token.get(flag, False), bool) for flag in FLAGS)
    )


def add_config_tokens(raw: dict[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Add the tokens that only the `added_tokens_decoder` of tokenizer_config.json lists; also return notes.

    Where the two files disagree on a token or an id, tokenizer.json is believed.
    """
    listed = options.get("added_tokens_decoder")
    added: list[dict[str, Any]] = list(raw.get("added_tokens") or ())
    ids: dict[str, int] = {**raw["model"]["vocab"], **{token["content"]: token["id"] for token in added}}
    pieces = {id: piece for piece, id in ids.items() if type(id) is int}
    new, disagreeing = list[dict[str, Any]](), list[str]()
    for key, token in listed.items() if isinstance(listed, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        if not ID.fullmatch(key) or not isinstance(content, str) or not content or ids.get(content) == int(key):
            continue
        if content in ids or int(key) in pieces:
            disagreeing.append(f"{shown(content)} {key}")
            continue
        ids[content], pieces[int(key)] = int(key), content
        new.append({"id": int(key), "content": content} | {flag: token.get(flag) is True for flag in FLAGS})
    notes = list[str]()
    if new:
        some = _some([shown(token["content"]) for token in new])
        notes.append(f"{len(new)} tokens that only tokenizer_config.json lists were added ({some})")
    if disagreeing:
        differ = f"{len(disagreeing)} tokens ({_some(disagreeing)})"
        notes.append(f"tokenizer_config.json and tokenizer.json disagree on {differ}; the latter counts")
    raw["added_tokens"] = sorted([*added, *new], key=lambda token: token["id"])
    return raw, notes


def _some(entries: Sequence[str]) -> str:
    return ", ".join(entries[:SHOWN]) + (", ..." if entries[SHOWN:] else "")
