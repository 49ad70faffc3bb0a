"""MMLU: 57 subjects, four choices, in the four ways in which its numbers are made.

The data is cais/mmlu's parquet, Hendrycks' CSV files or simple-evals' single CSV. Sources: Hendrycks et al., "Measuring Massive
Multitask Language Understanding", 2021; SGLang's benchmark/mmlu, openai's simple-evals, sgl-eval 0.1.3, lm-eval 0.4.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.extract import LETTERS, argmax, boxed_letter, first_character, simple_evals_letter
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

REPO = "cais/mmlu"
COLUMNS = ("question", "A", "B", "C", "D", "answer")
SHOTS = 5
RAW = "The following are multiple choice questions (with answers) about {}.\n\n"
CHAT0 = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n{}"
)
BOXED = (
    "Answer the following multiple choice question. The last line of your response should be in the following format: "
    "'Answer: \\boxed{{A/B/C/D}}' (e.g. 'Answer: \\boxed{{A}}').\n\n{}"
)
READERS = {"sgl-eval": boxed_letter, "simple-evals": simple_evals_letter}

RAW5 = Mode(
    "raw5",
    "five examples in raw text, one token (SGLang's benchmark/mmlu)",
    "generate",
    "mmlu-raw-1",
    shots=SHOTS,
    max_tokens=1,
)
MODES = (
    RAW5,
    Mode(
        "chat0",
        "no examples, step by step (openai's simple-evals, SGLang's cookbook)",
        "generate",
        "mmlu-chat0-1",
        is_chat=True,
        max_tokens=2048,
        can_think=True,
    ),
    Mode(
        "sgl-eval",
        "no examples, the answer in a box (sgl-eval 0.1.3)",
        "generate",
        "mmlu-boxed-1",
        is_chat=True,
        max_tokens=2048,
        sampling={"temperature": 0.0, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0},
        can_think=True,
    ),
    Mode("ll", "log-likelihoods of the letters after raw text (lm-eval's mmlu)", "score", "mmlu-raw-1", shots=0),
)


def layouts(split: str) -> tuple[Layout, ...]:
    """Return where a split may be: the hub's file of all subjects, its folders by subject, or Hendrycks' files."""
    return (
        Layout((f"all/{split}-*", f"all/{split}", split)),
        Layout((f"*/{split}-*", f"*/{split}")),
        Layout((f"data/{split}/*_{split}", f"{split}/*_{split}", f"*_{split}"), COLUMNS, f"_{split}"),
    )


class Mmlu:
    """The task."""

    name = "mmlu"
    about = "MMLU: four choices, 57 subjects"
    modes: Sequence[Mode] = MODES
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the test's questions by subject. Raises RequestError."""
        questions = _read(data, "test")
        headers = _headers(data, mode, asked)
        for subject, rows in questions.items():
            for number, row in enumerate(rows):
                yield _item(subject, number, row, mode, headers.get(subject, ""))

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the letter that was given with the right one."""
        if mode.how == "score":
            letter: str | None = LETTERS[argmax(reply.logprobs)]
        elif mode is RAW5:
            letter = first_character(reply.text)
        else:
            usual = "simple-evals" if mode.name == "chat0" else "sgl-eval"
            letter = reader(READERS, asked.extract or usual)(reply.text)
        return Grade(letter, {"accuracy": float(letter == item.gold)})


def reader(readers: Mapping[str, Any], name: str) -> Any:
    """Return a rule by its name. Raises RequestError."""
    if name not in readers:
        raise RequestError(f"--extract {name}: expected {' or '.join(readers)}")
    return readers[name]


def _read(data: Data, split: str) -> dict[str, list[Row]]:
    """Return a split's rows by subject, each with choices and a letter. Raises RequestError."""
    found = dict[str, list[Row]]()
    for number, row in enumerate(data.rows(f"mmlu, split {split}", layouts(split)), 1):
        subject, question = _question(row, f"mmlu, split {split}, row {number}")
        found.setdefault(subject, []).append(question)
    return found


def _question(row: Row, where: str) -> tuple[str, Row]:
    if "choices" in row:
        choices, answer = field(row, "choices", list, where), row.get("answer")
        letter = LETTERS[answer] if type(answer) is int and 0 <= answer < len(choices) else answer
        subject, question = field(row, "subject", str, where), field(row, "question", str, where)
    else:  # a column for each choice: Hendrycks' without a header, simple-evals' with one
        row = {name.lower(): value for name, value in row.items()}
        choices, letter = [field(row, name, str, where) for name in "abcd"], row.get("answer")
        subject, question = row.get("subject") or "", field(row, "question", str, where)
    if letter not in tuple(LETTERS[: len(choices)]):
        raise RequestError(f"{where}: 'answer': expected one of the {len(choices)} choices, found {letter!r}")
    return subject, {"question": question, "choices": choices, "letter": letter}


def _headers(data: Data, mode: Mode, asked: Asked) -> dict[str, str]:
    """Return what stands before the questions of each subject: the introduction, and examples from the dev split."""
    shots = mode.shots if asked.shots is None else asked.shots
    if mode.shots is None or not data.has(layouts("dev")):
        if shots:
            data.rows("mmlu, split dev", layouts("dev"))  # says which files are missing
        return {}
    is_stripped = mode.how == "score"
    return {
        subject: RAW.format(subject.replace("_", " "))
        + "".join(f"{_raw(row, is_stripped)} {row['letter']}\n\n" for row in rows[:shots])
        for subject, rows in _read(data, "dev").items()
    }


def _raw(row: Row, is_stripped: bool) -> str:
    question = row["question"].strip() if is_stripped else row["question"]
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return "\n".join((question, *lines, "Answer:"))


def _item(subject: str, number: int, row: Row, mode: Mode, header: str) -> Item:
    prompt: Any
    if mode.is_chat:
        options = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
        question = row["question"] if mode.name == "chat0" else row["question"].strip("\n")
        wording = CHAT0 if mode.name == "chat0" else BOXED
        prompt = [{"role": "user", "content": wording.format(f"{question}\n\n{options}")}]
    else:
        prompt = (header or RAW.format(subject.replace("_", " "))) + _raw(row, mode.how == "score")
    choices = tuple(LETTERS[: len(row["choices"])]) if mode.how == "score" else ()
    return Item(f"{subject}/{number}", prompt, row["letter"], subject, choices)
