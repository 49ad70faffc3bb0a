"""`gemcutter score`: the oracle's likelihoods, and every token counted once."""

from __future__ import annotations

import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

import gemcutter
from gemcutter.cli import main
from gemcutter.evals import perplexity
from gemcutter.evals.perplexity import cut

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPTS = json.loads((GOLDENS / "prompts.json").read_text())
EXPECTED = json.loads((GOLDENS / "tiny-e.json").read_text())
BOS = 2


def score_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Run the command with --json in float32; stdout must hold that one object."""
    assert main(["score", "demo", "--json", "--dtype", "float32", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def write_ids(folder: Path, ids: object) -> str:
    """Write a file of ids."""
    (folder / "ids.json").write_text(json.dumps(ids))
    return str(folder / "ids.json")


def test_a_passage_scores_as_the_oracle_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passage, expected = PROMPTS["passage_600"], EXPECTED["passage_600"]
    found = score_json(capsys, "--tokens-file", write_ids(tmp_path, passage["token_ids"]))
    assert found["nll_mean"] == pytest.approx(expected["nll_mean"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(expected["nll_mean"]), rel=1e-4)
    assert (found["tokens"], found["windows"], found["window"]) == (expected["n_predicted"], 1, None)
    (tmp_path / "passage.txt").write_text(passage["text"], encoding="utf-8")
    assert score_json(capsys, str(tmp_path / "passage.txt"), "--window", "600")["nll_mean"] == pytest.approx(
        found["nll_mean"], abs=1e-9
    )


def test_the_error_and_what_was_measured_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = PROMPTS["passage_600"]["token_ids"][:80]
    found = score_json(capsys, "--tokens-file", write_ids(tmp_path, ids))
    model = gemcutter.load("demo", dtype="float32")
    (whole,) = model.generate([ids], max_tokens=0, prompt_logprobs=0)
    losses = [-entry.logprob for entry in whole.prompt.logprobs]
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    assert found["nll_standard_error"] == pytest.approx(error, rel=1e-4)
    assert found["perplexity_standard_error"] == pytest.approx(error * found["perplexity"], rel=1e-4)
    assert (found["measured"]["model"], found["measured"]["dtype"]) == ("demo", "float32")
    assert main(["score", "demo", "--dtype", "float32", "--tokens-file", write_ids(tmp_path, ids)]) == 0
    assert f"perplexity  {found['perplexity']:.3f} +/- " in capsys.readouterr().out


def test_a_text_may_come_from_stdin(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = PROMPTS["passage_600"]["text"][:200]
    (tmp_path / "text").write_text(text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    assert score_json(capsys)["nll_mean"] == score_json(capsys, str(tmp_path / "text"))["nll_mean"]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert main(["score", "demo"]) == 2
    assert "missing FILE" in capsys.readouterr().err
    assert main(["score", "demo", "x", "--tokens-file", "y"]) == 2
    assert "not both" in capsys.readouterr().err


def test_a_likelihood_that_is_no_number_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "losses", lambda loop, windows, in_flight: [(math.nan,) * each.counted for each in windows])
    assert main(["score", "demo", "--json", "--tokens-file", write_ids(tmp_path, [2, 5, 6])]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "`gemcutter verify` names the first layer" in shown.err
    monkeypatch.setattr(perplexity, "losses", lambda loop, windows, in_flight: [(1e4,) * each.counted for each in windows])
    assert main(["score", "demo", "--json", "--tokens-file", write_ids(tmp_path, [2, 5, 6])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["nll_mean"], found["perplexity"]) == (1e4, None)  # JSON has no infinity


def test_windows_are_independent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    windows = PROMPTS["ppl_8k"]["windows"][:3]
    whole = score_json(capsys, "--tokens-file", write_ids(tmp_path, windows))
    alone = [score_json(capsys, "--tokens-file", write_ids(tmp_path, [window])) for window in windows]
    assert whole["windows"] == 3
    assert whole["tokens"] == 3 * 511
    assert whole["nll_mean"] == pytest.approx(sum(one["nll_mean"] for one in alone) / 3, abs=1e-5)


def test_a_text_is_cut_as_the_help_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, ids = PROMPTS["passage_600"]["text"], PROMPTS["passage_600"]["token_ids"]
    assert ids[0] == BOS
    by_hand = [[BOS, *ids[start : start + 99]] for start in range(1, len(ids), 99)]
    expected = score_json(capsys, "--tokens-file", write_ids(tmp_path, by_hand))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    found = score_json(capsys, "-", "--window", "100")
    assert found["nll_mean"] == pytest.approx(expected["nll_mean"], abs=1e-6)
    assert (found["tokens"], found["windows"], found["stride"]) == (599, 7, 99)
    from_ids = score_json(capsys, "--tokens-file", write_ids(tmp_path, ids), "--window", "100")
    assert from_ids["nll_mean"] == pytest.approx(found["nll_mean"], abs=1e-6)
    overlapping = score_json(capsys, "--tokens-file", write_ids(tmp_path, ids), "--window", "100", "--stride", "33")
    assert overlapping["tokens"] == 599
    assert overlapping["nll_mean"] < found["nll_mean"] - 0.05  # more context


@pytest.mark.parametrize(("total", "length", "stride"), [(10, 5, 4), (10, 5, 1), (10, 5, 3), (1, 5, 4), (8, 5, 4), (9, 100, 7)])
def test_every_token_counts_once(total: int, length: int, stride: int) -> None:
    ids = list(range(100, 100 + total))
    windows = list(cut(ids, BOS, length, stride))
    assert [token for window in windows for token in window.ids[window.context :]] == ids
    assert all(window.ids[0] == BOS and 1 < len(window.ids) <= length for window in windows)
    assert all(ids[window.ids[1] - 100 :][: len(window.ids) - 1] == list(window.ids[1:]) for window in windows)


def test_the_result_explains_its_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = write_ids(tmp_path, PROMPTS["passage_600"]["token_ids"][:80])
    assert main(["score", "demo", "--tokens-file", ids, "--window", "40", "--stride", "20"]) == 0
    shown = capsys.readouterr().out
    assert "79 predicted" in shown
    assert "of up to 40 tokens, <bos> included, 20 apart; every token counts once" in shown


def test_the_place_of_the_table_and_the_form_of_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = write_ids(tmp_path, PROMPTS["passage_600"]["token_ids"][:80])
    plain, mapped = (score_json(capsys, "--tokens-file", ids, *words) for words in ([], ["--ple", "mmap"]))
    assert mapped["nll_mean"] == plain["nll_mean"]
    for words, expected in ((["--ple", "host"], "on a CPU the table stays mapped"), (["--kv", "fp8"], "kv fp8: a choice of the")):
        assert main(["score", "demo", "--tokens-file", ids, *words]) == 1
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2", "is not JSON"),
        ('{"ids": [1]}', "expected a list of token ids"),
        ("[1, 2.5]", "expected a list of token ids"),
        ("[[1, 2], 3]", "expected a list of token ids"),
        ("[[2]]", "nothing to score"),
        ("[]", "expected a list of token ids"),
        ("[2, 70000]", "ids [70000] are outside the vocabulary of 4096"),
    ],
)
def test_bad_ids_are_refused(content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.json").write_text(content)
    assert main(["score", "demo", "--tokens-file", str(tmp_path / "ids.json")]) == 1
    assert expected in capsys.readouterr().err


def test_bad_texts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "demo", str(tmp_path / "absent.txt")]) == 1
    assert "absent.txt can't be read: No such file or directory" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_bytes(b"")
    assert main(["score", "demo", str(tmp_path / "empty.txt")]) == 1
    assert "nothing to score" in capsys.readouterr().err
    (tmp_path / "binary.txt").write_bytes(b"\x80")
    assert main(["score", "demo", str(tmp_path / "binary.txt")]) == 1
    assert "binary.txt is not valid UTF-8" in capsys.readouterr().err
    assert main(["score", "demo", "--tokens-file", write_ids(tmp_path, [[2, 3], [2]]), "--stride", "3"]) == 2
    assert "windows already" in capsys.readouterr().err
