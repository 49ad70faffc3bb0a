"""A user's own multiple choice: JSON lines of a question, its choices and the right one, by log-likelihoods of letters.

Rows have "question", "choices" (a list of texts) and "answer" (a letter, or a number from 0), and may have a "subject".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemcutter.evals.data import Data, Layout, field
from gemcutter.evals.extract import LETTERS, argmax
from gemcutter.evals.multiple_choice import answer_letter, lettered, texts
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

RAW = Mode("raw", "log-likelihoods of the letters after raw text", "score", "choices-1")
CHAT = Mode("chat", "log-likelihoods of the letters as replies to a turn", "score", "choices-1", is_chat=True)


class Choices:
    """The task."""

    name = "choices"
    about = "your own multiple choice: rows of question, choices, answer"
    modes: Sequence[Mode] = (RAW, CHAT)
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the questions in order. Raises RequestError."""
        for number, row in enumerate(data.rows("choices", (Layout(("*",)),))):
            where = f"choices, row {number + 1}"
            choices = texts(row.get("choices"), where)
            letter = answer_letter(row.get("answer"), len(choices), where)
            text = f"{field(row, 'question', str, where)}\n{lettered(choices, '.')}\nAnswer:"
            prompt = [{"role": "user", "content": text}] if mode.is_chat else text
            subject = field(row, "subject", str, where) if "subject" in row else ""
            yield Item(str(number), prompt, letter, subject, tuple(LETTERS[: len(choices)]))

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the most likely letter with the right one."""
        letter = LETTERS[argmax(reply.logprobs)]
        return Grade(letter, {"accuracy": float(letter == item.gold)})
