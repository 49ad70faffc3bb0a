"""MMLU: 57 subjects, four choices, in the five ways in which its numbers are made.

The data is cais/mmlu's parquet, Hendrycks' CSV files or simple-evals' single CSV. Sources: Hendrycks et al., "Measuring Massive
Multitask Language Understanding", 2021; SGLang's benchmark/mmlu, openai's simple-evals, sgl-eval 0.1.3, lm-eval 0.4.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemcutter.evals import shots
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.extract import (
    LETTERS,
    argmax,
    final_letter,
    first_character,
    is_exact_match,
    simple_evals_letter,
)
from gemcutter.evals.multiple_choice import answer_letter, lettered, texts
from gemcutter.evals.task import SGL_EVAL, Asked, Grade, Item, Mode, Reply

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
READERS = {"sgl-eval": final_letter, "simple-evals": simple_evals_letter}

RAW5 = Mode(
    "raw5",
    "five examples in raw text, one token (SGLang's benchmark/mmlu)",
    "generate",
    "mmlu-raw-1",
    shots=SHOTS,
    max_tokens=1,
)
GENERATE = Mode(
    "lm-eval-generate",
    "the letter as text after raw text (lm-eval's mmlu_generative)",
    "generate",
    "mmlu-raw-1",
    shots=0,
    max_tokens=256,
    stop=("</s>", "\n"),
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
        rules=("simple-evals", "sgl-eval"),
    ),
    Mode(
        "sgl-eval",
        "no examples, the answer in a box (sgl-eval 0.1.3)",
        "generate",
        "mmlu-boxed-1",
        is_chat=True,
        max_tokens=2048,
        sampling=SGL_EVAL,
        can_think=True,
        rules=("sgl-eval", "simple-evals"),
    ),
    Mode("ll", "log-likelihoods of the letters after raw text (lm-eval's mmlu)", "score", "mmlu-raw-1", shots=0),
    GENERATE,
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
        headers = {} if mode.is_chat else _headers(data, mode, asked, list(questions))
        for subject, rows in questions.items():
            for number, row in enumerate(rows):
                yield _item(subject, number, row, mode, headers.get(subject, ""))

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the letter that was given with the right one."""
        if mode is GENERATE:
            given = reply.text.partition("\n")[0].strip()
            return Grade(given or None, {"accuracy": float(is_exact_match(given, item.gold, keeps_punctuation=False))})
        if mode.how == "score":
            letter: str | None = LETTERS[argmax(reply.logprobs)]
        elif mode is RAW5:
            letter = first_character(reply.text)
        else:
            letter = READERS[asked.extract or mode.rules[0]](reply.text)
        return Grade(letter, {"accuracy": float(letter == item.gold)})


def _read(data: Data, split: str) -> dict[str, list[Row]]:
    """Return a split's rows by subject, each with choices and a letter. Raises RequestError."""
    found = dict[str, list[Row]]()
    for number, row in enumerate(data.rows(f"mmlu, split {split}", layouts(split)), 1):
        subject, question = _question(row, f"mmlu, split {split}, row {number}")
        found.setdefault(subject, []).append(question)
    return found


def _question(row: Row, where: str) -> tuple[str, Row]:
    if "choices" in row:
        choices = texts(row["choices"], where)
        subject, question = field(row, "subject", str, where), field(row, "question", str, where)
    else:  # a column for each choice: Hendrycks' without a header, simple-evals' with one
        row = {name.lower(): value for name, value in row.items()}
        choices = [field(row, name, str, where) for name in "abcd"]
        subject, question = row.get("subject") or "", field(row, "question", str, where)
    letter = answer_letter(row.get("answer"), len(choices), where)
    return subject, {"question": question, "choices": choices, "letter": letter}


def _headers(data: Data, mode: Mode, asked: Asked, subjects: Sequence[str]) -> dict[str, str]:
    """Return what stands before the questions of each subject: the introduction, and examples from the dev split."""
    count = (mode.shots if asked.shots is None else asked.shots) or 0
    examples = _read(data.beside(), "dev") if count else {}
    return {
        subject: RAW.format(subject.replace("_", " "))
        + "".join(
            f"{_raw(row, mode)} {row['letter']}\n\n"
            for row in shots.first(examples.get(subject, ()), count, f"mmlu, split dev, {subject}")
        )
        for subject in subjects
    }


def _raw(row: Row, mode: Mode) -> str:
    """Return a question as raw text; SGLang's keeps the blanks around it."""
    question = row["question"] if mode is RAW5 else row["question"].strip()
    return f"{question}\n{lettered(row['choices'], '.')}\nAnswer:"


def _item(subject: str, number: int, row: Row, mode: Mode, header: str) -> Item:
    name = f"{subject}/{number}"
    if not mode.is_chat:
        choices = tuple(LETTERS[: len(row["choices"])]) if mode.how == "score" else ()
        return Item(name, header + _raw(row, mode), row["letter"], subject, choices)
    question = row["question"] if mode.name == "chat0" else row["question"].strip("\n")
    wording = CHAT0 if mode.name == "chat0" else BOXED
    text = wording.format(f"{question}\n\n{lettered(row['choices'], ')')}")
    return Item(name, [{"role": "user", "content": text}], row["letter"], subject)
