"""The layouts in which data sets are published give the same questions, and what is missing or damaged is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.run import items_of
from gemcutter.evals.task import Asked, Item
from gemcutter.evals.tasks import TASKS, expand, find_mode, open_task
from tests.evals import made_up

SUBJECTS = ("anatomy", "college_physics")
MMLU = {
    split: [row for name in SUBJECTS for row in made_up.mmlu(name, split, count)] for split, count in (("test", 6), ("dev", 5))
}
GSM8K = {split: made_up.gsm8k(split, 7) for split in ("test", "train")}
HELLASWAG = {split: made_up.hellaswag(split, 6) for split in ("validation", "train")}
ARC = {split: made_up.arc("ARC-Easy", split, 8) for split in ("test", "train")}


def items(task: str, mode: str, place: Path, **asked: Any) -> list[Item]:
    found = open_task(task)
    return items_of(found, Data.of(task, TASKS[task].repo, str(place)), find_mode(found, mode), Asked(**asked))


def hub_by_subject(folder: Path) -> Path:
    for split, rows in MMLU.items():
        for subject in SUBJECTS:
            made_up.write_parquet(folder / subject / f"{split}-0.parquet", [row for row in rows if row["subject"] == subject])
    return folder


def hub_all(folder: Path) -> Path:
    for split, rows in MMLU.items():
        made_up.write_parquet(folder / "all" / f"{split}-00000-of-00001.parquet", rows)
    made_up.write_parquet(folder / "anatomy" / "test-0.parquet", rows[:1])  # a subject of its own as well
    return folder


def hendrycks(folder: Path) -> Path:
    made_up.write_hendrycks(folder, MMLU)
    return folder


def lines(folder: Path) -> Path:
    for split, rows in MMLU.items():
        made_up.write_lines(folder / f"{split}.jsonl", rows)
    return folder


def packed_lines(folder: Path) -> Path:
    for split, rows in MMLU.items():
        made_up.write_lines(folder / f"{split}.jsonl.gz", rows)
    return folder


def one_json(folder: Path) -> Path:
    for split, rows in MMLU.items():
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


def one_file(folder: Path) -> Path:
    """The file of the test is named itself, and examples are beside it."""
    return packed_lines(folder) / "test.jsonl.gz"


def simple_evals(folder: Path) -> Path:
    made_up.write_simple_evals(folder / "mmlu.csv", MMLU["test"])
    made_up.write_parquet(folder / "all" / "dev-0.parquet", MMLU["dev"])
    return folder / "mmlu.csv"


@pytest.mark.parametrize("write", [hub_by_subject, hendrycks, lines, packed_lines, one_json, one_file, simple_evals])
@pytest.mark.parametrize("mode", ["raw5", "chat0", "sgl-eval", "ll", "lm-eval-generate"])
def test_mmlu(tmp_path: Path, write: Callable[[Path], Path], mode: str) -> None:
    places = [tmp_path / "one", tmp_path / "other"]
    for place in places:
        place.mkdir()
    wanted = items("mmlu", mode, hub_all(places[0]))
    assert items("mmlu", mode, write(places[1])) == wanted
    assert len(wanted) == len(MMLU["test"])


def test_a_subjects_own_file(tmp_path: Path) -> None:
    hendrycks(tmp_path)
    for name in ("anatomy_test.csv", "anatomy_dev.csv"):
        (tmp_path / name).write_bytes((tmp_path / "data" / name[8:-4] / name).read_bytes())
    found = items("mmlu", "raw5", tmp_path / "anatomy_test.csv")
    assert found == [item for item in items("mmlu", "raw5", tmp_path) if item.subject == "anatomy"]


def test_examples_never_come_from_the_file_of_the_questions(tmp_path: Path) -> None:
    made_up.write_simple_evals(tmp_path / "mmlu.csv", MMLU["test"])
    with pytest.raises(RequestError, match=r"split dev.*none of these files"):
        items("mmlu", "raw5", tmp_path / "mmlu.csv")
    assert len(items("mmlu", "chat0", tmp_path / "mmlu.csv")) == len(MMLU["test"])


def test_a_raw_prompt_is_sglangs(tmp_path: Path) -> None:
    rows = [{**MMLU["test"][0], "question": " What?\n", "choices": ["w", " x", "y ", "z"], "answer": 2}]
    shots = [{**rows[0], "question": f"Which {n}?", "subject": "college_physics", "answer": 1} for n in range(6)]
    made_up.write_parquet(tmp_path / "test.parquet", [{**rows[0], "subject": "college_physics"}])
    made_up.write_parquet(tmp_path / "dev.parquet", shots)
    (item,) = items("mmlu", "raw5", tmp_path)
    choices = "A. w\nB.  x\nC. y \nD. z\nAnswer:"
    examples = "".join(f"Which {n}?\n{choices} B\n\n" for n in range(5))
    start = "The following are multiple choice questions (with answers) about college physics.\n\n"
    assert item.prompt == f"{start}{examples} What?\n\n{choices}"
    assert item.gold == "C"


@pytest.mark.parametrize("mode", ["sglang-raw5", "lm-eval", "lm-eval-cot", "sgl-eval"])
def test_gsm8k(tmp_path: Path, mode: str) -> None:
    for split, rows in GSM8K.items():
        made_up.write_parquet(tmp_path / "hub" / "main" / f"{split}-0.parquet", rows)
        made_up.write_lines(tmp_path / "github" / "grade_school_math" / "data" / f"{split}.jsonl", rows)
        made_up.write_lines(tmp_path / "plain" / f"{split}.jsonl", rows)
    wanted = items("gsm8k", mode, tmp_path / "hub")
    assert items("gsm8k", mode, tmp_path / "github") == wanted
    assert items("gsm8k", mode, tmp_path / "plain" / "test.jsonl") == wanted


def test_sglangs_gsm8k_begins_with_the_test_itself(tmp_path: Path) -> None:
    made_up.write_lines(tmp_path / "test.jsonl", GSM8K["test"])
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in GSM8K["test"][:5])
    found = items("gsm8k", "sglang-raw5", tmp_path)
    assert [item.prompt for item in found] == [f"{shots}Question: {row['question']}\nAnswer:" for row in GSM8K["test"]]


def test_hellaswag(tmp_path: Path) -> None:
    for split, rows in HELLASWAG.items():
        made_up.write_parquet(tmp_path / "hub" / "data" / f"{split}-0.parquet", rows)
        name = {"validation": "hellaswag_val", "train": "hellaswag_train"}[split]
        made_up.write_lines(tmp_path / "own" / f"{name}.jsonl", [{**row, "label": int(row["label"])} for row in rows])
    wanted = items("hellaswag", "ll", tmp_path / "hub", shots=3)
    assert items("hellaswag", "ll", tmp_path / "own", shots=3) == wanted
    assert items("hellaswag", "ll", tmp_path / "own" / "hellaswag_val.jsonl", shots=3) == wanted


def test_arc(tmp_path: Path) -> None:
    for split, rows in ARC.items():
        made_up.write_parquet(tmp_path / "hub" / "ARC-Easy" / f"{split}-0.parquet", rows)
        own = [
            {
                "id": row["id"],
                "question": {
                    "stem": row["question"],
                    "choices": [
                        {"text": text, "label": label}
                        for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                    ],
                },
                "answerKey": row["answerKey"],
            }
            for row in rows
        ]
        made_up.write_lines(tmp_path / "own" / "ARC-V1" / "ARC-Easy" / f"ARC-Easy-{split.capitalize()}.jsonl", own)
    assert items("arc-easy", "ll", tmp_path / "own", shots=2) == items("arc-easy", "ll", tmp_path / "hub", shots=2)
    assert [part.task for part in expand("arc")] == ["arc-easy", "arc-challenge"]


BAD = {
    "mmlu": (MMLU["test"][0], "answer", 4, "row 2: 'answer': expected one of the 4 choices, found 4"),
    "mmlu-pro": (made_up.mmlu_pro("law", "test", 1)[0], "options", ["one"], "row 2: 'options': expected 2 to 26, found 1"),
    "gsm8k": (GSM8K["test"][0], "answer", "It is 5.", "row 2: 'answer': expected to end in '#### '"),
    "hellaswag": (HELLASWAG["validation"][0], "label", "", "row 2: 'label': expected one of the 4 endings"),
    "arc-easy": (ARC["test"][0], "answerKey", "X", "row 2: 'answerKey': expected one of the labels"),
    "choices": (
        {"question": "a?", "choices": ["b", "c"], "answer": "A"},
        "choices",
        ["b", 1],
        "row 2: 'choices': expected a list",
    ),
}
MODES = {"mmlu": "chat0", "mmlu-pro": "sgl-eval", "gsm8k": "sgl-eval", "hellaswag": "ll", "arc-easy": "ll", "choices": "raw"}


@pytest.mark.parametrize("task", BAD)
def test_a_bad_row_is_named(tmp_path: Path, task: str) -> None:
    row, name, value, message = BAD[task]
    made_up.write_lines(tmp_path / "rows.jsonl", [row, {**row, name: value}])
    with pytest.raises(RequestError, match=message):
        items(task, MODES[task], tmp_path / "rows.jsonl")


@pytest.mark.parametrize("task", [task for task in BAD if task != "choices"])
def test_files_that_are_missing_are_named(tmp_path: Path, task: str) -> None:
    split = "validation" if task == "hellaswag" else "test"
    with pytest.raises(
        RequestError, match=rf"split {split}: none of these files is in .*{split}.*hf download {TASKS[task].repo}"
    ):
        items(task, MODES[task], tmp_path)


def test_too_few_examples(tmp_path: Path) -> None:
    lines(tmp_path)
    with pytest.raises(RequestError, match="split dev, anatomy: 6 examples are wanted, and there are 5; give fewer with --shots"):
        items("mmlu", "raw5", tmp_path, shots=6)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"extract": "simple-evals"}, "--extract simple-evals: mmlu/ll: this mode reads answers in one way only"),
        ({"extract": "x"}, "--extract x: mmlu/chat0: expected simple-evals or sgl-eval"),
        ({"shots": 3}, "--shots 3: mmlu/chat0 asks without examples"),
    ],
)
def test_what_a_mode_does_not_have(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        items("mmlu", "ll" if "mmlu/ll" in message else "chat0", lines(tmp_path), **asked)
