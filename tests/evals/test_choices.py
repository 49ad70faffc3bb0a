"""A user's own multiple choice: the held-out questions give the answers that transformers gave, letter by letter.

The golden predictions are transformers 5.23.0's of the packaged model in float32 (`goldens/evals/mcq_tiny-e.json`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcutter import Model, load
from gemcutter.evals.data import Data
from gemcutter.evals.records import Log, read
from gemcutter.evals.report import summarize
from gemcutter.evals.run import How, items_of, run
from gemcutter.evals.session import header
from gemcutter.evals.task import Asked
from gemcutter.evals.tasks import find_mode, open_task

GOLDENS = Path(__file__).parents[1] / "goldens" / "evals"
GOLDEN = json.loads((GOLDENS / "mcq_tiny-e.json").read_text())


@pytest.fixture(scope="module")
def model() -> Model:
    return load("demo", dtype="float32", max_num_seqs=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raw", "chat"])
def test_the_held_out_questions(model: Model, tmp_path: Path, name: str) -> None:
    task = open_task("choices")
    mode, asked, how = find_mode(task, name), Asked(), How()
    items = items_of(task, Data.of("choices", None, str(GOLDENS / "mcq_heldout.jsonl")), mode, asked)
    file = tmp_path / "run.jsonl"
    with Log(file, header(model, {"model": "demo"}, task, mode, items, asked, how)) as log:
        run(model, task, mode, items, asked, how, log, lambda done, of: None)
    records = read(file).records
    assert "".join(records[item.id].extracted for item in items) == GOLDEN[name]["predictions"]
    (accuracy,) = summarize(list(records.values())).means
    assert accuracy.mean == GOLDEN[name]["accuracy"]
    assert len(items) == GOLDEN[name]["n"] == 400
