"""`gemcutter doctor`: exit codes, JSON, what the terminal shows; and `gemcutter inspect` of a checkpoint that is far away."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from gemcutter.checkpoint.doctor.doctor import examine
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import main, terminal
from gemcutter.cli.doctor import read_text, show
from tests.formats.web import cut_off, serve


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch, tmp_path)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Return a copy of the demo that a test may break."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "demo"))


def test_exit_codes(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "demo"]) == 0
    (demo / "chat_template.jinja").unlink()
    assert main(["doctor", str(demo)]) == 1
    (demo / "tokenizer.json").unlink()
    assert main(["doctor", str(demo)]) == 2
    assert main(["doctor", "./absent"]) == 2
    assert main(["doctor"]) == 2
    capsys.readouterr()


def test_json_is_the_report_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "demo", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads(json.dumps(examine("demo", read_text=read_text)))
    assert shown.err == ""


def test_what_the_terminal_shows(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(demo / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors | {f"foo.{number}": torch.ones(1) for number in range(30)}, demo / "model.safetensors")
    (demo / "chat_template.jinja").unlink()
    assert main(["doctor", str(demo)]) == 2
    shown = capsys.readouterr().out
    for words in (
        "does not load",
        "missing    layers.0.attn.in[k] (64, 256)",
        "and 10 more; --json lists all",
        "no chat template",
        "0-3, 5  sliding    q k v",
        "layer 5",
        "mlx-swift-lm",
        "up to 3.31.4",
        "unknown, for no rule speaks of them: ",
        "[1] https://github.com/",
    ):
        assert words in shown, words


def test_words_are_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(terminal.sys, "stdout", shown)
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    show(examine("demo", read_text=read_text))
    for words in ("mlx-swift-lm  fails          up to 3.31.4: ", "redundant", "convert_hf_to_gguf.py"):
        assert words in shown.getvalue(), words
    assert "\u2026" not in shown.getvalue()  # with which words are cut


def test_unreadable_sources_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "./absent"]) == 2
    shown = capsys.readouterr().out
    assert "./absent: can't be read" in shown
    assert "does not exist on this machine" in shown


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "gemcutter doctor google/gemma-4-E2B-it" in shown
    assert "exit code is 0" in shown


def test_inspect_reads_a_remote_repository_by_its_headers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(DEMO_FOLDER) as site:
        monkeypatch.setattr(constants, "ENDPOINT", site.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + "/{repo_id}/resolve/{revision}/{filename}")
        assert main(["inspect", "owner/model", "--json"]) == 0
        assert site.sent_bytes < (DEMO_FOLDER / "model.safetensors").stat().st_size / 100
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][9]["kv_source"] == 4
    assert main(["inspect", "demo", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert {key: value for key, value in found.items() if key not in ("model", "path")} == {
        key: value for key, value in here.items() if key not in ("model", "path")
    }
