"""Every command that loads a model computes with the same decoder: what `bench` times and `verify` certifies is what `run` runs.

Owns the comparison of decoders that `run`, `chat`, `score`, `bench` and `verify` make of one checkpoint and the same options.
Refuses to know how options are spelled; that is in `test_cli_usage.py`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gemcutter import loading
from gemcutter.cli.app import main
from gemcutter.model.text import Decoder
from gemcutter.quant import Weight

OPTIONS = {
    "plain": [],
    "reference": ["--kernels", "reference", "--dtype", "float32"],
    "quantized": ["--quant", "q4", "--activations", "bf16"],
    "float32": ["--dtype", "float32", "--activations", "int8"],
}
PREFILL = ["-p", "8", "-n", "2", "--repeats", "1"]


def configuration(decoder: Decoder) -> dict[str, Any]:
    """Return all that loading decides: backend, precision, kernels, packing and placement of every parameter, graphs."""
    return {
        "backend": decoder.backend.name,
        "precision": decoder.precision,
        "kernels": [decoder.kernels, *(layer.kernels for layer in decoder.layers)],
        "parameters": {name: held(param) for name, param in decoder.params.items()},
        "graphs": decoder.capture_refusal(),
        "adapters": decoder.adapters,
    }


def held(param: Tensor | Weight) -> tuple[Any, ...]:
    """Return how a parameter is held: its kind of storage and its place, part by part."""
    parts = param.parts if isinstance(param, Weight) else (param,)
    kinds = [(type(part).__name__, Weight((part,)).stored, tuple(part.shape)) for part in parts]
    places = [str(getattr(part, "device", "cpu")) for part in parts]
    return tuple(zip(kinds, places, strict=True))


@pytest.fixture(name="made")
def _made(monkeypatch: pytest.MonkeyPatch) -> list[Decoder]:
    """Collect the decoders that are made; threads are put back afterwards."""
    found: list[Decoder] = []
    make = loading.make_decoder

    def recorded(*arguments: Any) -> Decoder:
        found.append(make(*arguments))
        return found[-1]

    monkeypatch.setattr(loading, "make_decoder", recorded)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_commands_make_the_same_decoder(options: list[str], made: list[Decoder], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A lantern is a light that can be carried. " * 4)
    commands = {
        "run": ["run", "demo", "hi", "--max-tokens", "1", *options],
        "chat": ["chat", "demo", *options],
        "score": ["score", "demo", str(text), *options],
        "bench": ["bench", "--model", "demo", *PREFILL, *options],
        "verify": ["verify", "demo", "--tokens", "16", *options],
    }
    found: dict[str, dict[str, Any]] = {}
    for name, line in commands.items():
        made.clear()
        main(line)  # the verdict of `verify` is another test's
        assert made, f"{name} made no decoder through loading.open_model"
        found[name] = configuration(made[-1])  # `verify` makes the side that it compares with first
    assert set(found) == set(commands)
    for name, each in found.items():
        assert each == found["run"], name


def test_a_difference_would_show(made: list[Decoder]) -> None:
    for options in OPTIONS.values():
        main(["run", "demo", "hi", "--max-tokens", "1", *options])
    assert len(made) == len(OPTIONS)
    found = [configuration(each) for each in made]
    assert all(found[index] != other for index in range(len(found)) for other in found[index + 1 :])
