"""HellaSwag: which of four endings goes on with a text, by log-likelihoods as lm-eval 0.4.13 asks it.

The data is Rowan/hellaswag's, or the authors' JSON lines. Source: Zellers et al., ACL 2019, arXiv 1905.07830.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.multiple_choice import likeliest, texts
from gemcutter.evals.shots import draws
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

BRACKETED = re.compile(r"\[.*?\]")
LL = Mode("ll", "log-likelihoods of the endings (lm-eval's hellaswag)", "score", "hellaswag-1", shots=0)


def layouts(split: str) -> tuple[Layout, ...]:
    """Return where a split may be: the hub's files, or the authors'."""
    short = {"validation": "val"}.get(split, split)
    return (Layout((f"data/{split}-*", f"data/{split}", f"{split}-*", split, f"hellaswag_{short}", f"data/hellaswag_{short}")),)


class Hellaswag:
    """The task."""

    name = "hellaswag"
    about = "HellaSwag: which of four endings goes on with a text"
    modes: Sequence[Mode] = (LL,)
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the questions of the validation part, whose answers are public. Raises RequestError."""
        questions = _read(data, "validation")
        pool = _read(data.beside(), "train") if asked.shots else []
        examples = draws(pool, asked.shots or 0, "hellaswag, split train", questions, leaves_out=True)
        for number, (row, shown) in enumerate(zip(questions, examples, strict=True)):
            header = "".join(f"{shot['text']} {shot['endings'][shot['label']]}\n\n" for shot in shown)
            yield Item(str(number), header + row["text"], row["label"], choices=tuple(row["endings"]))

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the most likely ending with the right one."""
        return likeliest(reply.logprobs, item.choices, item.gold)


def _read(data: Data, split: str) -> list[Row]:
    """Return a split's texts, endings and labels. Raises RequestError."""
    rows = data.rows(f"hellaswag, split {split}", layouts(split))
    return [_question(row, f"hellaswag, split {split}, row {number}") for number, row in enumerate(rows, 1)]


def _question(row: Row, where: str) -> Row:
    endings = [_clean(ending) for ending in texts(row.get("endings"), where, "endings")]
    label = str(field(row, "label", (str, int), where))
    if not label.isdecimal() or int(label) >= len(endings):
        raise RequestError(f"{where}: 'label': expected one of the {len(endings)} endings from 0, found {label!r}")
    activity, first, second = (field(row, name, str, where) for name in ("activity_label", "ctx_a", "ctx_b"))
    return {"text": _clean(f"{activity}: {first} {second.capitalize()}"), "endings": endings, "label": int(label)}


def _clean(text: str) -> str:
    """Return a text without WikiHow's marks in brackets, as lm-eval cleans it."""
    return BRACKETED.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
