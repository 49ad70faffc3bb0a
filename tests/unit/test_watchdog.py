"""The watchdog on streams of ids, and on a model that loops.

Owns the claim that loops end a reply, and that legal repetition does not: arrays of equal numbers, tables, indented code. Refuses
to judge scheduling; read `tests/unit/test_fair_scheduling.py` for that.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

import gemcutter
from gemcutter.engine.watchdog import LONGEST_CYCLE, TokenClasses, Watchdog
from gemcutter.text.token_classes import blank_and_data_ids

BLANK, COMMA, ZERO, END, NULL = 1, 2, 3, 4, 5
CLASSES = TokenClasses(frozenset({BLANK}), frozenset({BLANK, COMMA, ZERO}), END)
WORDS = list(range(10, 10 + LONGEST_CYCLE))


def lost_after(ids: Iterable[int]) -> int | None:
    """Return how many ids it took until the watchdog barked, None if it did not."""
    watchdog = Watchdog(CLASSES)
    return next((count for count, token in enumerate(ids, 1) if watchdog.is_lost(token)), None)


def rows(text: list[int], count: int) -> list[int]:
    return text * count


LOOPS = {
    "a sentence of 30 ids": (rows(WORDS[:30], 99), 768),
    "a sentence behind a text": ([*WORDS, *WORDS[100:131], *rows(WORDS[:30], 99)], LONGEST_CYCLE + 31 + 768),
    "a word": (rows([10], 9999), 1536),
    "two words, one of them twice": (rows([10, 11, 10], 9999), 1536),
    "a paragraph as long as can be seen": (rows(WORDS, 9), 8 * LONGEST_CYCLE),
    "numbers without an end": (rows([ZERO, COMMA, BLANK], 9999), 6144),
    "white space": ([10, *rows([BLANK], 999)], 257),
    "empty channels": (rows([6, 7, END], 99), 24),
    "a bare header and an end": ([10, 11, *rows([7, END], 99)], 2 + 16),
}
LEGAL = {
    "an array of a thousand equal numbers": rows([ZERO, COMMA, BLANK], 1000),
    "an array of 300 nulls": rows([NULL, COMMA, BLANK], 300),
    "a table of 200 equal rows": rows([10, BLANK, 11, BLANK, 12, COMMA, 13], 200),
    "25 equal objects of 30 ids": rows(WORDS[:30], 25),
    "code: each line with the same indent": [token for line in range(999) for token in (BLANK, BLANK, 10 + line % 250, 11)],
    "seven equal pages": rows(WORDS, 7),
    "short thoughts between words": rows([6, 7, END, *WORDS[:6]], 9),
    "long thoughts one after the other": rows([6, *WORDS[:9], END], 30),
    "a page of blanks": rows([BLANK], 255),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_end(name: str) -> None:
    ids, at = LOOPS[name]
    assert lost_after(ids) == at


@pytest.mark.parametrize("name", LEGAL)
def test_legal_repetition_goes_on(name: str) -> None:
    assert lost_after(LEGAL[name]) is None


def test_a_repeated_stretch_counts_from_its_beginning_only() -> None:
    """One other id every 700 starts all counts anew."""
    almost = [*rows(WORDS[:30], 24), 9]
    assert lost_after(rows(almost, 9)) is None


def test_random_ids_are_no_loop() -> None:
    draw = random.Random(0)
    assert lost_after(draw.choice(WORDS[:3]) for _ in range(20_000)) is None


def test_the_vocabulary_is_sorted_as_its_texts_are() -> None:
    with gemcutter.load("demo", context=64) as model:
        tokenizer = model.tokenizer
        blank, data = blank_and_data_ids(tokenizer)
        assert blank < data
        assert all(tokenizer.decode([token]).isspace() for token in blank)
        assert not any(character.isalpha() for token in data for character in tokenizer.decode([token]))
        assert not (data & tokenizer.special_ids)
        assert set(tokenizer.encode("\n", bos=False)) <= blank
        assert set(tokenizer.encode("1, 2, [3]", bos=False)) <= data
        assert not set(tokenizer.encode("lamp", bos=False)) & data


def test_a_model_that_loops_is_cut_where_it_is_asked_for() -> None:
    with gemcutter.load("demo", context=2048) as model:
        loops: gemcutter.GenerateOptions = {"max_tokens": 1000, "ignore_eos": True}
        free = model.generate("In the beginning", **loops)
        assert (free.finish_reason, len(free.tokens)) == ("length", 1000)
        cut = model.generate("In the beginning", watchdog=True, **loops)
        assert cut.finish_reason == "repetition"
        assert 768 <= len(cut.tokens) < 1000
        assert cut.tokens == free.tokens[: len(cut.tokens)]
        assert model.generate("In the beginning", watchdog=True).finish_reason == "stop"
        with pytest.raises(gemcutter.RequestError, match="watchdog: expected True or False"):
            model.generate("In the beginning", watchdog="yes")  # type: ignore[arg-type]
