"""Copying: a text is to be repeated as it is, which shows damage to attention and to the tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from gemcutter.evals.data import Data
from gemcutter.evals.generated import ADJECTIVES, NOUNS, integer, random_of, sentence, words
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

COUNT = 40
SHOTS = 3
QUESTION = "Repeat the following text exactly, and write nothing else.\n\n{}"
SIGNS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+/"
ACCENTED = words("é è ü ß ñ ç ø å Ж д я λ π 水 火 山 あ い ☀ ✓")
KINDS: Mapping[str, Callable[[random.Random], str]] = {
    "words": lambda source: " ".join(source.choices(NOUNS + ADJECTIVES, k=12)),
    "sentences": lambda source: " ".join(sentence(source) for _ in range(3)),
    "digits": lambda source: " ".join(str(source.randrange(10)) for _ in range(16)),
    "code": lambda source: "".join(source.choices(SIGNS, k=24)),
    "scripts": lambda source: " ".join(source.choices(ACCENTED, k=10)),
}
MODES = (
    Mode("chat", "one text in a user's turn", "generate", "copy-chat-1", is_chat=True, max_tokens=160, can_think=True),
    Mode("raw3", "raw text after three examples", "generate", "copy-raw-1", shots=SHOTS, max_tokens=160, stop=("\n",)),
)


class Copying:
    """The task."""

    name = "copy"
    about = "texts that are to be repeated exactly (generated)"
    modes: Sequence[Mode] = MODES
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield as many items as are asked for, of every kind in turn. Raises RequestError."""
        shots = SHOTS if asked.shots is None else asked.shots
        for number in range(integer(asked, "count", COUNT, 1)):
            kind = list(KINDS)[number % len(KINDS)]
            text = KINDS[kind](random_of("copy", asked, number))
            yield Item(f"{number:05}", _prompt(text, kind, mode, asked, shots), text, kind)

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the reply without blanks around it; `beginning` is the share of the text before the first mistake."""
        text = reply.text.strip()
        alike = [one == other for one, other in zip(text, item.gold, strict=False)]
        beginning = [*alike, False].index(False) / len(item.gold)
        return Grade(text or None, {"exact": float(text == item.gold), "beginning": beginning})


def _prompt(text: str, kind: str, mode: Mode, asked: Asked, shots: int) -> str | list[dict[str, str]]:
    if mode.is_chat:
        return [{"role": "user", "content": QUESTION.format(text)}]
    examples = [KINDS[kind](random_of("copy", asked, f"example {number}")) for number in range(shots)]
    return "".join(f"Text: {each}\nCopy: {each}\n\n" for each in examples) + f"Text: {text}\nCopy:"
