"""What tasks with choices have in common: lettered lines, the letter of an answer, and the choice that is most likely.

Owns lm-eval's rule for log-likelihoods. Read `extract.py` for letters in replies.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.evals.extract import LETTERS, argmax
from gemcutter.evals.task import Grade


def lettered(choices: Sequence[str], mark: str) -> str:
    """Return a line for each choice: its letter, a mark, a space and the choice."""
    return "\n".join(f"{letter}{mark} {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def answer_letter(answer: Any, count: int, where: str) -> str:
    """Return the letter of a right answer that is stored as a letter or as a number from 0. Raises RequestError."""
    letters = tuple(LETTERS[:count])
    letter = letters[answer] if type(answer) is int and 0 <= answer < len(letters) else answer
    if letter not in letters:
        raise RequestError(f"{where}: 'answer': expected one of the {count} choices, found {answer!r}")
    return str(letter)


def texts(choices: Any, where: str, name: str = "choices") -> list[str]:
    """Return choices that are texts, from two to as many as there are letters. Raises RequestError."""
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RequestError(f"{where}: {name!r}: expected a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise RequestError(f"{where}: {name!r}: expected 2 to {len(LETTERS)}, found {len(choices)}")
    return choices


def likeliest(logprobs: Sequence[float], choices: Sequence[Sized], gold: int) -> Grade:
    """Judge the choice whose log-likelihood is the highest, and in `acc_norm` the highest by character of the choice.

    As in lm-eval, the characters are those of the choice without the delimiter before it, and the first of equals counts.
    """
    sizes = [len(choice) for choice in choices]
    by_character = [value / size if size else float("-inf") for value, size in zip(logprobs, sizes, strict=True)]
    found = argmax(logprobs)
    return Grade(found, {"acc": float(found == gold), "acc_norm": float(argmax(by_character) == gold)})
