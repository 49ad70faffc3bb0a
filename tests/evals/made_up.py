"""Made-up questions in the columns of each public data set, replies to them, and writers for the layouts in which sets lie.

Owns no rule of a task. Texts have blanks at their ends, braces, quotes, commas and line breaks, so that prompts that are cleaned
otherwise than in the tools differ.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ODD = ("", " ", "\n", "  {{braces}} {0} ", ' "quoted", ', " größer\tals ", "\n\n", " 100% [title] [sub] ")


def pick(*parts: Any, of: int) -> int:
    """Return a number below `of` that depends on texts and numbers alone."""
    return int(hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest(), 16) % of


def odd(*parts: Any) -> str:
    """Return blanks, braces or another oddity."""
    return ODD[pick("odd", *parts, of=len(ODD))]


def mmlu(subject: str, split: str, count: int) -> list[Row]:
    """Return rows as cais/mmlu has them."""
    return [
        {
            "question": f"{odd(subject, split, n)}What is {n} of {subject} in {split}?{odd(n, split)}",
            "subject": subject,
            "choices": [f"{odd(subject, n, c)}choice {c} of {n}" for c in range(4)],
            "answer": pick(subject, split, n, of=4),
        }
        for n in range(count)
    ]


def mmlu_pro(category: str, split: str, count: int) -> list[Row]:
    """Return rows as TIGER-Lab/MMLU-Pro has them, with three to ten options."""
    found = list[Row]()
    for n in range(count):
        options = [f"{odd(category, n, c)}option {c}{odd(c, n)}" for c in range(3 + pick(category, split, n, of=8))]
        right = pick(category, n, of=len(options))
        reasoning = f"A: Let's think step by step. {odd(n)}It is {n}. The answer is ({'ABCDEFGHIJ'[right]})."
        found.append(
            {
                "question_id": 70 + n,
                "question": f"{odd(split, n)}Which {n} of {category}?{odd(category, split, n)}",
                "options": options,
                "answer": "ABCDEFGHIJ"[right],
                "answer_index": right,
                "cot_content": reasoning if split == "validation" else "",
                "category": category,
                "src": "made up",
            }
        )
    return found


GSM8K_ANSWERS = ("7", "18", "1,042", "-3", "0", "250,000", "5.5", "64")


def gsm8k(split: str, count: int) -> list[Row]:
    """Return rows as openai/gsm8k has them."""
    return [
        {
            "question": f"{odd(split, n)}Ann has {n} pears and buys {n + 2} more in {split}. How many?{odd(n)}",
            "answer": f"She has {n}.\nThen {n} + {n + 2} = <<{n}+{n + 2}={2 * n + 2}>>.\n#### "
            f"{GSM8K_ANSWERS[pick(split, n, of=len(GSM8K_ANSWERS))]}",
        }
        for n in range(count)
    ]


def hellaswag(split: str, count: int) -> list[Row]:
    """Return rows as Rowan/hellaswag has them."""
    return [
        {
            "ind": n,
            "activity_label": f"Cutting {n}",
            "ctx_a": f"{odd(n)}[header] How to cut {n} [title] Take a knife.",
            "ctx_b": ("", "he CUTS it", "the man [substeps] waits  twice")[n % 3],
            "ctx": "",
            "endings": [f"{odd(split, n, c)}ends [step] in way {c}  here {'again ' * c}." for c in range(4)],
            "source_id": f"made~{n}",
            "split": split,
            "split_type": "indomain",
            "label": str(pick(split, n, of=4)),
        }
        for n in range(count)
    ]


def arc(part: str, split: str, count: int) -> list[Row]:
    """Return rows as allenai/ai2_arc has them: letters or numbers as labels, three to five choices."""
    found = list[Row]()
    for n in range(count):
        labels = ("ABCD", "1234", "ABC", "ABCDE")[n % 4]
        found.append(
            {
                "id": f"{part}_{split}_{n}",
                "question": f"{odd(part, n)}Why does {n} melt in {split}?{odd(n, split)}",
                "choices": {"text": [f"because {label * (1 + n)}" for label in labels], "label": list(labels)},
                "answerKey": labels[pick(part, split, n, of=len(labels))],
            }
        )
    return found


def write_parquet(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as the hub has them."""
    import pyarrow as arrow  # here, since the environments of other tools that make goldens lack it
    import pyarrow.parquet as parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(list(rows)), file)


