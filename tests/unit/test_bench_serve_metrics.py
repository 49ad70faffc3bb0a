"""The arithmetic of the serving benchmark, on streams with made-up times, against numbers computed here in another way.

The traps are those that tell sglang's rules from vLLM's: chunks without text, chunks of several tokens, replies of one token, and
streams that tell no usage.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from gemcutter.bench_serve.load import Run
from gemcutter.bench_serve.metrics import Spread, delays_s, measure, pace, sample, time_per_output_token_s
from gemcutter.bench_serve.reply import LineReader, Reply, read_line
from gemcutter.bench_serve.report import (
    Outcome,
    Settings,
    drafted_and_accepted,
    load_fields,
    parse_limits,
    sglang_fields,
    vllm_fields,
)
from gemcutter.bench_serve.server_counts import accept_length, ask_counts, cache_between, drafts_between, read_counts
from tests.scripted_server import DONE, chat, usage

START = 100.0
SGLANG = {
    "tag",
    "backend",
    "dataset_name",
    "request_rate",
    "max_concurrency",
    "sharegpt_output_len",
    "random_input_len",
    "random_output_len",
    "random_range_ratio",
    "server_info",
    "duration",
    "completed",
    "total_input_tokens",
    "total_input_text_tokens",
    "total_input_vision_tokens",
    "total_output_tokens",
    "total_output_tokens_retokenized",
    "request_throughput",
    "input_throughput",
    "output_throughput",
    "total_throughput",
    "concurrency",
    "accept_length",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
} | {
    f"{kind}_{name}_ms"
    for kind in ("mean", "median", "std", "p90", "p95", "p99")
    for name in ("e2e_latency", "ttft", "tpot", "itl")
}
SGLANG_GOODPUT = {"goodput_slos_ms", "request_goodput", "slo_attainment", "slo_attainment_by_metric"}
VLLM = {
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
} | {f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")}
VLLM_DRAFTS = {
    f"spec_decode_{name}"
    for name in (
        "acceptance_rate",
        "acceptance_length",
        "num_drafts",
        "draft_tokens",
        "accepted_tokens",
        "per_position_acceptance_rates",
    )
}
DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}


def streamed(events: Sequence[tuple[float, Any]], *, start: float = START, wanted: int = 8, prompt: int = 5) -> Reply:
    """Return the reply of a stream whose events come so many seconds after the request was sent."""
    reply = Reply(due_s=start, dispatched_s=start, started_s=start, ended_s=start, prompt_len=prompt, wanted_len=wanted)
    for after_s, payload in events:
        line = payload if isinstance(payload, str) and payload.startswith(":") else f"data: {_spell(payload)}"
        read_line(reply, line, start + after_s)
    return reply


def _spell(payload: Any) -> str:
    return payload if isinstance(payload, str) else json.dumps(payload)


# A role at .1 s, thoughts at .5, text at .7 and 1.1 (of several tokens), the end at 1.2, usage (6 tokens) at 1.3, [DONE] at 1.4.
THOUGHTFUL = [
    (0.1, chat()),
    (0.2, ": ping"),
    (0.5, chat(reasoning="Well, ")),
    (0.7, chat("a b c ")),
    (1.1, chat("d")),
    (1.2, chat(finish="length")),
    (1.3, usage(9, 6, prompt_tokens_details={"cached_tokens": 4})),
    (1.4, DONE),
]
ONE_TOKEN = [(0.1, chat()), (0.3, chat("x")), (0.3, chat(finish="length")), (0.4, usage(7, 1)), (0.5, DONE)]
NO_USAGE = [(0.1, chat()), (0.4, chat("a ")), (0.8, chat("b")), (0.9, chat(finish="stop")), (1.0, DONE)]


def outcome_of(replies: Sequence[Reply], duration_s: float = 4.0, **more: Any) -> Outcome:
    """Return the outcome of replies; arguments of `Settings` and `Outcome` by name."""
    own = {name: more.pop(name) for name in ("planned_turns", "before", "after", "count") if name in more}
    given = {"model": "m", "api": "chat", "dataset_name": "random", "num_prompts": len(replies), "request_rate": math.inf}
    run = Run(tuple(replies), (0.0,) * len(replies), START, START + duration_s)
    usual = {"planned_turns": len(replies), "before": read_counts(None), "after": read_counts(None), "count": None}
    return Outcome(Settings(**given | more), run, **usual | own)


# ---- one reply ----


def test_a_first_token_has_text_for_sglang_and_a_choice_for_vllm() -> None:
    reply = streamed(THOUGHTFUL)
    ours, theirs = sample(reply, "sglang"), sample(reply, "vllm")
    assert ours.ttft_s == pytest.approx(0.5, abs=1e-6)
    assert theirs.ttft_s == pytest.approx(0.1, abs=1e-6)
    assert ours.itls_s == pytest.approx([0.2, 0.4], abs=1e-6)
    assert theirs.itls_s == pytest.approx([0.4, 0.2, 0.4, 0.1], abs=1e-6)
    assert ours.e2e_s == pytest.approx(1.4, abs=1e-6)
    assert theirs.e2e_s == pytest.approx(1.2, abs=1e-6)
    assert ours.tpot_s == pytest.approx((1.4 - 0.5) / 5, abs=1e-6)
    assert theirs.tpot_s == pytest.approx((1.2 - 0.1) / 5, abs=1e-6)
    assert time_per_output_token_s(ours) == pytest.approx(1.1 / 6, abs=1e-6)
    assert (reply.text, reply.content) == ("Well, a b c d", "a b c d")


def test_a_reply_of_one_token_has_no_tpot() -> None:
    for rules in ("sglang", "vllm"):
        found = sample(streamed(ONE_TOKEN), rules)  # type: ignore[arg-type]
        assert found.tpot_s is None
        assert found.value_s("tpot") == 0


def test_without_usage_sglang_takes_what_was_asked_for_and_vllm_counts() -> None:
    reply = streamed(NO_USAGE, wanted=8)
    assert sample(reply, "sglang").output_len == 8
    assert sample(reply, "vllm", lambda text: len(text.split())).output_len == 2
    assert sample(reply, "vllm").output_len == 1
    assert sample(reply, "sglang").tpot_s == pytest.approx((1.0 - 0.4) / 7, abs=1e-6)  # a false one, as the specification says


def test_reasoning_under_two_names_is_counted_once() -> None:
    both = {"choices": [{"delta": {"reasoning": "so", "reasoning_content": "so", "content": None}}]}
    assert streamed([(0.1, both)]).text == "so"


def test_completions_stream_text() -> None:
    events = [(0.2, {"choices": [{"text": "a"}]}), (0.3, {"choices": [{"text": "", "finish_reason": "length"}]})]
    reply = streamed(events)
    assert (reply.text, len(reply.text_times_s), len(reply.choice_times_s), reply.finish_reason) == ("a", 1, 2, "length")


@pytest.mark.parametrize(
    ("payload", "said"), [("{", "no JSON"), ({"error": {"message": "boom"}}, "boom"), ([1], "brought an error")]
)
def test_what_is_no_event_fails_the_request(payload: Any, said: str) -> None:
    reply = streamed([(0.1, chat("a")), (0.2, payload), (0.3, DONE)])
    assert said in reply.error
    assert not reply.is_success


def test_lines_may_be_cut_anywhere() -> None:
    whole = 'data: {"a": "é"}\r\n\r\n: ping\n\ndata: [DONE]\n\n'.encode()
    for size in (1, 2, 3, 7, len(whole)):
        lines = LineReader()
        found = [line for at in range(0, len(whole), size) for line in lines.push(whole[at : at + size])]
        assert found == ['data: {"a": "é"}', ": ping", "data: [DONE]"]


# ---- many ----


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile that lies between two sorted values in proportion."""
    ranked, place = sorted(values), (len(values) - 1) * percent / 100
    low = math.floor(place)
    return ranked[low] + (place - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])


