"""ARC: questions of school science with three to five choices, easy and hard ones, as lm-eval 0.4.13 asks them.

The data is allenai/ai2_arc's, or the authors' JSON lines. Source: Clark et al., "Think you have Solved Question Answering? Try
ARC, the AI2 Reasoning Challenge", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.extract import LETTERS, is_exact_match
from gemcutter.evals.multiple_choice import likeliest, texts
from gemcutter.evals.shots import draws
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

# lm-eval's wording has a backslash and an n where line breaks were meant, and shows no more than four choices.
CHAT = (
    r"Given the following question and four candidate answers (A, B, C and D), choose the best answer.\nQuestion: {question}"
    r'{choices}\nYour response should end with "The best answer is [the_answer_letter]" where the [the_answer_letter] is one of '
    r"A, B, C or D."
)
PREFIX = "The best answer is"
SHOWN = 4

LL = Mode("ll", "log-likelihoods of the choices' texts (lm-eval's arc_easy, arc_challenge)", "score", "arc-1", shots=0)
LM_EVAL_CHAT = Mode(
    "lm-eval-chat",
    "the letter after the reply's beginning (lm-eval's arc_challenge_chat)",
    "generate",
    "arc-chat-1",
    is_chat=True,
    max_tokens=100,
    stop=("\n\n", "."),
)


class Arc:
    """One of the two parts, which are tasks of their own."""

    media: Sequence[str] = ()

    def __init__(self, part: str, modes: Sequence[Mode]) -> None:
        """Open a part by its name in the data, such as ARC-Easy."""
        self.name = part.lower()
        self.about = f"{part}: questions of school science"
        self.modes = modes
        self._part = part

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the test's questions in order. Raises RequestError."""
        questions = self._read(data, "test")
        pool = self._read(data.beside(), "train") if asked.shots else []
        examples = draws(pool, asked.shots or 0, f"{self.name}, split train", questions)
        for number, (row, shown) in enumerate(zip(questions, examples, strict=True)):
            if mode is LM_EVAL_CHAT:
                yield _chat_item(str(number), row)
            else:
                header = "".join(f"{_raw(shot)} {shot['choices'][shot['right']]}\n\n" for shot in shown)
                yield Item(str(number), header + _raw(row), row["right"], choices=tuple(row["choices"]))

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the most likely choice, or the letter that was given, with the right one."""
        if mode.how == "score":
            return likeliest(reply.logprobs, item.choices, item.gold)
        given = reply.text.strip()
        return Grade(given or None, {"accuracy": float(is_exact_match(given, item.gold, keeps_punctuation=False))})

    def _read(self, data: Data, split: str) -> list[Row]:
        """Return a split's questions. Raises RequestError."""
        what = f"{self.name}, split {split}"
        rows = data.rows(what, layouts(self._part, split))
        return [_question(row, f"{what}, row {number}") for number, row in enumerate(rows, 1)]


def arc_easy() -> Arc:
    """Return the part of easy questions."""
    return Arc("ARC-Easy", (LL,))


def arc_challenge() -> Arc:
    """Return the part of questions that simple methods answer wrong."""
    return Arc("ARC-Challenge", (LL, LM_EVAL_CHAT))


def layouts(part: str, split: str) -> tuple[Layout, ...]:
    """Return where a split may be: the hub's folders by part, or the authors' files."""
    name = f"{part}-{split.capitalize()}"
    return (Layout((f"{part}/{split}-*", f"{part}/{split}", f"{part}/{name}", name, f"*/{part}/{name}")),)


def _question(row: Row, where: str) -> Row:
    if isinstance(row.get("question"), dict):  # the authors' file
        stem = row["question"]
        choices: Any = stem.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise RequestError(f"{where}: 'question': expected 'stem' and 'choices', a list of objects")
        question, labels = field(stem, "stem", str, where), [choice.get("label") for choice in choices]
        choices = [choice.get("text") for choice in choices]
    else:
        stored = field(row, "choices", dict, where)
        question, labels, choices = field(row, "question", str, where), stored.get("label"), stored.get("text")
    choices, key = texts(choices, where), field(row, "answerKey", str, where)
    if not isinstance(labels, list) or key not in labels or len(labels) != len(choices):
        raise RequestError(f"{where}: 'answerKey': expected one of the labels {labels}, found {key!r}")
    return {"question": question, "choices": choices, "right": labels.index(key), "key": key}


def _raw(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _chat_item(name: str, row: Row) -> Item:
    choices = "".join(rf"\n{letter}. {choice}" for letter, choice in zip(LETTERS[:SHOWN], row["choices"], strict=False))
    text = CHAT.format(question=row["question"].strip(), choices=choices)
    key = LETTERS[int(row["key"]) - 1] if row["key"] in ("1", "2", "3", "4") else row["key"]
    prompt = [{"role": "user", "content": text}, {"role": "assistant", "content": PREFIX}]
    return Item(name, prompt, key, options={"continue_final_message": True})
