"""MMMU: questions of 30 subjects about images, with options or open.

The data is MMMU/MMMU's parquet, a folder for each subject. Images stand where a question or an option names them, as often as it
does. Sources: Yue et al., "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark", 2023; SGLang's
benchmark/mmmu, lm-eval 0.4.13. Read `mmmu_pro.py` for the harder one, `extract_mmmu.py` for the rules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.extract import LETTERS
from gemcutter.evals.extract_mmmu import is_open_answer_right, mmmu_letter, open_answers
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

NAMED_IMAGE = re.compile(r"<image ([1-7])>")
LETTER_WORDING = "Answer with the option's letter from the given choices directly."
OPEN_WORDING = "Answer the question using a single word or phrase."
LAYOUTS = (Layout(("*/validation-*", "*/validation")), Layout(("validation-*", "validation")))

DIRECT = Mode(
    "mmmu-direct",
    "the letter at once, 30 tokens (SGLang's benchmark/mmmu)",
    "generate",
    "mmmu-direct-1",
    is_chat=True,
    max_tokens=30,
    sampling={"temperature": 0.001},
)
LM_EVAL = Mode(
    "lm-eval", "the letter at once, 512 tokens (lm-eval's mmmu_val)", "generate", "mmmu-val-1", is_chat=True, max_tokens=512
)


class Mmmu:
    """The task."""

    name = "mmmu"
    about = "MMMU: questions about images, 30 subjects"
    modes: Sequence[Mode] = (DIRECT, LM_EVAL)
    media: Sequence[str] = ("image",)

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the validation questions by subject. Raises RequestError."""
        for number, row in enumerate(data.rows("mmmu, split validation", LAYOUTS), 1):
            id, where = name_row("mmmu", row, number)
            options = read_options(row, where)
            answer = field(row, "answer", (str, list), where)
            if not options and mode is DIRECT:
                answer = _several(answer)
            content = with_images(_prompt(row, mode, options, where), row, where)
            subject = "_".join(id.split("_")[1:-1])
            about = {"options": dict(zip(LETTERS, options, strict=False))}
            yield Item(id, [{"role": "user", "content": content}], answer, subject, about=about)

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the letter, or an open answer, with the right one. A reply that names no letter is wrong."""
        if options := item.about["options"]:
            letter = mmmu_letter(reply.text, options)
            return Grade(letter, {"accuracy": float(letter in (item.gold if isinstance(item.gold, list) else [item.gold]))})
        answers = open_answers(reply.text)
        return Grade(answers if reply.text.strip() else None, {"accuracy": float(is_open_answer_right(answers, item.gold))})


def name_row(task: str, row: Row, number: int) -> tuple[str, str]:
    """Return a row's id, and how errors call it. Raises RequestError."""
    id = field(row, "id", str, f"{task}, row {number}")
    return id, f"{task}, row {number} ({id})"


def read_options(row: Row, where: str) -> list[str]:
    """Return a row's options, none for an open question; a Python list as text is read, never run. Raises RequestError."""
    if row.get("question_type", "multiple-choice") == "open":
        return []
    options = field(row, "options", (str, list), where)
    if isinstance(options, str):
        options = _literal(options)
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        raise RequestError(f"{where}: 'options': expected a list of texts as Python writes it, found {row['options']!r:.80}")
    if len(options) > len(LETTERS):
        raise RequestError(f"{where}: 'options': expected at most {len(LETTERS)}, found {len(options)}")
    return options


def _literal(text: str) -> Any:
    """Return what a text is as Python's literal, None where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _several(answer: str | list[str]) -> str | list[str]:
    """Return an open question's answers as MMMU's own answer file has them: a list, where the text is one."""
    found = _literal(answer) if isinstance(answer, str) and answer.startswith("[") else None
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else answer


def _prompt(row: Row, mode: Mode, options: Sequence[str], where: str) -> str:
    question = field(row, "question", str, where)
    gap = "\n" if mode is DIRECT else "\n\n"
    if not options:
        return f"{question}{gap}{OPEN_WORDING}"
    # SGLang's template has one line break where lm-eval's has two, but ends its options with another.
    lines = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}{gap}{lines}\n\n{LETTER_WORDING}"


def with_images(text: str, row: Row, where: str) -> list[Mapping[str, Any]]:
    """Return a prompt's parts: text, and an image wherever one is named. Raises RequestError for images that there are not."""
    parts, end = list[Mapping[str, Any]](), 0
    for found in NAMED_IMAGE.finditer(text):
        parts += _text(text[end : found.start()])
        parts.append(image_part(row, f"image_{found[1]}", where))
        end = found.end()
    return [*parts, *_text(text[end:])]


def _text(text: str) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def image_part(row: Row, name: str, where: str) -> Mapping[str, Any]:
    """Return an image of a row as a part. Raises RequestError."""
    image = row.get(name)
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, bytes) or not data:
        raise RequestError(f"{where}: {name!r}: expected an image's bytes, found {'none' if image is None else 'something else'}")
    return {"type": "image", "image": data}