def test_spreads_are_those_of_the_statistics_module() -> None:
    values = (0.3, 1.7, 0.2, 9.0, 4.4, 4.4, 0.01)
    spread = Spread(values)
    assert spread.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert spread.median == pytest.approx(statistics.median(values), abs=1e-9)
    assert spread.std == pytest.approx(statistics.pstdev(values), abs=1e-9)
    for percent in (1, 50, 90, 95, 99, 99.9):
        assert spread.percentile(percent) == pytest.approx(percentile(values, percent), abs=1e-9)
    assert (Spread(()).mean, Spread(()).percentile(99), Spread(()).std) == (0, 0, 0)


def test_both_tools_fields_of_a_run() -> None:
    failed = streamed([])
    failed.fail("status 500: no")
    failed.prompt_len = 11
    replies = [streamed(THOUGHTFUL), streamed(ONE_TOKEN, start=START + 1), streamed(NO_USAGE, start=START + 2, wanted=3), failed]
    outcome = outcome_of(replies, count=lambda text: len(text.split()), goodput_ms={"ttft": 410, "tpot": 250})
    ours, theirs = sglang_fields(outcome), vllm_fields(outcome)
    assert (ours["completed"], theirs["completed"], theirs["failed"]) == (3, 3, 1)
    # of sglang: prompts are those of the data set, 6 + 1 + 3 tokens of replies
    assert (ours["total_input_tokens"], ours["total_output_tokens"], ours["total_output_tokens_retokenized"]) == (15, 10, 8)
    # of vLLM: prompts as the server counts them (the third tells nothing), 6 + 1 + 2 tokens of replies
    assert (theirs["total_input_tokens"], theirs["total_output_tokens"]) == (9 + 7 + 5, 9)
    assert ours["output_throughput"] == pytest.approx(10 / 4, abs=1e-6)
    assert ours["total_throughput"] == pytest.approx(25 / 4, abs=1e-6)
    assert theirs["total_token_throughput"] == pytest.approx(30 / 4, abs=1e-6)
    assert ours["request_throughput"] == theirs["request_throughput"] == pytest.approx(0.75, abs=1e-6)
    assert ours["mean_ttft_ms"] == pytest.approx(1000 * (0.5 + 0.3 + 0.4) / 3, abs=1e-6)
    assert theirs["mean_ttft_ms"] == pytest.approx(100, abs=1e-6)
    assert ours["p99_tpot_ms"] == pytest.approx(1000 * percentile([0.9 / 5, 0.6 / 2], 99), abs=1e-6)
    assert theirs["median_tpot_ms"] == pytest.approx(1000 * statistics.median([1.1 / 5, 0.8 / 1]), abs=1e-6)
    assert ours["mean_itl_ms"] == pytest.approx(1000 * (0.2 + 0.4 + 0.4) / 3, abs=1e-6)
    assert ours["std_e2e_latency_ms"] == pytest.approx(1000 * statistics.pstdev([1.4, 0.5, 1.0]), abs=1e-6)
    assert theirs["median_e2el_ms"] == pytest.approx(900, abs=1e-6)
    assert ours["concurrency"] == pytest.approx((1.4 + 0.5 + 1.0) / 4, abs=1e-6)
    # at START + 1.3 the first and second are there; seconds 0, 1, 2 have 2, 2 and 2 chunks with text
    assert (ours["max_concurrent_requests"], ours["max_output_tokens_per_s"]) == (2, 2)
    # the second has both limits (no TPOT), the third misses TPOT (300), the first TTFT (500)
    assert ours["request_goodput"] == pytest.approx(1 / 4, abs=1e-6)
    assert (ours["slo_attainment"], ours["slo_attainment_by_metric"]) == (1 / 4, {"ttft": 2 / 4, "tpot": 2 / 4})
    assert theirs["request_goodput"] == pytest.approx(2 / 4, abs=1e-6)  # by its rules TTFT is 100 ms, and TPOT 220, 0, 800
    assert ours["cache_report"] == {"total_prompt_tokens": 16, "total_cached_tokens": 4, "cache_hit_rate_pct": 25.0}


