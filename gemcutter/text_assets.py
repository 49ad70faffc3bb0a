"""The text side of a checkpoint: tokenizer, chat template, and what it says about generation.

Owns where they are found: in the files beside the weights, or in the metadata of a GGUF file, which brings its own. Loading a
model and the doctor both ask here, so that they agree. Refuses to know either's contents. Read `text/tokenizer.py` and
`text/chat.py` for what is made of them, `api.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import gguf
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.generation_config import Defaults
from gemcutter.sidecar.small_file import read_object, read_small
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tokenizer_parts import TokenizerParts, parts_of, read_parts
from gemcutter.vocabulary_cache import VocabularyCache

JINJA = "chat_template.jinja"
OWN, CANONICAL = "own", "canonical"  # chat templates by name
GENERATION = "generation_config.json"
AUTO, NO_DEFAULTS = "auto", ("none", "vllm")  # sources of defaults by name; the last one is how vLLM spells none

if TYPE_CHECKING:  # the library is imported where it is needed, the template engine where there is a template
    import tokenizers

    from gemcutter.text.chat import ChatTemplate


@dataclass(frozen=True, slots=True)
class TextAssets:
    """Everything that text needs. `notes` say what does not fit together, though nothing fails."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: Defaults
    notes: tuple[str, ...] = ()


def read_text_assets(
    checkpoint: Checkpoint,
    chat_template: str | None = None,
    generation_config: str = AUTO,
    cache: VocabularyCache | None = None,
) -> TextAssets:
    """Return the text side of a checkpoint; `chat_template` and `generation_config` are the load options.

    The vocabulary that `cache` keeps is taken as it is, and if it keeps none it is kept there. Raises CheckpointError or
    ConfigError for what is damaged or absent.
    """
    tokenizer = read_tokenizer(checkpoint.source, checkpoint.plan.vocab, cache)
    template, note = choose_template(checkpoint, tokenizer, chat_template)
    defaults = read_defaults(checkpoint, tokenizer, template, generation_config)
    notes = [] if note is None else [note]
    return TextAssets(tokenizer, template, defaults, (*notes, *_notes(checkpoint, tokenizer, template)))


def _notes(checkpoint: Checkpoint, tokenizer: Tokenizer, template: ChatTemplate | None) -> Iterator[str]:
    yield from tokenizer.notes
    vocab = checkpoint.plan.vocab
    beyond = tokenizer.num_ids - vocab
    if beyond > 0:
        yield f"the tokenizer has {beyond} ids beyond the model's vocabulary of {vocab:,}; a prompt that needs one is refused"
    if template is not None and (problem := template.problem()):
        yield f"the chat template fails on a greeting: {problem}"
    if template is None and gguf.sniff(checkpoint.source) and (checkpoint.source.folder / JINJA).is_file():
        yield f"the GGUF file has no chat template, and {JINJA} beside it is not used; convert the model again to put it in"


def read_tokenizer(source: Source, vocab: int = 0, cache: VocabularyCache | None = None) -> Tokenizer:
    """Return a checkpoint's tokenizer; a GGUF file without a vocabulary may have tokenizer.json beside it.

    `vocab` is how many ids the model has. Raises CheckpointError for a damaged one, and where there is none.
    """
    if cache is None:
        return Tokenizer(_read_parts(source), vocab)
    if (kept := cache.read(lambda: _backend(source))) is not None:
        return Tokenizer(kept, vocab)
    parts = _read_parts(source)
    tokenizer = Tokenizer(parts, vocab)
    cache.write(parts)
    return tokenizer


def _read_parts(source: Source) -> TokenizerParts:
    found = gguf.vocabulary(source) if gguf.sniff(source) else None
    if found is None:
        return read_parts(source.folder)
    return parts_of(
        found.pieces,
        found.scores if found.merges is None else found.merges,
        markers=found.markers,
        literals=found.literals,
        unused=found.unused,
        special_tokens=found.special_tokens,
        origin=str(source.files[0]),
    )


def _backend(source: Source) -> tokenizers.Tokenizer:
    """Make the library's tokenizer, for which a kept vocabulary does not suffice."""
    made = _read_parts(source).backend
    return made() if callable(made) else made


def read_template(source: Source, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return a checkpoint's chat template, None where it has none. Raises CheckpointError for a damaged one."""
    if gguf.sniff(source):
        named = {name: (text, f"{source.files[0]}[{key}]") for name, key, text in gguf.chat_templates(source)}
        if not named:
            return None
    from gemcutter.text.chat import ChatTemplate

    return ChatTemplate.of_named(named, tokenizer) if gguf.sniff(source) else ChatTemplate.find(source.folder, tokenizer)


def choose_template(
    checkpoint: Checkpoint, tokenizer: Tokenizer, choice: str | None = None
) -> tuple[ChatTemplate | None, str | None]:
    """Return the chat template to use, and a note where it is not the checkpoint's own and nobody asked for it.

    `choice` is "own", "canonical", a file, or None: the checkpoint's own unless that is an older generation of Google's.
    Raises CheckpointError for a template that is damaged, and for a file that can't be read.
    """
    if choice is not None and choice not in (OWN, CANONICAL):
        return _template_of_file(Path(choice), tokenizer), None
    own = read_template(checkpoint.source, tokenizer)
    if choice == OWN or (choice is None and own is None):
        return own, None
    from gemcutter.text import canonical

    if choice is None and own is not None:
        return canonical.preferred(own, tokenizer)
    size = canonical.SMALL if checkpoint.plan.ple_dim else canonical.LARGE
    return (own and canonical.like(own, tokenizer)) or canonical.canonical_template(size, tokenizer), None


def _template_of_file(path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    from gemcutter.text.chat import ChatTemplate

    try:
        source = read_small(path).decode("utf-8")
    except ValueError as error:
        raise CheckpointError(f"chat template {path} can't be read ({error}); give a Jinja file, canonical or own") from error
    return ChatTemplate(source, tokenizer, origin=str(path))


def read_defaults(
    checkpoint: Checkpoint, tokenizer: Tokenizer, template: ChatTemplate | None = None, choice: str = AUTO
) -> Defaults:
    """Return what a checkpoint, or the file of its user's `choice`, says about generation. Raises ConfigError."""
    source = checkpoint.source
    if choice == AUTO:
        raw = gguf.generation(source) if gguf.sniff(source) else source.read_json(GENERATION)
    else:
        raw = None if choice in NO_DEFAULTS else _generation_of_file(Path(choice))
    return Defaults.read(raw, checkpoint.config, tokenizer, None if template is None else template.end_of_turn())


def _generation_of_file(path: Path) -> dict[str, Any]:
    file = path / GENERATION if path.is_dir() else path
    found = read_object(file.parent, file.name)
    if found is None:
        raise ConfigError(f"generation_config: there is no file {file}; give a {GENERATION}, its folder, auto or none")
    return found
