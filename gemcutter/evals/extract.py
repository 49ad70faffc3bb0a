"""How answers are read out of replies: one function for each rule that numbers in the world were made with.

Owns the rules of sgl-eval 0.1.3, openai's simple-evals, lm-eval 0.4.13 and MMMU's own; each returns None where it finds nothing.
Which task takes which is the task's.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIMPLE_EVALS = re.compile(r"(?i)Answer\s*:\s*([A-D])")
ANSWER_LINE = re.compile(r"(?i)[\*\_]{0,2}Answer[\*\_]{0,2}\s*:[\s\*\_]{0,2}\s*([A-Z])(?![a-zA-Z0-9])")
FINAL = re.compile(r"The final answer is (.+)$")
SCRIPTS = {  # Arabic, Bengali and full-width letters
    ord(letter): f" {plain}" for letters in ("أبجد", "অবডঢ", "ＡＢＣＤ") for letter, plain in zip(letters, "ABCD", strict=True)
}
LONE_CAPITAL = re.compile(r"\b[A-Z]\b")


def last_boxed(text: str) -> str | None:
    """Return what stands in the last \\boxed{...} of a text, whose braces must close."""
    start = text.rfind("\\boxed")
    begin = start + len("\\boxed{")
    if start < 0 or text[begin - 1 : begin] != "{":
        return None
    depth = 0
    for place in range(begin - 1, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return text[begin:place]
    return None


def final_letter(text: str) -> str | None:
    """Return the letter that a reply names last, as sgl-eval does.

    It is the last line's "The final answer is ...", else what is in the last box; letters of some other scripts count as A to D.
    One character is the letter, else the last lone capital in it; where there is neither, the last letter after "Answer:" is.
    """
    found = FINAL.findall(text)
    given = (found[-1] if found else "") or last_boxed(text)
    if given is not None:
        given = given.translate(SCRIPTS).strip()
        if len(given) == 1:
            return given.upper()
        if capitals := LONE_CAPITAL.findall(given):
            return str(capitals[-1])
    if lines := ANSWER_LINE.findall(text):
        return str(lines[-1]).upper()
    return None


def simple_evals_letter(text: str) -> str | None:
    """Return the first letter after "Answer:" as simple-evals does, lower case kept, so that it counts as wrong there."""
    found = SIMPLE_EVALS.search(text)
    return None if found is None else found[1]


def first_character(text: str) -> str | None:
    """Return the first character of a reply without the blanks around it."""
    return text.strip()[:1] or None


def pick_match(pattern: re.Pattern[str], text: str, which: int = 0) -> str | None:
    """Return a match as lm-eval's regex filter does: the first, or the last (-1); of several groups the first with a text."""
    found = pattern.findall(text)
    if not found:
        return None
    groups = found[which] if isinstance(found[which], tuple) else (found[which],)
    if len(groups) > 1:
        groups = tuple(group for group in groups if group)
    return str(groups[0]).strip() if groups else None


def is_exact_match(given: str, right: str, *, ignored: Sequence[str] = (), keeps_punctuation: bool = True) -> bool:
    """Return whether texts are equal as lm-eval's exact_match says, which drops patterns, ASCII punctuation and case in turn.

    Punctuation stays unless `keeps_punctuation` is off.
    """
    for pattern in ignored:
        given, right = re.sub(pattern, "", given), re.sub(pattern, "", right)
    given, right = given.lower(), right.lower()
    if not keeps_punctuation:
        given, right = given.translate(PUNCTUATION), right.translate(PUNCTUATION)
    return given == right


def argmax(values: Sequence[float]) -> int:
    """Return the place of the largest value, the first one of equals."""
    return max(range(len(values)), key=values.__getitem__)
