"""How answers are read out of replies: one function for each rule that numbers in the world were made with.

Owns the rules of sgl-eval 0.1.3, openai's simple-evals, lm-eval 0.4.13 and MMMU's own; each returns None where it finds nothing.
Which task takes which is the task's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIMPLE_EVALS = re.compile(r"(?i)Answer\s*:\s*([A-D])")
ANSWER_LINE = re.compile(r"(?i)[\*\_]{0,2}Answer[\*\_]{0,2}\s*:[\s\*\_]{0,2}\s*([A-Z])(?![a-zA-Z0-9])")
LONE_CAPITAL = re.compile(r"\b[A-Z]\b")


def last_boxed(text: str) -> str | None:
    """Return what stands in the last \\boxed{...} of a text, whose braces must close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin - 1, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return text[begin:place]
    return None


def boxed_letter(text: str) -> str | None:
    """Return the letter that a reply names last: in a box, where the last lone capital counts, else after "Answer:"."""
    boxed = last_boxed(text)
    if boxed is not None:
        if len(boxed) == 1:
            return boxed
        if found := LONE_CAPITAL.findall(boxed):
            return str(found[-1])
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


def argmax(values: Sequence[float]) -> int:
    """Return the place of the largest value, the first one of equals."""
    return max(range(len(values)), key=values.__getitem__)
