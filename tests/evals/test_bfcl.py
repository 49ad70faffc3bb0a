"""BFCL: declarations and verdicts equal bfcl-eval's, which are in a golden, and bad files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.task import Asked, Item, Reply
from gemcutter.evals.tasks import find_mode, open_task
from gemcutter.evals.tasks.bfcl import PARTS
from gemcutter.evals.tool_calls import wrong_calls
from gemcutter.text.tool_calls import ToolCall

GOLDENS = Path(__file__).parents[1] / "goldens" / "evals"
QUESTIONS = {each["id"]: each for each in json.loads((GOLDENS / "bfcl_questions.json").read_text())}
BFCL = json.loads((GOLDENS / "bfcl.json").read_text())


def write(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write the made-up questions in the leaderboard's files, those of `simple_python_0` with changes."""
    (folder / "possible_answer").mkdir()
    for part in PARTS:
        rows = [each for id, each in QUESTIONS.items() if id.rpartition("_")[0] == part]
        if part == "irrelevance":
            rows = [QUESTIONS["simple_python_0"] | {"id": "irrelevance_0"}]
        rows = [row | ((changes or {}) if row["id"] == "simple_python_0" else {}) for row in rows]
        for file, names in (
            (f"BFCL_v4_{part}", ("id", "question", "function")),
            (f"possible_answer/BFCL_v4_{part}", ("id", "ground_truth")),
        ):
            lines = [json.dumps({name: row[name] for name in names}) + "\n" for row in rows]
            if part != "irrelevance" or "/" not in file:
                (folder / f"{file}.json").write_text("".join(lines))
    return folder


def items(folder: Path) -> list[Item]:
    """Return the items of a folder."""
    task = open_task("bfcl")
    return list(task.items(Data.of("bfcl", None, str(folder)), find_mode(task, None), Asked()))


def accuracy(item: Item, calls: list[dict[str, Any]], cut: bool = False) -> tuple[Any, float]:
    """Return what was read out of a reply with calls, and whether it is right."""
    task = open_task("bfcl")
    read = tuple(ToolCall(name, json.dumps(given)[: -1 if cut else None]) for call in calls for name, given in call.items())
    grade = task.grade(item, find_mode(task, None), Reply(text="", tool_calls=read), Asked())
    return grade.extracted, grade.metrics["accuracy"]


@pytest.mark.parametrize("id", list(QUESTIONS))
def test_verdicts_are_bfcl_evals(id: str) -> None:
    question, valid = QUESTIONS[id], 0
    cases = [(calls, is_valid) for name, calls, is_valid in BFCL["cases"] if name == id]
    for calls, is_valid in cases:
        error = wrong_calls(question["function"], calls, question["ground_truth"])
        assert (error is None) == is_valid, (calls, error)
        valid += is_valid
    assert 5 < valid < len(cases) - 5


def test_functions_are_declared_as_bfcl_eval_declares_them(tmp_path: Path) -> None:
    found = {item.id: item.options["tools"] for item in items(write(tmp_path))}
    assert found.pop("irrelevance_0") == found["simple_python_0"]
    assert found == BFCL["tools"]


def test_replies_are_judged_by_their_calls(tmp_path: Path) -> None:
    found = {item.id: item for item in items(write(tmp_path))}
    for id, question in QUESTIONS.items():
        extracted, right = accuracy(found[id], question["calls"])
        assert (extracted["error"], right) == (None, 1.0)
        assert accuracy(found[id], []) == (None, 0.0)
        assert accuracy(found[id], question["calls"], cut=True) == (None, 0.0)
    none = found["irrelevance_0"]
    assert accuracy(none, []) == ([], 1.0)
    assert accuracy(none, [{"weather_now": {}}])[1] == 0.0
    assert {item.subject for item in found.values()} == set(PARTS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"question": [[], []]}, r"row 1 \(simple_python_0\): 'question': expected one turn"),
        ({"function": [{"name": "weather.now"}]}, r"\(simple_python_0\): 'function': not a function as BFCL declares it"),
        ({"ground_truth": [{"other": {}}]}, r"\(simple_python_0\): 'ground_truth': expected calls of declared functions"),
        (
            {"function": [{"name": "weather.now", "parameters": {"properties": {"at": {"type": "time"}}}}]},
            r"\(simple_python_0\): weather.now: parameter 'at' has a type that is not judged: 'time'",
        ),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        items(write(tmp_path, changes))


def test_missing_data_and_answers_are_named(tmp_path: Path) -> None:
    task = open_task("bfcl")
    with pytest.raises(RequestError, match=r"pip download --no-deps bfcl-eval.*--data"):
        list(task.items(Data.of("bfcl", None, None), find_mode(task, None), Asked()))
    write(tmp_path)
    (tmp_path / "possible_answer" / "BFCL_v4_multiple.json").write_text("")
    with pytest.raises(RequestError, match=r"multiple, row 1 \(multiple_0\): there is no answer with this id"):
        items(tmp_path)
