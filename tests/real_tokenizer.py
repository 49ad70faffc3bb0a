"""Gemma 4's real vocabulary and templates for tests, from a folder of public fixtures that is not part of this project.

The folder is named by GEMCUTTER_SPEC, or is `../shared/spec` beside the checkout; where neither is there, the tests skip.
The tokenizer is rebuilt from the list of pieces and the merges, once per test run because that takes seconds.
"""

from __future__ import annotations

import array
import functools
import json
import lzma
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from gemcutter.sidecar.small_file import read_object
from gemcutter.text.chat import ChatTemplate
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tokenizer_parts import TokenizerParts, special_tokens_of


def fixtures() -> Path:
    """Return the folder with the fixtures, or skip the test that asks."""
    named = os.environ.get("GEMCUTTER_SPEC")
    spec = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "spec"
    if not (spec / "fixtures" / "gemma4_tokens.json.xz").is_file():
        pytest.skip(f"no Gemma 4 fixtures in {spec}: set GEMCUTTER_SPEC to a folder that has fixtures/gemma4_tokens.json.xz")
    return spec / "fixtures"


def real_tokenizer() -> Tokenizer:
    """Return the tokenizer of every Gemma 4, or skip the test that asks."""
    return _build(fixtures())


@functools.cache
def real_template(name: str) -> ChatTemplate:
    """Return the template `chat_template.{name}.jinja` over the real tokenizer, or skip the test that asks."""
    path = fixtures() / f"chat_template.{name}.jinja"
    return ChatTemplate(path.read_text(encoding="utf-8"), real_tokenizer(), origin=path.name)


def golden_chats() -> list[dict[str, Any]]:
    """Return the golden conversations: name, input, and the prompts of both canonical templates; or skip the test that asks."""
    chats: list[dict[str, Any]] = json.loads((fixtures() / "chat_golden.json").read_text(encoding="utf-8"))
    return chats


@functools.cache
def _build(folder: Path) -> Tokenizer:
    pieces: list[str] = json.loads(lzma.decompress((folder / "gemma4_tokens.json.xz").read_bytes()))
    ranks = array.array("I", lzma.decompress((folder / "gemma4_merges.u32le.xz").read_bytes()))
    if sys.byteorder == "big":
        ranks.byteswap()
    merges = [(pieces[left], pieces[right]) for left, right in zip(ranks[::2], ranks[1::2], strict=True)]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    markers = json.loads((folder / "special_tokens.json").read_text(encoding="utf-8"))
    backend.add_special_tokens([AddedToken(marker["piece"], normalized=False, special=True) for marker in markers.values()])
    named = special_tokens_of(read_object(folder, "tokenizer_config.31B-derivative.real.json") or {})
    return Tokenizer(TokenizerParts(backend, named, folder.name))
