"""Names of quantizations and sizes: one spelling for all commands, capitals or not, and errors that name what comes nearest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcutter.benchmark.synthetic import size_of
from gemcutter.checkpoint.write.synth import SIZES, shrink
from gemcutter.cli import main
from gemcutter.errors import ConfigError
from gemcutter.load_options import LoadOptions
from gemcutter.quant.recipes import RECIPES
from gemcutter.quant_names import RECIPE_NAMES, find_quant


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("q4", "q4"),
        ("Q4", "q4"),
        ("4bit", "q4"),
        ("4-bit", "q4"),
        ("int8", "q8"),
        ("q4_0", "Q4_0"),
        ("Q4-0", "Q4_0"),
        ("Q8_0", "Q8_0"),
        ("MLX4", "mlx4"),
        ("mlx-8bit", "mlx8"),
    ],
)
def test_spellings_of_one_name(spelling: str, name: str) -> None:
    assert find_quant(spelling, RECIPE_NAMES) == name
    assert LoadOptions(model="demo", quant=spelling).quant == name
    assert name in RECIPES


@pytest.mark.parametrize(
    ("spelling", "known", "told"),
    [
        ("q5", RECIPE_NAMES, "expected q4, q8, mlx4, mlx8, Q4_0 or Q8_0, found 'q5'"),
        ("Q4_K_M", RECIPE_NAMES, "Q4_K_M is read, not written.*nearest: Q4_0.*llama-quantize"),
        ("q6_k", RECIPE_NAMES, "q6_k is read, not written.*nearest: Q8_0"),
        ("iq4_xs", ("none", "q4", "q8"), "iq4_xs is read, not written.*nearest: q4,"),
        ("UD-Q4_K_XL", RECIPE_NAMES, "nearest: Q4_0"),
        ("bf16", RECIPE_NAMES, "expected q4.*quantizes nothing.*--dtype"),
        ("", ("q4",), "expected q4, found ''"),
    ],
)
def test_what_is_no_name_is_told_what_is(spelling: str, known: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        find_quant(spelling, known)


@pytest.mark.parametrize("spelling", ["q4_0", "Q4_0"])
def test_every_command_takes_every_spelling(spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "demo", str(tmp_path / "x.gguf"), "--to", "gguf", "--quant", spelling]) == 0
    assert main(["run", "demo", "Hi", "-n", "1", "--quant", spelling]) == 0
    (tmp_path / "text").write_text("A lantern is a lamp.")
    assert main(["score", "demo", str(tmp_path / "text"), "--quant", spelling]) == 0
    capsys.readouterr()
    words = ["-p", "4", "-n", "1", "-r", "1", "--json", "--quant", spelling]
    for model in (["--model", "demo"], ["--preset", "tiny:e2b", "--layers", "1"]):
        assert main(["bench", *model, *words]) == 0
        assert "q4_0" in json.loads(capsys.readouterr().out)["quant"].lower()


@pytest.mark.parametrize("command", ["run", "convert"])
def test_k_quants_are_refused_with_the_nearest(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = {"run": ["Hi"], "convert": [str(tmp_path / "x.gguf"), "--to", "gguf"]}[command]
    assert main([command, "demo", *rest, "--quant", "Q4_K_M"]) == 2
    assert "Q4_K_M is read, not written" in capsys.readouterr().err


def test_sizes_need_no_capitals(tmp_path: Path) -> None:
    assert size_of("e2b") == size_of("E2B")
    assert size_of("TINY:26b") == size_of("tiny:26B-A4B") == shrink(SIZES["26B-A4B"])
    assert main(["tiny", "--like", "26b-a4b", str(tmp_path / "m")]) == 0
    assert (tmp_path / "m" / "config.json").exists()
    with pytest.raises(ConfigError, match="there is no size '7B'; known are E2B"):
        size_of("7B")
