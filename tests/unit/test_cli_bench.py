"""`gemcutter bench`: its options, its table and its JSON. Quiet machines say how fast anything is."""

from __future__ import annotations

import json
import math

import pytest

from gemcutter import native
from gemcutter.benchmark import cold_start, hardware
from gemcutter.benchmark.report import spell_fallbacks
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.doctor.fingerprint import sampled_sha256
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import main
from gemcutter.cli.bench import join_values


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine in milliseconds, and start no process."""
    monkeypatch.setattr(hardware, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "MATMUL_SIZE", 64)
    monkeypatch.setattr(cold_start, "first_token_s", lambda *arguments: (0.5, 0.75))


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["-p", "512", "2048", "-n", "8"], ["-p", "512,2048", "-n", "8"]),
        (["-p", "512,1024", "2048"], ["-p", "512,1024,2048"]),
        (["--depth", "0", "16384", "--json"], ["--depth", "0,16384", "--json"]),
        (["-p", "1", "-p", "2", "3"], ["-p", "1", "-p", "2,3"]),
        (["-t", "2", "-r", "3"], ["-t", "2", "-r", "3"]),
        (["-p", "8", "--preset", "E2B"], ["-p", "8", "--preset", "E2B"]),
        (["--acceptance", ".8", "0.65", "1", "-n", "8"], ["--acceptance", ".8,0.65,1", "-n", "8"]),
        (["-p"], ["-p"]),
    ],
)
def test_values_in_a_row_belong_to_their_option(words: list[str], joined: list[str]) -> None:
    assert join_values(words) == joined


def run(capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert main(["bench", *words.split()]) == 0
    return capsys.readouterr().out


def test_a_preset_gives_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--preset tiny:26B-A4B --quant mlx4 --layers 2 -p 4 6 -n 2 --depth 0 20 -r 2 --json"))
    assert [row["test"] for row in found["rows"]] == ["pp4", "pp6", "tg2", "pp4@d20", "pp6@d20", "tg2@d20"]
    for row in found["rows"]:
        assert all(0 < row[key] < math.inf for key in ("tok_s", "ceiling_tok_s", "share"))
    assert (found["model"], found["quant"], found["layers"]) == ("tiny:26B-A4B, 2 layers", "mlx4", 2)
    assert found["load_s"] is None
    assert "first_token_s" not in found
    assert found["machine"]["cores"] >= 1


def test_a_checkpoint_is_loaded_and_started_anew(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--model demo -p 4 -n 0 -r 1 --json"))
    assert [row["test"] for row in found["rows"]] == ["pp4"]
    assert found["load_s"] > 0
    assert (found["first_token_s"], found["first_text_s"]) == (0.5, 0.75)
    assert found["quant"] == "bfloat16"


def test_a_model_stands_in_place_as_with_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "demo -p 4 6 -n 0 -r 1 --json"))
    assert [row["test"] for row in found["rows"]] == ["pp4", "pp6"]
    assert found["model"] == "demo"
    assert found["sampled_sha256"] == sampled_sha256(Source.open(DEMO_FOLDER))
    assert json.loads(run(capsys, "-p 4 -n 0 -r 1 demo --json"))["model"] == "demo"


def test_the_title_names_what_the_file_holds_and_not_what_kernels_make_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "demo --quant q8 -p 4 -n 0 -r 1 --json"))
    assert found["quant"] == "affine8g64, bfloat16"


@pytest.mark.skipif(native.missing() is not None, reason="needs the native kernels")
def test_what_fell_back_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset tiny:E2B --layers 2 -p 4 -n 0 -r 1"
    narrow = json.loads(run(capsys, f"{words} --json"))["fallbacks"]
    told = run(capsys, words)
    if narrow:  # heads of a width that the kernels do not take
        assert {each["op"] for each in narrow} >= {"attention"}
        assert f"attention, layer on torch's kernels, because {narrow[0]['reason']}" in told
    assert list(spell_fallbacks(REFUSED)) == ["slower than it could be: attention, layer on torch's kernels, because narrow"]
    assert json.loads(run(capsys, "demo -p 4 -n 0 -r 1 --json"))["fallbacks"] == []
    assert "slower than it could be" not in run(capsys, "demo -p 4 -n 0 -r 1")


REFUSED = [{"op": op, "kernel": "torch", "reason": "narrow", "layers": []} for op in ("attention", "layer", "layer")]


def test_a_reader_gets_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "--preset tiny:E2B --layers 5 -p 4 -n 2 -r 1 --breakdown --dtype float32 --kernels reference")
    assert "\npp4 " in shown
    assert "computed in float32" in shown
    assert "\nqkv " in shown
    assert "\nrest " in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "either MODEL or --preset"),
        (["demo", "--model", "demo"], "either MODEL or --preset"),
        (["--preset", "E2B", "--model", "demo"], "either MODEL or --preset"),
        (["--model", "demo", "--quant", "q5"], "--quant: expected q4, q8"),
        (["--model", "demo", "--layers", "2"], "a MODEL is what it is"),
        (["--preset", "E2B", "--quant", "q5"], "expected q4_0"),
        (["--preset", "E2B", "-p", "many"], "-p: expected integers"),
        (["--preset", "E2B", "-p", "-5"], "-p: expected 0 or more"),
        (["--preset", "E2B", "--depth", "8", "-r", "0"], "--repeats"),
        (["--preset", "E2B", "--activations", "int4"], "expected int8 or bf16"),
        (["--preset", "E2B", "--speculate", "mtp"], "of synthetic weights no draft is right: say with --acceptance"),
        (["--preset", "E2B", "--draft-tokens", "4"], "of synthetic weights no draft is right: say with --acceptance"),
        (["--preset", "E2B", "--speculate", "ngram"], "the text of a --preset is noise"),
        (["--preset", "E2B", "--speculate", "auto", "--acceptance", ".5"], "the text of a --preset is noise"),
        (["--preset", "E2B", "--speculate", "off", "--acceptance", ".5"], "either --speculate off or --acceptance"),
        (["--preset", "E2B", "--draft-model", "demo"], "--draft-model is about a MODEL"),
        (["--preset", "E2B", "--acceptance", ".5", ".6"], "--acceptance: expected 1 to 8 shares from 1 to 0, none above"),
        (["--preset", "E2B", "--acceptance", "half"], "--acceptance: expected shares with commas"),
        (["demo", "--acceptance", ".5"], "those of a MODEL are its assistant's own"),
        (["demo", "--speculate", "ngram", "--depth", "64"], "--depth fills contexts with no text"),
    ],
)
def test_bad_usage_is_told(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--preset", "7B"], "there is no size '7B'"),
        (["--preset", "E2B", "--layers", "99"], "E2B has 35"),
        (["--preset", "tiny:E2B", "--layers", "1", "--depth", "999999999"], "positions"),
        (["--preset", "tiny:E2B", "--layers", "1", "-p", "0", "-n", "0"], "no test is asked for"),
        (["--preset", "tiny:E2B", "--layers", "1", "--level", "sse9"], "sse9"),
        (["--preset", "tiny:E2B", "--activations", "bf16", "--kernels", "reference"], "activations bf16"),
        (["--preset", "tiny:E2B", "--layers", "2", "--acceptance", ".5"], "no global layer writes keys and values"),
        (["demo", "--speculate", "mtp"], "name it with draft_model"),
        (["--model", "./not-there"], "./not-there"),
    ],
)
def test_errors_are_one_message(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 1
    shown = capsys.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown
