"""The text side of a checkpoint: tokenizer, chat template, and what it says about generation.

Owns where they are found: in the files beside the weights, or in the metadata of a GGUF file, which brings its own. Refuses to
know either's contents. Read `text/tokenizer.py` and `text/chat.py` for what is made of them, `api.py` for who asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import gguf
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.generation_config import Defaults
from gemcutter.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # the template engine is imported where there is a template
    from gemcutter.text.chat import ChatTemplate


def read_tokenizer(source: Source) -> Tokenizer:
    """Give a checkpoint's tokenizer; a GGUF file without a vocabulary may have tokenizer.json beside it.

    Raises CheckpointError for a damaged one, and where there is none.
    """
    found = gguf.vocabulary(source) if gguf.sniff(source) else None
    if found is None:
        return Tokenizer.load(source.folder)
    return Tokenizer.build(
        found.pieces,
        found.scores if found.merges is None else found.merges,
        markers=found.markers,
        literals=found.literals,
        special_tokens=found.special_tokens,
        origin=str(source.files[0]),
    )


def read_template(source: Source, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Give a checkpoint's chat template, None where it has none. Raises CheckpointError for a damaged one."""
    is_gguf = gguf.sniff(source)
    found = gguf.chat_template(source) if is_gguf else None
    if is_gguf and found is None:
        return None
    from gemcutter.text.chat import ChatTemplate

    if found is None:
        return ChatTemplate.find(source.folder, tokenizer)
    return ChatTemplate(found, tokenizer, origin=f"{source.files[0]}[tokenizer.chat_template]")


def read_defaults(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Defaults:
    """Give what a checkpoint says about generation. Raises ConfigError."""
    source = checkpoint.source
    raw = gguf.generation(source) if gguf.sniff(source) else source.read_json("generation_config.json")
    return Defaults.read(raw, checkpoint.config, tokenizer)
