"""Arithmetic with whole numbers: additions, subtractions and multiplications, made by a seed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gemcutter.evals.data import Data
from gemcutter.evals.generated import integer, random_of
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

COUNT = 60
SHOTS = 8
# What is asked, the sign, and the digits that both numbers have at most; a product of large ones is not done in the head.
KINDS = (("addition", "+", 3), ("subtraction", "-", 3), ("multiplication", "*", 2))
QUESTION = "What is {} {} {}? Answer with the number only."
MODES = (
    Mode("chat", "one question in a user's turn", "generate", "arithmetic-chat-1", is_chat=True, max_tokens=64, can_think=True),
    Mode("raw8", "raw text after eight examples", "generate", "arithmetic-raw-1", shots=SHOTS, max_tokens=12, stop=("\n",)),
)
NUMBER = re.compile(r"[-\u2212]?\d+")


class Arithmetic:
    """The task."""

    name = "arithmetic"
    about = "sums, differences and products of whole numbers (generated)"
    modes: Sequence[Mode] = MODES
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield as many items as are asked for, of every kind in turn. Raises RequestError."""
        shots = 0 if mode.is_chat else SHOTS if asked.shots is None else asked.shots
        examples = "".join(_line(asked, f"example {number}") for number in range(shots))
        for number in range(integer(asked, "count", COUNT, 1)):
            kind, first, sign, second, right = _numbers(asked, number)
            text = QUESTION.format(first, sign, second)
            prompt = [{"role": "user", "content": text}] if mode.is_chat else f"{examples}{first} {sign} {second} ="
            yield Item(f"{number:05}", prompt, right, kind)

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare a number of the reply: the last one of a conversation's, the first one where raw text goes on."""
        found = NUMBER.findall(reply.text.replace(",", ""))
        number = None if not found else found[-1 if mode.is_chat else 0].replace("\u2212", "-")
        return Grade(number, {"accuracy": float(number is not None and int(number) == int(item.gold))})


def _numbers(asked: Asked, item: object) -> tuple[str, int, str, int, str]:
    """Return the kind of a question, its two numbers with the sign between them, and what is right."""
    source = random_of("arithmetic", asked, item)
    kind, sign, digits = KINDS[item % len(KINDS)] if isinstance(item, int) else source.choice(KINDS)
    first, second = (source.randrange(10 ** source.randint(1, digits)) for _ in range(2))
    right = {"+": first + second, "-": first - second, "*": first * second}[sign]
    return kind, first, sign, second, str(right)


def _line(asked: Asked, item: object) -> str:
    _, first, sign, second, right = _numbers(asked, item)
    return f"{first} {sign} {second} = {right}\n"