def test_the_names_of_fields_are_all_of_both_tools_and_no_others() -> None:
    plain = outcome_of([streamed(ONE_TOKEN)])
    assert set(sglang_fields(plain)) == SGLANG
    assert set(vllm_fields(plain)) == VLLM
    counters = (
        "vllm:spec_decode_num_drafts_total 4\nvllm:spec_decode_num_draft_tokens_total 8\n"
        "vllm:spec_decode_num_accepted_tokens_total 6\n"
    )
    rich = outcome_of([streamed(THOUGHTFUL)], goodput_ms={"e2el": 1}, after=read_counts(counters), percentiles=(50, 99.9))
    assert set(sglang_fields(rich, details=True)) == SGLANG | SGLANG_GOODPUT | {"cache_report"} | DETAILS
    expected = {name for name in VLLM if not name.startswith("p99_")} | VLLM_DRAFTS | DETAILS
    assert set(vllm_fields(rich, details=True)) == expected | {
        f"{percent}_{name}_ms" for percent in ("p50", "p99.9") for name in ("ttft", "tpot", "itl", "e2el")
    }
    for found in (sglang_fields(rich, details=True), vllm_fields(rich), load_fields(rich)):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_details_have_an_entry_for_every_request() -> None:
    failed = streamed([(0.2, chat("half"))])
    failed.fail("cut off")
    found = sglang_fields(outcome_of([failed, streamed(THOUGHTFUL)]), details=True)
    assert found["output_lens"] == [0, 6]
    assert found["ttfts"] == pytest.approx([0, 0.5], abs=1e-6)
    assert found["itls"] == [[], pytest.approx([0.2, 0.4], abs=1e-6)]
    assert (found["generated_texts"], found["errors"]) == (["half", "Well, a b c d"], ["cut off", ""])
    assert found["input_lens"] == [5, 9]


