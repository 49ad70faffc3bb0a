"""Compiles grammars for one vocabulary.

Owns the vocabulary as llguidance wants it, made at first use, and the cache of compiled grammars; any thread may ask. Refuses to
know what grammars are made of, and requests. Read `engine/grammar_mask.py` for how they are applied.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.text.grammar import Grammar
from gemcutter.text.tokenizer import Tokenizer

CACHED = 64  # grammars
PLACE = re.compile(r"^(?:at )?\d+\(\d+\): ")  # in a text that no caller has seen

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """An llguidance matcher at a grammar's start, to be copied and not moved; `first` has a bit for every id, 1 where it may
    come first.
    """

    matcher: Any
    first: bytes


class GrammarCompiler:
    """Makes matchers; `end_ids` are allowed exactly where a grammar accepts."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self._tokenizer, self._end_ids = tokenizer, sorted(end_ids)
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._cached: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._vocabulary: Any = None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Return a grammar ready for use; what of it can't be held to is logged once.

        Raises RequestError where the grammar can't be compiled, and where llguidance is not installed.
        """
        with self._lock:
            if grammar in self._cached:
                self._cached.move_to_end(grammar)
                return self._cached[grammar]
        library, vocabulary = import_llguidance(), self.vocabulary()
        matcher = library.LLMatcher(vocabulary, library.LLMatcher.grammar_from_lark(grammar.lark), log_level=0)
        first = (
            b"" if matcher.is_error() else matcher.compute_bitmask()
        )  # slow, as it builds states of the lexer, which copies have
        if matcher.is_error():
            raise RequestError(f"{grammar.name}: {_problem(matcher.get_error())}")
        for warning in (*grammar.warnings, *(f"{grammar.name}: {each}" for each in matcher.get_grammar_warnings())):
            log.warning("%s", warning)
        with self._lock:
            found = self._cached[grammar] = CompiledGrammar(matcher, first)
            while len(self._cached) > CACHED:
                self._cached.popitem(last=False)
        return found

    def vocabulary(self) -> Any:
        """Return the vocabulary for llguidance; the first call makes it, which takes a second, and others wait for that."""
        with self._building:
            if self._vocabulary is None:
                if not self._end_ids:
                    raise RequestError("constraint: the checkpoint names no token that ends a reply, as a grammar needs")
                self._vocabulary = import_llguidance().LLTokenizer(_Vocabulary(self._tokenizer), eos_token=self._end_ids)
            return self._vocabulary


class _Vocabulary:
    """A tokenizer with the attributes that llguidance asks for; with it, no file of another layout has to be written and read."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        named = {id for piece in tokenizer.markers if (id := tokenizer.id_of(piece)) is not None}
        self._encode, special = tokenizer.encode_plain, tokenizer.special_ids | named
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.bos_id  # the ends are given beside it
        self.special_token_ids = sorted(special)
        self.tokens = [
            tokenizer.piece(id).encode() if id in special else tokenizer.bytes_of(id) for id in range(tokenizer.num_ids)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the ids of a text."""
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", errors="replace"))


def import_llguidance() -> Any:
    """Return the library. Raises RequestError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise RequestError("constraint: grammars need llguidance, which is not installed: pip install gemcutter[serve]") from None
    return llguidance


def has_llguidance() -> bool:
    """Return whether grammars can be compiled here."""
    try:
        import_llguidance()
    except RequestError:
        return False
    return True


def _problem(error: str) -> str:
    if error.startswith("NoExtension"):
        return "there is no text that it accepts"
    first, *more = error.splitlines() or ["it can't be compiled"]
    cause = next((line.removeprefix("error: ") for line in more if line.startswith("error: ")), "")  # of a regular expression
    return PLACE.sub("", f"{first} {cause}".rstrip())
