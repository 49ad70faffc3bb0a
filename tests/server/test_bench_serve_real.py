"""`bench-serve` against the server itself, over the demo model: lengths, cached tokens and the server's own counters."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import gemcutter
from gemcutter.cli import main
from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running
from tests.trained import trained

GSP = [
    *("--dataset-name", "gsp", "--tokenizer", "demo", "--gsp-num-groups", "2", "--gsp-prompts-per-group", "4", "--gsp-ordered"),
    *("--gsp-system-prompt-len", "300", "--gsp-question-len", "40", "--gsp-output-len", "12", "--max-concurrency", "1"),
]
SHARED_PAGES = 256  # of the 300 tokens of a beginning, in pages of 64


def run(server: Running, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench-serve", server.url, "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("api", [("chat",), ("completions", "--tokenize-prompt")], ids=["chat", "ids"])
def test_a_shared_beginning_is_computed_once_a_group(
    api: tuple[str, ...], server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = "11" if len(api) == 1 else "12"  # what one of them has cached is of no use to the other
    found = run(server, capsys, *GSP, "--seed", seed, "--api", *api, "--output-details")
    ours, load = found["sglang"], found["load"]
    assert (ours["completed"], ours["total_input_tokens"], ours["total_output_tokens"]) == (8, 8 * 340, 8 * 12)
    template = ours["input_lens"][0] - 340
    assert ours["input_lens"] == [340 + template] * 8
    assert template == (0 if len(api) == 2 else template > 0 and template)
    # The first of a group finds nothing, the second leaves the windows where the two part, the others go on from there.
    assert load["cached_tokens"] >= 2 * 2 * SHARED_PAGES
    assert load["cached_tokens"] < 2 * 3 * (300 + template) + 8 * (template + 4)  # whose questions may begin alike by chance
    assert load["cached_tokens"] == load["prefix_cache_hits"] == ours["cache_report"]["total_cached_tokens"]
    assert load["prompt_tokens"] == load["prefix_cache_queries"] == 8 * (340 + template)
    assert (load["failed"], load["other_length_than_asked"], load["without_usage"]) == (0, 0, 0)


def test_a_conversation_finds_its_history(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--dataset-name conversations --tokenizer demo --num-prompts 2 --num-turns 3 --random-input-len 200 --question-len 20"
    found = run(server, capsys, *words.split(), "--random-output-len", "10", "--seed", "13")
    assert found["sglang"]["completed"] == 6
    assert len(found["load"]["ttft_by_turn_ms"]) == 3
    assert found["load"]["cached_tokens"] >= 2 * (200 + 200 + 30)  # second and third turns begin with all that was said


def test_lengths_are_exact_at_the_server(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--api completions --tokenizer demo --num-prompts 3 --random-input-len 77 --random-output-len 9 --request-rate 20"
    found = run(server, capsys, *words.split(), "--seed", "14", "--output-details")["vllm"]
    assert found["input_lens"] == [78] * 3  # <bos>, which the server puts before a text
    assert found["output_lens"] == [9] * 3
    assert (found["completed"], found["failed"], found["num_prompts"]) == (3, 0, 3)


def test_accepted_drafts_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = gemcutter.load("demo", context=512, draft_model=trained("tiny-e-assistant"), draft_tokens=3)
    words = "--tokenizer demo --num-prompts 2 --random-input-len 20 --random-output-len 24 --warmup-requests 1 --output-details"
    with model, running(model, ServerOptions(names=("demo",))) as server:
        found = run(server, capsys, *words.split(), "--seed", "15")
    drafts, theirs = found["load"], found["vllm"]
    assert drafts["draft_tokens"] == theirs["spec_decode_draft_tokens"] >= drafts["accepted_draft_tokens"] > 0
    steps = theirs["spec_decode_num_drafts"]
    assert theirs["spec_decode_acceptance_length"] == pytest.approx(1 + drafts["accepted_draft_tokens"] / steps)
    assert found["sglang"]["accept_length"] == theirs["spec_decode_acceptance_length"]
    assert sum(theirs["spec_decode_per_position_acceptance_rates"]) == pytest.approx(drafts["accepted_draft_tokens"] / steps)
    assert sum(theirs["output_lens"]) == 2 * 24


def test_a_request_that_the_server_refuses_is_told(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--tokenizer demo --num-prompts 2 --random-input-len 4000 --random-output-len 4 --warmup-requests 0"
    assert main(["bench-serve", server.url, *words.split()]) == 1
    said = capsys.readouterr().err
    assert "2 of 2 requests failed" in said
    assert re.search(r"1 x status 400: .*context_length_exceeded", said)