def test_a_run_of_failures_alone_is_told_in_numbers() -> None:
    failed = streamed([])
    failed.fail("status 503: busy")
    outcome = outcome_of([failed, failed], goodput_ms={"ttft": 1})
    ours, told = sglang_fields(outcome), load_fields(outcome)
    assert (ours["completed"], ours["mean_ttft_ms"], ours["slo_attainment"], ours["max_concurrent_requests"]) == (0, 0, 0, 0)
    assert (told["failed"], told["errors"], told["served_requests_per_s"]) == (2, {"status 503: busy": 2}, 0)


# ---- the load ----


def served_in_turn(count: int, rate: float, service_s: float) -> Run:
    """Return a run against a server that answers one request after the other, arrivals at fixed intervals."""
    replies, free_s = list[Reply](), START
    arrivals = [place / rate for place in range(count)]
    for due_s in arrivals:
        free_s = max(free_s, START + due_s) + service_s
        reply = streamed([(free_s - START - due_s, chat("a"))], start=START + due_s)
        replies.append(reply)
    return Run(tuple(replies), tuple(arrivals), START, free_s)


@pytest.mark.parametrize(("rate", "overloaded"), [(0.5, False), (0.95, False), (1.5, True), (3.0, True)])
def test_a_server_that_falls_behind_is_called_overloaded(rate: float, overloaded: bool) -> None:
    run = served_in_turn(40, rate, 1.0)
    found = pace(run, rate)
    assert found.is_overloaded is overloaded
    assert found.offered == rate
    assert found.served == pytest.approx(40 / run.duration_s, abs=1e-6)


def test_all_at_once_is_no_rate() -> None:
    run = served_in_turn(5, 1e9, 1.0)
    assert pace(run, math.inf).is_overloaded is False
    assert pace(run, math.inf).offered is None


