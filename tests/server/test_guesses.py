"""Speculation seen from outside: the same replies, guesses in the usage and in the metrics, vLLM's spelling of the options."""

from __future__ import annotations

import re
from typing import Any

import pytest

import gemcutter
from gemcutter.cli import serve
from gemcutter.cli.failure import UsageError
from gemcutter.cli.options import Speculating
from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running
from tests.trained import trained

NOTHING = Speculating()


def test_a_server_with_an_assistant_counts_what_was_guessed(server: Running) -> None:
    wanted = server.post("/v1/chat/completions", server.chat("What is a lantern?", max_tokens=24)).json()
    options = ServerOptions(names=("demo",))
    model = gemcutter.load("demo", context=512, draft_model=trained("tiny-e-assistant"), draft_tokens=3)
    with model, running(model, options) as guessing:
        found = guessing.post("/v1/chat/completions", guessing.chat("What is a lantern?", max_tokens=24)).json()
        metrics = guessing.get("/metrics").text
    assert found["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
    details = found["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0
    assert details["rejected_prediction_tokens"] >= 0
    counts = {name: float(re.search(rf"^vllm:{name}_total\S* (\S+)$", metrics, re.MULTILINE)[1]) for name in COUNTERS}  # type: ignore[index]
    assert counts["spec_decode_num_drafts"] > 0
    assert counts["spec_decode_num_accepted_tokens"] == details["accepted_prediction_tokens"]
    assert counts["spec_decode_num_draft_tokens"] == sum(details[name] for name in details if "prediction" in name)
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="demo",position="0"}' in metrics
    assert "vllm:request_queue_time_seconds_count" in metrics


COUNTERS = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ('{"method": "ngram", "num_speculative_tokens": 4}', ("ngram", None, 4)),
        ('{"model": "some/assistant"}', ("mtp", "some/assistant", None)),
        ('{"method": "mtp", "model": "a", "num_speculative_tokens": 2}', ("mtp", "a", 2)),
    ],
)
def test_vllms_object_is_read(text: str, means: tuple[Any, ...]) -> None:
    assert tuple(serve._read_speculation(text, NOTHING).values()) == means


@pytest.mark.parametrize("text", ["{", "[1]", '{"method": "eagle3"}', '{"draft_tensor_parallel_size": 2}'])
def test_what_can_t_be_read_of_it_is_told(text: str) -> None:
    with pytest.raises(UsageError, match="--speculative-config"):
        serve._read_speculation(text, NOTHING)
    with pytest.raises(UsageError, match="either"):
        serve._read_speculation("{}", Speculating(speculate="ngram"))
