"""Compiles grammars for one vocabulary.

Owns the vocabulary as llguidance wants it, made at first use, and the cache of compiled grammars; any thread may ask. Refuses to
know what grammars are made of, and requests. Read `engine/grammar_mask.py` for how they are applied.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.text.export import tokenizer_files
from gemcutter.text.grammar import Grammar
from gemcutter.text.tokenizer import Tokenizer

CACHED = 64  # grammars


class GrammarCompiler:
    """Makes matchers; `end_ids` are allowed exactly where a grammar accepts."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self._tokenizer, self._end_ids = tokenizer, sorted(end_ids)
        self._lock = threading.Lock()
        self._cached: OrderedDict[Grammar, Any] = OrderedDict()

    def compile(self, grammar: Grammar) -> Any:
        """Return an llguidance matcher at a grammar's start, to be copied and not used itself.

        Raises RequestError where the grammar can't be compiled, and where llguidance is not installed.
        """
        with self._lock:
            if grammar in self._cached:
                self._cached.move_to_end(grammar)
                return self._cached[grammar]
        library, vocabulary = import_llguidance(), self._vocabulary
        matcher = library.LLMatcher(vocabulary, library.LLMatcher.grammar_from_lark(grammar.lark), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first is slow, as it builds the lexer's states; copies have them
        if matcher.is_error():
            raise RequestError(f"{grammar.name}: {matcher.get_error().splitlines()[0]}")
        with self._lock:
            self._cached[grammar] = matcher
            while len(self._cached) > CACHED:
                self._cached.popitem(last=False)
        return matcher

    @cached_property
    def _vocabulary(self) -> Any:
        text = json.loads(tokenizer_files(self._tokenizer)["tokenizer.json"])
        return import_llguidance().LLTokenizer(json.dumps(text), eos_token=self._end_ids)


def import_llguidance() -> Any:
    """Return the library. Raises RequestError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise RequestError("grammars need llguidance, which is not installed: pip install gemcutter[serve]") from None
    return llguidance
