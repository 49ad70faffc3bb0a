"""Comparisons of two runs: formulas on made-up runs, and the command on the demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemcutter.cli import main
from gemcutter.errors import RequestError
from gemcutter.evals.compare import compare, spell
from gemcutter.evals.records import Record, RunFile

HEADER = {"task": "made-up", "mode": "chat", "prompt_id": "1", "items_sha256": "a", "measured": {"model": "m", "quant": None}}


def run_of(values: list[float | None], metric: str = "accuracy", weights: list[int] | None = None, **changes: Any) -> RunFile:
    """Return a run whose items have these values; None: the item failed."""
    records = dict[str, Record]()
    for place, value in enumerate(values):
        record = Record(id=str(place), gold="A", error="too long")
        if value is not None:
            counts = {} if weights is None else {metric: weights[place]}
            record = Record(id=str(place), gold="A", extracted=f"{value}", metrics={metric: value}, counts=counts)
        records[record.id] = record
    return RunFile({**HEADER, "items": len(values), **changes}, records)


def test_flips_are_counted_and_tested() -> None:
    first, second = [1.0] * 5 + [1.0] + [0.0] * 8 + [0.0, 0.0], [1.0] * 5 + [0.0] + [1.0] * 8 + [0.0, None]
    found = compare(run_of(first), run_of(second, measured={"model": "m", "quant": "q4"}))
    assert (found.both, found.neither, found.failed, found.items) == (5, 2, 1, 16)
    assert [flip.id for flip in found.flips] == [str(place) for place in range(5, 14)]
    assert [flip.is_gain for flip in found.flips] == [False] + [True] * 8
    assert (found.flips[0].first, found.flips[0].second) == ("1.0", "0.0")
    assert found.p == 2 * (1 + 9) / 2**9  # splits of 9 pairs as uneven as 1 to 8
    assert found.first.mean == 6 / 16
    assert found.second.mean == 13 / 16
    assert found.difference.mean == pytest.approx(7 / 16)
    assert found.difference.error == pytest.approx((((9 - 49 / 16) / 15) / 16) ** 0.5)  # of 16 differences, 9 of which are not 0
    assert found.settings == {"quant": (None, "q4")}
    told = "\n".join(spell(HEADER, found))
    assert "quant       None | q4" in told
    assert "only in the first 1, only in the second 8" in told
    assert "  5: '1.0' -> '0.0', right is 'A'" in told
    assert found.as_json()["only_second_right"] == 8


def test_losses_and_shares_have_no_test_but_an_interval() -> None:
    found = compare(run_of([1.0, 2.0, None, 4.0], "nll", [1, 1, 1, 2]), run_of([2.0, 3.0, 9.0, 5.0], "nll", [1, 1, 1, 2]))
    assert (found.p, found.flips) == (None, ())
    assert (found.first.mean, found.second.mean) == (11 / 4, 15 / 4)  # of what both have, by weights
    assert (found.difference.mean, found.difference.error) == (1.0, 0.0)
    assert "no test" in "\n".join(spell(HEADER, found))
    assert compare(run_of([0.5, 1.0]), run_of([1.0, 1.0])).p is None


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (run_of([1.0], items_sha256="b"), "the prompts of their items differ"),
        (run_of([1.0], mode="raw"), "mode is 'chat' in one, 'raw' in the other"),
        (run_of([1.0], items=2), "the second run has 1 of its 2 items"),
    ],
)
def test_other_items_are_refused(second: RunFile, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        compare(run_of([1.0]), second)
    with pytest.raises(RequestError, match="nothing to compare"):
        compare(run_of([None]), run_of([None]))


ASKED = ["--task", "arithmetic/chat,perplexity", "--option", "count=4", "--max-tokens", "8", "--dtype", "float32"]


def test_two_settings_of_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--compare", "demo", "demo", *ASKED, "--output", str(tmp_path)]
    assert main([*words, "--with", "kernels=reference", "--with", "speculate=ngram", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sums, loss = found["comparisons"]
    assert (sums["task"], sums["items"], sums["flips"], sums["mcnemar_p"]) == ("arithmetic", 4, [], 1.0)
    assert sums["settings"]["kernels"] == ["auto", "reference"]
    assert sums["settings"]["speculate"] == [None, "ngram"]
    assert (loss["metric"], loss["mcnemar_p"]) == ("nll", None)
    assert 0 < abs(loss["difference"]["mean"]) < 1e-4  # other kernels did run
    certificate = found["certificate"]
    assert certificate["passed"]
    assert (certificate["ours"]["kernels"], certificate["against"]["kernels"]) == ("reference", "auto")
    assert len(list(tmp_path.iterdir())) == 4
    files = sorted(str(file) for file in tmp_path.glob("*arithmetic*"))
    assert main(["eval", "--compare", *files]) == 0
    shown = capsys.readouterr().out
    assert "McNemar     p = 1, exact" in shown
    assert "certificate" not in shown
    other = next(str(file) for file in tmp_path.glob("*perplexity*"))
    assert main(["eval", "--compare", files[0], other]) == 1
    assert "the runs can't be compared: task is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--compare", "demo", "demo", *ASKED], "both sides are the same"),
        (["--compare", "demo", "demo", *ASKED, "--with", "threads=3"], "expected KEY=VALUE with one of dtype"),
        (["--compare", "demo", "demo", *ASKED, "--with", "context=many"], "expected an integer"),
        (["--compare", "demo", *ASKED], "--compare takes two models"),
        (["--compare", "demo", "demo", *ASKED, "--dry-run"], "leave out --compare"),
        (["demo", *ASKED, "--with", "quant=q4"], "changes the second model of --compare"),
    ],
)
def test_what_can_not_be_compared(words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words, "--output", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