def test_what_the_client_adds_is_kept_apart() -> None:
    reply = streamed(ONE_TOKEN)
    reply.due_s, reply.dispatched_s = START - 0.75, START - 0.5
    late, waiting = delays_s([reply])
    assert (late.values, waiting.values) == (pytest.approx((0.25,)), pytest.approx((0.5,)))
    assert measure(Run((reply,), (0.0,), START, START + 1), "sglang").spreads["ttft"].values == pytest.approx((0.3,))
    told = load_fields(outcome_of([reply]))
    assert told["client_queue_ms"]["median"] == pytest.approx(500)
    assert told["dispatch_delay_ms"]["max"] == pytest.approx(250)


def test_turns_have_times_of_their_own() -> None:
    first, second = streamed(ONE_TOKEN), streamed(THOUGHTFUL)
    second.turn = 1
    assert load_fields(outcome_of([first, second]))["ttft_by_turn_ms"] == pytest.approx([300, 500])


# ---- what servers count ----

BEFORE = """# HELP vllm:spec_decode_num_drafts_total Drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 30.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 12.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 4.0
vllm:prefix_cache_queries_total{engine="0"} 100.0
vllm:prefix_cache_hits_total{engine="0"} 1e1
"""
AFTER = BEFORE.replace(" 10.0", " 30.0").replace(" 30.0\nvllm:spec_decode_num_acc", " 90.0\nvllm:spec_decode_num_acc")
AFTER = AFTER.replace(" 12.0", " 62.0").replace(" 8.0", " 26.0").replace(" 4.0", " 16.0").replace(" 100.0", " 500.0")


def test_drafts_are_what_counters_grew_by() -> None:
    before, after = read_counts(BEFORE), read_counts(AFTER)
    drafts = drafts_between(before, after)
    assert drafts is not None
    assert (drafts.drafts, drafts.tokens, drafts.accepted) == (20, 60, 50)
    assert drafts.length == pytest.approx(1 + 50 / 20)
    assert drafts.shares == pytest.approx((18 / 20, 12 / 20))
    fields = vllm_fields(outcome_of([streamed(ONE_TOKEN)], before=before, after=after))
    assert fields["spec_decode_acceptance_rate"] == pytest.approx(100 * 50 / 60)
    assert cache_between(before, after) == (400, 0)
    assert accept_length(before, after) == pytest.approx(3.5)


def test_drafts_of_usage_count_where_the_server_has_no_counters() -> None:
    details = {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 2}
    events = [(0.1, chat("a")), (0.2, usage(3, 7, completion_tokens_details=details)), (0.3, DONE)]
    assert drafted_and_accepted(outcome_of([streamed(events), streamed(ONE_TOKEN)])) == (7, 5)
    assert drafted_and_accepted(outcome_of([streamed(ONE_TOKEN)])) is None
    counted = outcome_of([streamed(events)], before=read_counts(BEFORE), after=read_counts(AFTER))
    assert drafted_and_accepted(counted) == (60, 50)


def test_sglangs_own_word_for_acceptance_comes_first() -> None:
    told = read_counts(AFTER, '{"internal_states": [{"avg_spec_accept_length": 2.25}]}')
    assert accept_length(read_counts(BEFORE), told) == 2.25
    assert accept_length(read_counts(None, "no JSON"), read_counts(None, "[]")) is None


def test_limits_are_read_once_each() -> None:
    assert parse_limits("ttft:200,tpot:50.5 e2el:4000") == {"ttft": 200.0, "tpot": 50.5, "e2el": 4000.0}
    for bad in ("itl:10", "ttft", "ttft:", "ttft:fast", "ttft:0", "ttft:-5", "ttft:inf", "ttft:1,ttft:2"):
        with pytest.raises(ValueError, match="expected limits in ms"):
            parse_limits(bad)


def test_counters_are_read_once_they_stand_still() -> None:
    pages = iter([1.0, 5.0, 9.0, 9.0, 100.0])

    class Late:
        async def get(self, path: str) -> str | None:
            return f"vllm:prefix_cache_queries_total {next(pages)}" if path == "/metrics" else None

    assert asyncio.run(ask_counts(Late())).totals == {"vllm:prefix_cache_queries_total": 9.0}
