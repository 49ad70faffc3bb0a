"""The modes that are sgl-eval's, against what sgl-eval 0.1.3 said of the same made-up data (`goldens/evals/make_sgl_eval.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemcutter.evals.data import Data
from gemcutter.evals.run import items_of
from gemcutter.evals.task import Asked, Item, Reply
from gemcutter.evals.tasks import find_mode, open_task
from tests.evals import made_up

GOLDEN: Any = json.loads((Path(__file__).parents[1] / "goldens" / "evals" / "sgl_eval.json").read_text())
COUNT = 20
# sgl-eval computes with formulas and skips what it can't parse, and we read numbers alone.
COMPUTED = {("\\boxed{5.5.0}", "0"), ("\\boxed{0-3}", "-3")}


def write(folder: Path, task: str) -> None:
    """Write the rows that the golden file was made of, in the layout that sgl-eval reads."""
    if task == "mmlu":
        made_up.write_hendrycks(folder, {"test": made_up.mmlu("college_physics", "test", COUNT)})
    elif task == "mmlu-pro":
        made_up.write_parquet(folder / "data" / "test-0.parquet", made_up.mmlu_pro("computer science", "test", COUNT))
    else:
        made_up.write_lines(folder / "test.jsonl", made_up.gsm8k("test", COUNT))


@pytest.mark.parametrize("name", ["mmlu", "mmlu-pro", "gsm8k"])
def test_prompts(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    task = open_task(name)
    mode = find_mode(task, "sgl-eval")
    items = items_of(task, Data.of(name, None, str(tmp_path)), mode, Asked())
    wanted = GOLDEN["prompts"][name.replace("-", "_")]
    assert [item.prompt for item in items] == [[{"role": "user", "content": text}] for text in wanted]
    assert mode.is_chat
    assert mode.sampling == GOLDEN["sampling"]


@pytest.mark.parametrize("name", ["mmlu", "mmlu-pro"])
def test_letters(name: str) -> None:
    task, wanted, found = open_task(name), [], []
    mode = find_mode(task, "sgl-eval")
    for reply, gold, letter, score in GOLDEN["letters"]:
        grade = task.grade(Item("", "", gold), mode, Reply(text=reply), Asked())
        wanted.append((reply, letter, {"accuracy": score}))
        found.append((reply, grade.extracted, grade.metrics))
    assert found == wanted
    assert len(found) > 400
    assert {score for *_, score in GOLDEN["letters"]} == {0.0, 1.0}


def test_numbers() -> None:
    task = open_task("gsm8k")
    mode = find_mode(task, "sgl-eval")
    other = set()
    for reply, gold, answer, score in GOLDEN["numbers"]:
        grade = task.grade(Item("", "", gold), mode, Reply(text=reply), Asked())
        assert grade.extracted == answer
        if grade.metrics != {"accuracy": score}:
            other.add((reply, gold))
    assert other == COMPUTED
    assert len(GOLDEN["numbers"]) > 700
    assert sum(score for *_, score in GOLDEN["numbers"]) > 90
