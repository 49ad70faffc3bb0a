"""Writes a tokenizer's files for other libraries, where a checkpoint comes with a vocabulary and no files.

Owns what tokenizer.json must say beyond the vocabulary so that others encode and decode as `tokenizer.py` does: the leading BOS,
and how pieces become text. Refuses to know where the vocabulary comes from.
"""

from __future__ import annotations

import json

import tokenizers
from tokenizers import decoders, processors

from gemcutter.text.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json, by name."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    bos = tokenizer.special_tokens["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "clean_up_tokenization_spaces": False}
    return {
        "tokenizer.json": backend.to_str().encode("utf-8"),
        "tokenizer_config.json": (json.dumps(config | tokenizer.special_tokens, indent=2, ensure_ascii=False) + "\n").encode(),
    }
