"""How MMMU and MMMU-Pro read answers out of replies, without the random letter that they take where there is none.

Owns their rules alone; the other tasks' are in `extract.py`. Sources: MMMU-Benchmark/MMMU, eval/utils (as in lm-eval 0.4.13 and
SGLang's benchmark/mmmu) and mmmu-pro/evaluate.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gemcutter.evals.extract import argmax

MARKS = ",.!?;:'"
FEWEST_WORDS = 6  # of a reply in which the text of an option counts as an answer
BEFORE_ANSWERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a reply names, the last one of several: "(A)", else " A ", else, in a sentence, an option's text."""
    bare = _bare(text)
    return _last(bare, options, ("({})",)) or _last(bare, options, (" {} ",)) or _last_option(bare, options)


def mmmu_pro_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Return the only letter after the last "Answer:", else what MMMU's rule finds, which takes "A " and "A." here, too."""
    _, found, after = text.rpartition("Answer:")
    named = [letter for letter in options if letter in after] if found else []
    if len(named) == 1:
        return named[0]
    bare = _bare(text)
    return (
        _last(bare, options, ("({})",))
        or _last(bare, options, ("{} ", " {} "))
        or _last(bare, options, ("{}.", " {} "))
        or _last_option(bare, options)
    )


def _bare(text: str) -> str:
    """Return a reply without the marks around it, each taken off in its turn, and with blanks instead."""
    for mark in MARKS:
        text = text.strip(mark)
    return f" {text} "


def _last(text: str, options: Mapping[str, str], forms: Sequence[str]) -> str | None:
    """Return the letter that occurs in the first form; of several the one that stands last in the last form, else the first."""
    named = [letter for letter in options if forms[0].format(letter) in text]
    return named[argmax([text.rfind(forms[-1].format(letter)) for letter in named])] if named else None


def _last_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option whose text occurs last in a reply of several words."""
    if len(text.split()) < FEWEST_WORDS:
        return None
    places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
    last = max(places, key=places.__getitem__, default=None)
    return last if last is not None and places[last] >= 0 else None


def open_answers(text: str) -> list[str]:
    """Return what a reply to an open question may mean as its answer: the ends of lines that announce one, else all of it."""
    whole = text.strip().strip(".").lower()
    lines, found = whole.split("\n"), list[str]()
    for number, line in enumerate(lines, 1):
        tails = [line.rsplit(before, 1)[1].strip() for before in _announcers(number == len(lines)) if before in line]
        best = ""
        for tail in tails:
            if not best or len(tail) < len(best):
                best = tail
        if best and best not in MARKS:
            found.append(best)
    return found or [whole]


def _announcers(is_last: bool) -> tuple[str, ...]:
    return (*BEFORE_ANSWERS, "=") if is_last else BEFORE_ANSWERS


def is_open_answer_right(answers: Sequence[str], gold: str | Sequence[str]) -> bool:
    """Return whether one of the right answers occurs in an answer's text, or is a number of it, to two digits."""
    right = [each for text in ([gold] if isinstance(gold, str) else gold) for each in _normalized(text)]
    numbers = [number for answer in answers for rule in NUMBERS for number in re.findall(rule, answer)]
    for given in (each for text in (*answers, *numbers) for each in _normalized(text)):
        if isinstance(given, float) and given in right:
            return True
        if isinstance(given, str) and any(isinstance(each, str) and each in given for each in right):
            return True
    return False


def _normalized(text: str) -> list[float | str]:
    """Return a text as a number with two digits or in lower case, a single letter with a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
