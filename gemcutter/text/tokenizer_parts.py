"""What a tokenizer is made of, read from `tokenizer.json` and `tokenizer_config.json` or made of a vocabulary's parts.

Owns who encodes: plain Python where the vocabulary is of Gemma's usual kind, and the `tokenizers` library, made when it is
needed, for all others and for long texts. Refuses to know what is asked of a tokenizer: read `tokenizer.py` for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import read_object, shown
from gemcutter.sidecar.tokenizer_json import add_config_tokens, check_kind
from gemcutter.text.bpe import BYTES, BpeParts, fits, read_bpe
from gemcutter.text.merge_order import pair_of

if TYPE_CHECKING:  # the library is imported where it is needed
    import tokenizers

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
BOS = "<bos>"


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What a vocabulary brings along. `backend` is the library's tokenizer or, where `bpe` encodes, a function that makes it.

    `special_tokens` maps the attribute names of tokenizer_config.json (`bos_token`, `eot_token`, ...) to pieces; `literals` are
    the added tokens that are text (None: those that nothing marks as more), `unused` the ids of pieces that stand for nothing;
    `notes` say what the files disagree on, and `origin` is what errors name.
    """

    backend: tokenizers.Tokenizer | Callable[[], tokenizers.Tokenizer]
    special_tokens: Mapping[str, str]
    origin: str = TOKENIZER
    bpe: BpeParts | None = None
    literals: Sequence[str] | None = None
    unused: Sequence[int] = ()
    notes: Sequence[str] = ()


def read_parts(folder: Path) -> TokenizerParts:
    """Read tokenizer.json, and tokenizer_config.json if there is one, from a checkpoint's folder.

    Tokens that only tokenizer_config.json lists are added, as transformers does. Raises CheckpointError, naming the file and
    the remedy, when a file is missing or damaged.
    """
    options = read_object(folder, TOKENIZER_CONFIG) or {}
    raw, notes = _read_raw(folder, options)
    named = special_tokens_of(options)
    bpe = read_bpe(raw, [BOS, *named.values()])
    del raw
    backend = backend_of(folder)
    return TokenizerParts(backend if bpe else backend(), named, str(folder / TOKENIZER), bpe, notes=notes)


def backend_of(folder: Path) -> Callable[[], tokenizers.Tokenizer]:
    """Return the function that makes the library's tokenizer of a checkpoint's folder. It raises CheckpointError."""

    def backend() -> tokenizers.Tokenizer:
        import tokenizers

        path = folder / TOKENIZER
        raw, _ = _read_raw(folder, read_object(folder, TOKENIZER_CONFIG) or {})
        for setting in ("truncation", "padding", "post_processor", "decoder"):  # which are a tokenizer's own business here
            raw[setting] = None
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(raw))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # hostile files make the library panic, and its panic is no Exception
            raise CheckpointError(f"{path} can't be read ({error}): download the file again") from error
        moved = [token["content"] for token in raw["added_tokens"] if made.token_to_id(token["content"]) != token["id"]]
        if moved:
            raise CheckpointError(f"{path}: {shown(moved)} can't have the ids that the files give them; download them again")
        return made

    return backend


def _read_raw(folder: Path, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    path = folder / TOKENIZER
    raw = read_object(folder, TOKENIZER)
    if raw is None:
        raise CheckpointError(f"{path} is missing: copy tokenizer.json from the original checkpoint into this folder")
    check_kind(raw, str(path))
    return add_config_tokens(raw, options)


def parts_of(
    pieces: Sequence[str],
    merges: Sequence[str] | Mapping[str, float],
    *,
    markers: Iterable[int],
    literals: Iterable[int] = (),
    unused: Iterable[int] = (),
    special_tokens: Mapping[str, str] | None = None,
    origin: str = "vocabulary",
) -> TokenizerParts:
    """Put together a tokenizer of Gemma's kind: pieces by id, and merges in the order of their rank.

    Merges are spelled "left right"; a vocabulary that has none gives the scores of its plain pieces. `markers` are ids that
    stand for no text; `literals` are found whole in a text before anything is merged. Raises CheckpointError, naming `origin`,
    for parts that make no tokenizer.
    """
    vocabulary = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(vocabulary) != len(pieces):
        raise CheckpointError(f"{origin}: {len(pieces) - len(vocabulary)} pieces of the vocabulary are there twice")
    texts, special = [pieces[id] for id in literals], [pieces[id] for id in markers]

    def backend() -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models, normalizers

        pairs = merges_of(merges) if isinstance(merges, Mapping) else [pair_of(merge) for merge in merges]
        try:
            model = models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
            made = tokenizers.Tokenizer(model)
            made.normalizer = normalizers.Replace(" ", "▁")
            made.add_tokens(added_tokens(texts, special=False))
            made.add_special_tokens(added_tokens(special, special=True))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic, as in `backend_of`
            raise CheckpointError(f"{origin} makes no tokenizer ({error}): download the file again") from error
        return made

    bpe = None
    if set(BYTES) <= vocabulary.keys() and (isinstance(merges, Mapping) or fits(vocabulary, merges)):
        ids = frozenset(vocabulary[piece] for piece in special)
        bpe = BpeParts(vocabulary, merges, [*texts, *special], texts, ids)
    made = backend if bpe else backend()
    return TokenizerParts(made, special_tokens or {}, origin, bpe, texts, list(unused))


def special_tokens_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a tokenizer_config.json names, by attribute.

    A token is a string or a serialised object with its text in `content`; named extra tokens count as attributes too.
    """
    extra = options.get("extra_special_tokens")
    entries = {**(extra if isinstance(extra, dict) else {}), **options}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Derive the merges of a vocabulary that has a score for each piece instead, best first.

    Of two neighbours, those are merged whose joint piece has the highest score: every way to put a piece together of two others
    is a merge of that piece's rank. Source: SentencePiece's BPE.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def added_tokens(pieces: Iterable[str], *, special: bool) -> list[tokenizers.AddedToken]:
    """Return pieces as tokens that the library cuts out of a text as they stand."""
    import tokenizers

    return [tokenizers.AddedToken(piece, normalized=False, special=special) for piece in pieces]