def write_lines(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, packed where the name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_csv(file: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write rows as CSV, the first may be a header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows(rows)


def write_hendrycks(folder: Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """Write MMLU as its authors did: a file for each split and subject, without a header."""
    for split, rows in splits.items():
        for subject in {row["subject"] for row in rows}:
            lines = [[r["question"], *r["choices"], "ABCD"[r["answer"]]] for r in rows if r["subject"] == subject]
            write_csv(folder / "data" / split / f"{subject}_{split}.csv", lines)


def write_simple_evals(file: Path, rows: Sequence[Row]) -> None:
    """Write MMLU as simple-evals has it: one file with a header, and a column of numbers first."""
    lines = [[str(n), r["question"], *r["choices"], "ABCD"[r["answer"]], r["subject"]] for n, r in enumerate(rows)]
    write_csv(file, [["", "Question", "A", "B", "C", "D", "Answer", "Subject"], *lines])


def fill(form: str, answer: str) -> str:
    """Return a reply with an answer in all its places, and with doubled braces as single ones."""
    return form.replace("{{{}}}", "{" + answer + "}").replace("{}", answer).replace("{{", "{").replace("}}", "}")


LETTER_REPLIES = (
    "Answer: {}",
    "**Answer:** {}",
    "Answer: \\boxed{{{}}}",
    "The answer is ({}).",
    "the answer is {}",
    "answer: {}",
    " {}",
    "{}.",
    "({})",
    "I think {} fits. So the best answer is {}",
    "\\boxed{{\\text{{{}}}}}",
    "\\boxed{{The {} one}}",
    "Answer: {}\n\nAnswer: D",
    "The final answer is {}",
    "The final answer is \\boxed{{{}}}",
    "_Answer_: {}",
    "Answer:\n{}",
    "Answer: Absolutely not {}",
    "\\boxed{{{}",
    "The choice {} is wrong, because I",
    "",
    "I don't know.",
    "Answer: {}) because",
    "\\boxed {{{}}}",
    "\\boxed{{{}}} or \\boxed{{A}}",
    "Answer: $\\boxed{{{}}}$",
    "Answer: {}1",
    "answer is ({})\nQuestion",
    "\\fbox{{{}}}",
    "The final answer is {}\nindeed",
    "{}\n{}",
    "\\boxed{{}} Answer: {}",
)
LETTERS = ("A", "B", "C", "D", "E", "J", "a", "c", "د", "ব", "Ｃ", "أ", "AB", "7")


def letter_replies() -> list[str]:
    """Return replies to multiple choice: right and wrong, in lower case and other scripts, cut off, and without an answer."""
    return list(
        dict.fromkeys(
            form.replace("{}", letter, 9).replace("{{", "{").replace("}}", "}") for form in LETTER_REPLIES for letter in LETTERS
        )
    )


NUMBER_REPLIES = (
    " She has {}.\n#### {}",
    "#### {}",
    "The answer is {}.",
    "The answer is ${}.",
    "The answer is {}",
    "So {} it is. ####  {}",
    "{}",
    "{}.",
    "It costs ${}.",
    "${} and no more, 3 of them",
    "\\boxed{{{}}}",
    "\\boxed{{{}}}.",
    "\\boxed{{\\${}}}",
    "\\boxed{{{}\\%}}",
    "\\boxed{{x = {}}}",
    "\\boxed{{\\text{{{}}}}}",
    "\\boxed{{{}\\text{{ pears}}}}",
    "\\boxed{{\\frac{{{}}}{{1}}}}",
    "no number",
    "",
    "#### x{}",
    "\\boxed{{{}",
    "\\boxed{{{}.0}}",
    "####{}",
    "the answer is {}.",
    "The answer is -{}.",
    "first 5, then {} and, well",
    "\\boxed{{{} \\text{{ per day}}}}",
    "\\boxed{{({})}}",
    "\\boxed{{0{}}}",
    "1{}, 2{}.",
    "{}.50",
)


def number_replies() -> list[str]:
    """Return replies to sums: right and wrong, wrapped in several ways, cut off, and without a number."""
    numbers = (*GSM8K_ANSWERS, "1042", "250000", "6", "007", "12")
    return list(
        dict.fromkeys(
            form.replace("{}", number, 9).replace("{{", "{").replace("}}", "}") for form in NUMBER_REPLIES for number in numbers
        )
    )
