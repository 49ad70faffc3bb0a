"""Needle in a haystack: one sentence with a number, at several depths of texts that have an exact number of tokens.

Owns how a text is filled up to its length by the model's own tokenizer. Source of the idea: G. Kamradt, "Needle In A Haystack",
2023.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.generated import NAMES, integers, random_of, sentence
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

LENGTHS = (1024, 4096, 16384)
DEPTHS = (0, 25, 50, 75, 100)
LEAST = 256
RESERVED = 64  # tokens of a length that are left to the template's markers and the reply
SLACK = 4  # tokens that single words fill up, at least
NEEDLE = "The secret number of {} is {}."
INTRODUCTION = "Somewhere in the following text stands a secret number. Remember it.\n\n"
QUESTION = "\n\nWhat is the secret number of {0}? Answer with the number only."
RAW_QUESTION = "\n\nThe text above says: The secret number of {0} is"
FILLERS = ("very", "so", "and", "the", "of", "a")
MODES = (
    Mode("chat", "one text and a question in a user's turn", "generate", "needle-chat-1", is_chat=True, max_tokens=32),
    Mode("raw", "raw text that ends where the number must follow", "generate", "needle-raw-1", max_tokens=16),
)
NUMBER = re.compile(r"\d+")


class Needle:
    """The task."""

    name = "needle"
    about = "a number in a text of 1k to 128k tokens, at several depths (generated)"
    modes: Sequence[Mode] = MODES
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield an item for every length and depth; texts of one length are equal up to their needle. Raises RequestError."""
        tokenizer = asked.tokenizer()

        def count(text: str) -> int:
            return len(tokenizer.encode(text))

        for length in integers(asked, "lengths", LENGTHS, LEAST):
            for depth in integers(asked, "depths", DEPTHS, 0, 100):
                source = random_of("needle", asked, f"{length} {depth}")
                place, number = source.choice(NAMES), str(source.randrange(10**6, 10**7))
                text = fill(count, length - RESERVED, depth, NEEDLE.format(place, number), mode, place, asked)
                prompt = [{"role": "user", "content": text}] if mode.is_chat else text
                yield Item(f"{length}/{depth}", prompt, number, str(length))

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the first number of the reply."""
        found = NUMBER.search(reply.text.replace(",", ""))
        number = None if found is None else found[0]
        return Grade(number, {"accuracy": float(number == item.gold)})


def fill(count: Callable[[str], int], tokens: int, depth: int, needle: str, mode: Mode, place: str, asked: Asked) -> str:
    """Return a text of exactly so many tokens, <bos> included, with the needle at a depth in percent of its sentences.

    Raises RequestError where the tokenizer has no short word to fill the rest with.
    """
    question = (QUESTION if mode.is_chat else RAW_QUESTION).format(place)
    filler = _filler(count)
    source, found = random_of("haystack", asked, tokens), list[str]()
    left = tokens - count(INTRODUCTION + needle + question) - SLACK
    while left > 0:
        found.append(sentence(source))
        left -= count(f" {found[-1]}") - 1

    def text(words: int) -> str:
        at = round(depth / 100 * len(found))
        more = [f"It was{f' {filler}' * words} far."] if words else []
        return f"{INTRODUCTION}{' '.join([*found[:at], needle, *found[at:], *more])}{question}"

    while found and (rest := tokens - count(text(1))) < 0:
        found.pop()
    if (exact := text(1 + rest)) and count(exact) == tokens:
        return exact
    raise RequestError(f"no text of exactly {tokens} tokens is found with this model's tokenizer")


def _filler(count: Callable[[str], int]) -> str:
    """Return a word that is one token in the middle of a sentence. Raises RequestError."""
    for word in FILLERS:
        if all(count(f"It was {word}{f' {word}' * more} far.") == count(f"It was {word} far.") + more for more in (1, 2, 16)):
            return word
    raise RequestError("this model's tokenizer has no single token for any of the words that texts are filled with")
