"""MMLU-Pro: 14 subjects, up to ten choices, as sgl-eval and lm-eval ask them.

The data is TIGER-Lab/MMLU-Pro's. Sources: Wang et al., "MMLU-Pro: A More Robust and Challenging Multi-Task Language Understanding
Benchmark", 2024; sgl-eval 0.1.3, lm-eval 0.4.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gemcutter.evals import shots
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.extract import final_letter, is_exact_match, pick_match
from gemcutter.evals.multiple_choice import answer_letter, lettered, texts
from gemcutter.evals.task import SGL_EVAL, Asked, Grade, Item, Mode, Reply

BOXLESS = (
    "Answer the following multiple choice question. The last line of your response should be in the following format: "
    "'Answer: A/B/C/D/E/F/G/H/I/J' (e.g. 'Answer: A').\n\n{}"
)
HEADER = (
    "The following are multiple choice questions (with answers) about {}. Think step by step and then finish your answer with "
    '"the answer is (X)" where X is the correct letter choice.\n'
)
STEPS = "A: Let's think step by step. "  # begins the reasoning of examples, whose question ends with it already
ANSWER = re.compile(r"answer is \(?([ABCDEFGHIJ])\)?")
SHOTS = 5

LM_EVAL = Mode(
    "lm-eval",
    "five examples with reasoning, raw text (lm-eval's mmlu_pro)",
    "generate",
    "mmlu-pro-cot-1",
    shots=SHOTS,
    max_tokens=2048,
    stop=("Question:",),
)
MODES = (
    Mode(
        "sgl-eval",
        "no examples, the answer on the last line (sgl-eval 0.1.3)",
        "generate",
        "mmlu-pro-chat-1",
        is_chat=True,
        max_tokens=2048,
        sampling=SGL_EVAL,
        can_think=True,
    ),
    LM_EVAL,
)


def layouts(split: str) -> tuple[Layout, ...]:
    """Return where a split may be."""
    return (Layout((f"data/{split}-*", f"data/{split}", f"{split}-*", split)),)


class MmluPro:
    """The task."""

    name = "mmlu-pro"
    about = "MMLU-Pro: up to ten choices, 14 subjects"
    modes: Sequence[Mode] = MODES
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the test's questions by subject. Raises RequestError."""
        questions = _read(data, "test")
        count = 0 if mode is not LM_EVAL else SHOTS if asked.shots is None else asked.shots
        examples = _read(data.beside(), "validation") if count else {}
        for subject, rows in questions.items():
            shown = shots.first(examples.get(subject, ()), count, f"mmlu-pro, split validation, {subject}")
            header = HEADER.format(subject) + "".join(_example(row) for row in shown)
            for number, row in enumerate(rows):
                name = f"{subject}/{number}"
                if mode is LM_EVAL:
                    yield Item(name, header + _raw(row), row["letter"], subject)
                else:
                    question = f"{row['question'].strip(chr(10))}\n\n{lettered(row['choices'], ')')}"
                    yield Item(name, [{"role": "user", "content": BOXLESS.format(question)}], row["letter"], subject)

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the letter that was given with the right one."""
        if mode is LM_EVAL:
            letter = pick_match(ANSWER, reply.text)
            return Grade(letter, {"accuracy": float(letter is not None and is_exact_match(letter, item.gold))})
        letter = final_letter(reply.text)
        return Grade(letter, {"accuracy": float(letter == item.gold)})


def _read(data: Data, split: str) -> dict[str, list[Row]]:
    """Return a split's rows by subject. Raises RequestError."""
    found = dict[str, list[Row]]()
    for number, row in enumerate(data.rows(f"mmlu-pro, split {split}", layouts(split)), 1):
        where = f"mmlu-pro, split {split}, row {number}"
        choices = texts(row.get("options"), where, "options")
        question = {
            "question": field(row, "question", str, where),
            "choices": choices,
            "letter": answer_letter(row.get("answer"), len(choices), where),
            "reasoning": row.get("cot_content") or "",
        }
        found.setdefault(field(row, "category", str, where), []).append(question)
    return found


def _raw(row: Row) -> str:
    options = lettered([choice.strip() for choice in row["choices"]], ".")
    return f"Question:\n{row['question']}\nOptions:\n{options}\nAnswer: Let's think step by step."


def _example(row: Row) -> str:
    return f"{_raw(row)} {row['reasoning'].replace(STEPS, '')}\n\n"
