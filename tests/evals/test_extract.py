"""Rules that read answers out of replies, against the tools' own code, or their rules written out where there is none to call.

Read `test_sgl_eval_tasks.py` for sgl-eval's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from fractions import Fraction

import pytest
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter

from gemcutter.evals.extract import first_character, is_exact_match, last_boxed, pick_match, simple_evals_letter
from gemcutter.evals.numbers import last_digits, read_number
from gemcutter.evals.tasks import gsm8k, mmlu_pro
from tests.evals.made_up import GSM8K_ANSWERS, letter_replies, number_replies

REPLIES = {"letters": letter_replies, "numbers": number_replies}


@pytest.mark.parametrize(
    ("pattern", "which", "replies"),
    [
        (mmlu_pro.ANSWER, 0, "letters"),
        (gsm8k.HASHES, 0, "numbers"),
        (gsm8k.SENTENCE, 0, "numbers"),
        (gsm8k.ANY_NUMBER, -1, "numbers"),
    ],
    ids=lambda value: getattr(value, "pattern", value),
)
def test_matches_are_lm_evals(pattern: re.Pattern[str], which: int, replies: str) -> None:
    texts = REPLIES[replies]()
    (theirs,) = RegexFilter(pattern.pattern, which).apply([texts], [{}])
    ours = [pick_match(pattern, text, which) for text in texts]
    assert [text or "[invalid]" for text in ours] == theirs
    assert len(texts) > 300
    assert 0 < sum(text is None for text in ours) < len(texts)


@pytest.mark.parametrize("keeps_punctuation", [True, False])
@pytest.mark.parametrize("ignored", [(), gsm8k.IGNORED], ids=["all", "gsm8k"])
def test_exact_match_is_lm_evals(keeps_punctuation: bool, ignored: tuple[str, ...]) -> None:
    rights = ["B", *(f"So it is.\n#### {answer}" for answer in GSM8K_ANSWERS)]
    pairs = [(text.strip(), right) for text in (*letter_replies(), *number_replies()) for right in rights]
    theirs = [
        exact_match_hf_evaluate([text], [right], list(ignored) or None, True, not keeps_punctuation)["exact_match"]
        for text, right in pairs
    ]
    assert [is_exact_match(*pair, ignored=ignored, keeps_punctuation=keeps_punctuation) for pair in pairs] == theirs
    assert 0 < sum(theirs) < len(pairs)


def test_the_last_digits_are_those_that_sglang_finds() -> None:
    def theirs(text: str) -> int | None:
        numbers = re.findall(r"\d+", text.replace(",", ""))
        try:
            return int(ast.literal_eval(numbers[-1])) if numbers else None
        except SyntaxError:
            return None

    replies = [*number_replies(), "000", "٤٢", "1,2", "-5.25"]
    assert [last_digits(text) for text in replies] == [theirs(text) for text in replies]
    assert last_digits("9" * 5000) is None


@pytest.mark.parametrize(
    ("rule", "reply", "wanted"),
    [
        (simple_evals_letter, "Answer: C", "C"),
        (simple_evals_letter, "answer: c", "c"),
        (simple_evals_letter, "**Answer:** C", None),
        (simple_evals_letter, "Answer: \\boxed{C}", None),
        (simple_evals_letter, "Answer: Absolutely not B", "A"),
        (simple_evals_letter, "Answer: B\nAnswer: C", "B"),
        (first_character, " \n B.", "B"),
        (first_character, "b", "b"),
        (first_character, " \n", None),
        (last_boxed, "\\boxed{1} and \\boxed{a{b}c}", "a{b}c"),
        (last_boxed, "\\boxed{1} and \\boxed{a", None),
        (last_boxed, "\\boxed", None),
    ],
)
def test_written_out(rule: Callable[[str], str | None], reply: str, wanted: str | None) -> None:
    assert rule(reply) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("\\$1,042.00", Fraction(1042)),
        ("1{,}042", Fraction(1042)),
        ("10,42", None),
        ("\\frac12", Fraction(1, 2)),
        ("12 \\frac{1}{2}", Fraction(25, 2)),
        ("-\\frac{3}{4}", Fraction(-3, 4)),
        ("84/2", Fraction(42)),
        ("1/0", None),
        ("\\frac{1}{0}", None),
        ("42\\,\\text{kg}", Fraction(42)),
        ("42 or 43", None),
        ("\u0664\u0662", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_numbers_are_read(answer: str, wanted: Fraction | None) -> None:
    assert read_number(answer) == wanted
