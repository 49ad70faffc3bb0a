"""`gemcutter run`: where prompts come from, what is printed, and the same tokens as the oracle."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gemcutter
from gemcutter import native
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.doctor.fingerprint import sampled_sha256
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import main
from gemcutter.cli.terminal import print_json

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPTS = json.loads((GOLDENS / "prompts.json").read_text())["prompts"]
EXPECTED = json.loads((GOLDENS / "tiny-e.json").read_text())["prompts"]
ENDS = {1, 7}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Restore the number of threads that torch had, which --threads changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Run the command with --json; stdout must hold that one object."""
    assert main(["run", "demo", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def set_stdin(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    """Replace the stdin of the process."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


@pytest.mark.parametrize("index", range(0, len(PROMPTS), 3))
def test_greedy_tokens_equal_the_oracle(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    golden = EXPECTED[index]
    greedy = golden["greedy_ids"][:24]
    end = next((place for place, token in enumerate(greedy) if token in ENDS), len(greedy))
    ids = ",".join(map(str, golden["token_ids"]))
    found = run_json(capsys, "--tokens", ids, "--dtype", "float32", "-n", str(len(greedy)), "--top-logits", "10")
    assert found["prompt_tokens"] == golden["token_ids"]
    assert found["tokens"] == greedy[:end]
    assert found["finish_reason"] == ("length" if end == len(greedy) else "stop")
    assert [token for token, _ in found["top_logits"]] == golden["top10_ids"]
    assert [value for _, value in found["top_logits"]] == pytest.approx(golden["top10_logits"], abs=1e-3)


def test_a_text_goes_through_the_chat_template(capsys: pytest.CaptureFixture[str]) -> None:
    chat = next(prompt for prompt in PROMPTS if prompt["kind"] == "chat" and len(prompt["messages"]) == 1)
    assert run_json(capsys, chat["messages"][0]["content"], "-n", "0")["prompt_tokens"] == chat["token_ids"]


def test_raw_leaves_the_template_out(capsys: pytest.CaptureFixture[str]) -> None:
    raw = next(prompt for prompt in PROMPTS if prompt["kind"] == "raw")
    assert run_json(capsys, raw["text"], "--raw", "-n", "0")["prompt_tokens"] == raw["token_ids"]


def test_system_and_thinking_reach_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    plain = run_json(capsys, "Hi", "-n", "0")["prompt_tokens"]
    told = run_json(capsys, "Hi", "--system", "Be brief.", "-n", "0")["prompt_tokens"]
    thinking = run_json(capsys, "Hi", "--think", "-n", "0")["prompt_tokens"]
    assert len(plain) < len(thinking)
    assert len(plain) < len(told)
    assert 5 in thinking  # <|think|>
    assert 5 not in told


def test_a_model_without_a_template_gets_raw_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in DEMO_FOLDER.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = next(prompt for prompt in PROMPTS if prompt["kind"] == "raw")
    assert main(["run", str(tmp_path), raw["text"], "-n", "0", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["prompt_tokens"] == raw["token_ids"]
    assert shown.err.startswith("note: the checkpoint has no chat template")
    assert notes(capsys, raw["text"], "-n", "0", "--raw", model=str(tmp_path)) == []
    assert main(["run", str(tmp_path), "Hi", "--system", "Be brief."]) == 1
    assert "no chat template" in capsys.readouterr().err


def test_the_object_has_all_that_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "What is a lantern?", "-n", "6", "--logprobs", "2", "--top-logits", "3")
    assert found.keys() == {
        "prompt_tokens", "tokens", "text", "reasoning", "tool_calls", "finish_reason", "top_logits", "logprobs", "timings",
        "measured",
    }  # fmt: skip
    assert len(found["tokens"]) == 6
    assert found["finish_reason"] == "length"
    assert [one["id"] for one in found["logprobs"]] == found["tokens"]
    assert all(len(one["top"]) == 2 and one["logprob"] == one["top"][0][1] for one in found["logprobs"])
    timings = found["timings"]
    drafts = {"drafted_tokens", "accepted_tokens"}
    assert timings.keys() - drafts == {"load_s", "prefill_tokens", "prefill_s", "decode_tokens", "decode_s", "peak_rss_bytes"}
    assert [timings[name] for name in drafts] == [0, 0]
    assert timings["prefill_tokens"] == len(found["prompt_tokens"])
    assert timings["decode_tokens"] == 5
    assert 0 < timings["prefill_s"] < 60
    assert timings["peak_rss_bytes"] > 50e6  # an interpreter with torch in it
    bare = run_json(capsys, "Hi", "-n", "1")
    assert "top_logits" not in bare
    assert "logprobs" not in bare


def test_the_object_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measured = run_json(capsys, "Hi", "-n", "1", "--dtype", "float32", "--kernels", "reference")["measured"]
    expected = {"model": "demo", "dtype": "float32", "kernels": "reference", "backend": "reference", "quant": None}
    assert measured.items() >= (expected | {"gemcutter": gemcutter.__version__, "device": "cpu", "level": None}).items()
    other = run_json(capsys, "Hi", "-n", "1", "--quant", "q8")["measured"]
    assert other["sampled_sha256"] == measured["sampled_sha256"] == sampled_sha256(Source.open(DEMO_FOLDER))
    assert other["quant"] == "q8"


def test_json_never_holds_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": 2, "e": None}})
    assert capsys.readouterr().out == '{"a": null, "b": [null, [1.5, null]], "c": {"d": 2, "e": null}}\n'


def notes(capsys: pytest.CaptureFixture[str], *words: str, model: str = "demo") -> list[str]:
    """Run the command and return its notes."""
    assert main(["run", model, *words]) == 0
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def test_a_reply_that_was_cut_off_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert notes(capsys, "What is a lantern?", "-n", "3") == ["note: stopped at --max-tokens 3"]
    assert notes(capsys, "What is a lantern?", "-n", "3", "--json") == ["note: stopped at --max-tokens 3"]
    assert notes(capsys, "What is a lantern?", "-n", "3", "-q") == []
    assert notes(capsys, "What is a lantern?", "-n", "0") == []  # nothing else was asked for
    assert notes(capsys, "Hi", "-n", "40") == []  # it ended by itself
    (full,) = notes(capsys, "In the beginning", "--raw", "--context", "8", "--ignore-eos")
    assert full.startswith("note: stopped at the end of the context")


def test_options_without_effect_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    (idle,) = notes(capsys, "Hi", "-n", "40", "--top-p", "0.9", "--seed", "4")
    assert idle.startswith("note: --top-p, --seed have no effect while the most likely token is always taken")
    assert notes(capsys, "Hi", "-n", "40", "--top-p", "0.9", "--temperature", "0.1", "--seed", "1", "--stop", " ") == []
    (many,) = notes(capsys, "Hi", "-n", "40", "--threads", "1000")
    assert many.startswith("note: --threads 1000 is more than the ")


def test_quantizing_what_is_packed_already_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "demo", str(tmp_path / "packed"), "--to", "mlx", "--quant", "q4"]) == 0
    capsys.readouterr()
    (idle,) = notes(capsys, "Hi", "-n", "40", "--quant", "q8", "--ignore-eos", model=str(tmp_path / "packed"))[:1]
    assert idle.startswith("note: quant q8")
    assert idle.endswith("packed in the file already, and stay as they are")
    assert not any("packed" in each for each in notes(capsys, "Hi", "-n", "1", model=str(tmp_path / "packed")))
    assert not any("packed" in each for each in notes(capsys, "Hi", "-n", "1", "--quant", "q8"))


@pytest.mark.skipif(native.missing() is not None, reason="repacks for the native kernels alone")
def test_options_of_repacked_weights_are_idle_without_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    because = "has no effect: no weight is repacked for the CPU kernels"
    dense = notes(capsys, "Hi", "-n", "40", "--activations", "bf16")
    assert dense == [f"note: activations bf16 {because}"]
    assert notes(capsys, "Hi", "-n", "40", "--repack-cache") == [f"note: repack_cache {because}"]
    assert notes(capsys, "Hi", "-n", "40", "--quant", "q8", "--activations", "bf16") == []


def test_a_verbose_run_tells_how_it_was_loaded_and_how_fast_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "Hi", "-v"]) == 0
    shown = capsys.readouterr().err
    assert "loaded in " in shown
    assert "tokens/s; end: stop" in shown
    assert re.search(r"^done in \d+\.\d\d s$", shown, re.MULTILINE)
    assert main(["run", "demo", "Hi"]) == 0
    assert capsys.readouterr().err == ""


def test_streamed_text_equals_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "What is a lantern?", "-n", "12")
    assert main(["run", "demo", "What is a lantern?", "-n", "12", "--top-logits", "2", "--logprobs", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == found["text"] + "\n"
    assert shown.err.count("\n") == 1 + 2 + 1 + 12 + 1  # two headings, two logits, twelve tokens, and that it was cut off


def test_options_of_sampling_and_stopping_have_an_effect(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("What is a lantern?", "-n", "12")
    greedy = run_json(capsys, *ask)
    sampled = run_json(capsys, *ask, "--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--min-p", "0", "--seed", "7")
    assert sampled["tokens"] != greedy["tokens"]
    again = run_json(capsys, *ask, "--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--min-p", "0", "--seed", "7")
    assert again["tokens"] == sampled["tokens"]
    penalised = run_json(capsys, *ask, "--repetition-penalty", "5", "--presence-penalty", "2", "--frequency-penalty", "2")
    assert len(set(penalised["tokens"])) == len(penalised["tokens"])
    word = greedy["text"].split()[2]
    stopped = run_json(capsys, *ask, "--stop", "no such text", "--stop", word)
    assert stopped["text"] == greedy["text"].partition(word)[0]
    assert stopped["finish_reason"] == "stop"
    short = run_json(capsys, "Hi", "-n", "40")
    assert short["finish_reason"] == "stop"
    assert len(run_json(capsys, "Hi", "-n", "40", "--ignore-eos")["tokens"]) == 40


def test_the_reference_kernels_agree(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("Hi", "-n", "8", "--dtype", "float32")
    assert run_json(capsys, *ask, "--kernels", "reference")["tokens"] == run_json(capsys, *ask)["tokens"]


@pytest.mark.parametrize("words", [[], ["-"]], ids=["absent", "dash"])
def test_the_prompt_may_come_from_stdin(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run_json(capsys, "What is a lántern?", "--raw", "-n", "0")["prompt_tokens"]
    set_stdin(monkeypatch, "What is a lántern?\n".encode())
    assert run_json(capsys, *words, "--raw", "-n", "0")["prompt_tokens"] == expected


def test_bytes_that_are_no_text_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    set_stdin(monkeypatch, b"ab\xff")
    assert main(["run", "demo"]) == 1
    assert "stdin is not valid UTF-8 (byte 2)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[""], ["--tokens", ""], ["", "--raw"]], ids=["text", "ids", "raw"])
def test_an_empty_prompt_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", *words]) == 1
    assert capsys.readouterr().err.startswith("error: the prompt is empty")


def test_ids_outside_the_vocabulary_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--tokens", "2,4096", "--json"]) == 1
    shown = capsys.readouterr()
    assert "4096" in shown.err
    assert "vocabulary" in shown.err
    assert shown.out == ""


def test_a_prompt_longer_than_the_context_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--tokens", ",".join(["2"] * 21), "--context", "20"]) == 1
    assert "21 tokens, the context holds 20" in capsys.readouterr().err


def test_a_context_beyond_the_models_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "Hi", "-n", "1", "--context", "200000"]) == 0
    assert "131072" in capsys.readouterr().err
