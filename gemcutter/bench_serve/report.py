"""A run as JSON: in the fields of sglang's benchmark, in those of vLLM's, and what neither of them tells.

Owns the names and units (milliseconds where a name ends so). Refuses to compute: read `metrics.py` for the definitions. Both sets
of fields are those of sglang 0.5.23 and vLLM 0.32, so that scripts which read the one's or the other's files read these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemcutter.bench_serve.load import Run
from gemcutter.bench_serve.metrics import (
    GOODPUT,
    Measures,
    Spread,
    delays_s,
    measure,
    pace,
    time_per_output_token_s,
    total_of,
)
from gemcutter.bench_serve.reply import Reply
from gemcutter.bench_serve.server_counts import Counts, accept_length, cache_between, drafts_between

SGLANG_NAMES = {"e2e_latency": "e2el", "ttft": "ttft", "tpot": "tpot", "itl": "itl"}
SGLANG_PERCENTILES = (90, 95, 99)
MEASURES = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a result belongs to, as both tools write it down; `goodput_ms` are limits by measure."""

    model: str
    api: str
    dataset_name: str
    num_prompts: int
    request_rate: float
    burstiness: float = 1.0
    max_concurrency: int | None = None
    tokenizer: str | None = None
    tag: str | None = None
    date: str = ""
    input_len: int | None = None
    output_len: int | None = None
    range_ratio: float | None = None
    sharegpt_output_len: int | None = None
    goodput_ms: Mapping[str, float] = field(default_factory=dict)
    percentiles: Sequence[float] = (99,)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run with everything that reports are made of. `count` returns how many tokens a text has, where that is known."""

    settings: Settings
    run: Run
    planned_turns: int
    before: Counts
    after: Counts
    count: Callable[[str], int] | None = None

    @property
    def failed(self) -> list[Reply]:
        """Return the replies that did not come to their end."""
        return [each for each in self.run.replies if each.error]

    @property
    def succeeded(self) -> list[Reply]:
        """Return the others."""
        return [each for each in self.run.replies if not each.error]


def sglang_fields(outcome: Outcome, *, details: bool = False) -> dict[str, Any]:
    """Return the object of a line that sglang.bench_serving writes."""
    how, found, duration_s = outcome.settings, measure(outcome.run, "sglang"), outcome.run.duration_s
    texts = sum(each.prompt_len if each.prompt_len is not None else _prompt_tokens(each) for each in outcome.succeeded)
    vision = sum(each.usage_detail("prompt_tokens_details", "image_tokens") or 0 for each in outcome.succeeded)
    retokenized = None if outcome.count is None else sum(outcome.count(each.text) for each in outcome.succeeded)
    fields = {
        "tag": how.tag,
        "backend": "vllm-chat" if how.api == "chat" else "vllm",  # by this client's protocol: these are sglang's names for it
        "dataset_name": how.dataset_name,
        "request_rate": _spell_rate(how.request_rate),
        "max_concurrency": how.max_concurrency,
        "sharegpt_output_len": how.sharegpt_output_len,
        "random_input_len": how.input_len,
        "random_output_len": how.output_len,
        "random_range_ratio": how.range_ratio,
        "server_info": outcome.after.server_info,
        "duration": duration_s,
        "completed": len(found.samples),
        "total_input_tokens": texts + vision,
        "total_input_text_tokens": texts,
        "total_input_vision_tokens": vision,
        "total_output_tokens": found.output_tokens,
        "total_output_tokens_retokenized": retokenized,
        "request_throughput": len(found.samples) / duration_s,
        "input_throughput": (texts + vision) / duration_s,
        "output_throughput": found.output_tokens / duration_s,
        "total_throughput": (texts + vision + found.output_tokens) / duration_s,
        **_sglang_latencies(found),
        "concurrency": found.concurrency,
        "accept_length": accept_length(outcome.before, outcome.after),
        "max_output_tokens_per_s": found.most_chunks_per_s(),
        "max_concurrent_requests": found.most_at_once(),
        **_sglang_goodput(outcome, found),
        **_cache_report(outcome),
    }
    return fields | (_details(outcome, found) if details else {})


def _sglang_latencies(found: Measures) -> dict[str, float]:
    fields, spreads = dict[str, float](), found.spreads
    for name, measured in SGLANG_NAMES.items():
        spread = spreads[measured]
        values = {"mean": spread.mean, "median": spread.median, "std": spread.std}
        values |= {f"p{percent}": spread.percentile(percent) for percent in SGLANG_PERCENTILES}
        fields |= {f"{kind}_{name}_ms": 1000 * value for kind, value in values.items()}
    return fields


def _sglang_goodput(outcome: Outcome, found: Measures) -> dict[str, Any]:
    """Return the fields of limits, shares being those of all requests that were sent; nothing without limits."""
    limits, sent = outcome.settings.goodput_ms, len(outcome.run.replies)
    if not limits:
        return {}
    good = found.good(limits)
    return {
        "goodput_slos_ms": dict(limits),
        "request_goodput": good / outcome.run.duration_s,
        "slo_attainment": good / sent,
        "slo_attainment_by_metric": {name: found.good({name: limit}) / sent for name, limit in limits.items()},
    }


def _cache_report(outcome: Outcome) -> dict[str, Any]:
    """Return what replies tell of the prefix cache; nothing where they tell nothing."""
    cached, prompts = cached_tokens(outcome), total_of(each.usage_count("prompt_tokens") for each in outcome.succeeded)
    if cached is None or not prompts:
        return {}
    share = 100 * cached / prompts
    return {"cache_report": {"total_prompt_tokens": prompts, "total_cached_tokens": cached, "cache_hit_rate_pct": share}}


def vllm_fields(outcome: Outcome, *, details: bool = False) -> dict[str, Any]:
    """Return the object that `vllm bench serve --save-result` writes."""
    how, found, duration_s = outcome.settings, measure(outcome.run, "vllm", outcome.count), outcome.run.duration_s
    inputs = sum(_input_len(each) for each in outcome.succeeded)
    good = found.good(how.goodput_ms) / duration_s if how.goodput_ms else None
    fields = {
        "date": how.date,
        "endpoint_type": "openai-chat" if how.api == "chat" else "openai",
        "backend": "openai-chat" if how.api == "chat" else "openai",
        "label": how.tag,
        "model_id": how.model,
        "tokenizer_id": how.tokenizer or how.model,
        "num_prompts": how.num_prompts,
        "request_rate": _spell_rate(how.request_rate),
        "burstiness": _spell_rate(how.burstiness),
        "max_concurrency": how.max_concurrency,
        "duration": duration_s,
        "completed": len(found.samples),
        "failed": len(outcome.failed),
        "total_input_tokens": inputs,
        "total_output_tokens": found.output_tokens,
        "request_throughput": len(found.samples) / duration_s,
        "request_goodput": good,
        "output_throughput": found.output_tokens / duration_s,
        "total_token_throughput": (inputs + found.output_tokens) / duration_s,
        "max_output_tokens_per_s": found.most_chunks_per_s(),
        "max_concurrent_requests": found.most_at_once(),
        **_vllm_latencies(found, how.percentiles),
        **_vllm_drafts(outcome),
    }
    return fields | (_details(outcome, found) if details else {})


def _vllm_latencies(found: Measures, percentiles: Sequence[float]) -> dict[str, float]:
    fields, spreads = dict[str, float](), found.spreads
    for name in MEASURES:
        spread = spreads[name]
        fields |= {f"{kind}_{name}_ms": 1000 * getattr(spread, kind) for kind in ("mean", "median", "std")}
        fields |= {f"p{percent:g}_{name}_ms": 1000 * spread.percentile(percent) for percent in percentiles}
    return fields


def _vllm_drafts(outcome: Outcome) -> dict[str, Any]:
    drafts = drafts_between(outcome.before, outcome.after)
    if drafts is None:
        return {}
    return {
        "spec_decode_acceptance_rate": 100 * drafts.accepted / drafts.tokens,
        "spec_decode_acceptance_length": drafts.length,
        "spec_decode_num_drafts": drafts.drafts,
        "spec_decode_draft_tokens": drafts.tokens,
        "spec_decode_accepted_tokens": drafts.accepted,
        "spec_decode_per_position_acceptance_rates": list(drafts.shares),
    }


def _details(outcome: Outcome, found: Measures) -> dict[str, Any]:
    """Return the lists of both tools, one entry a request, in seconds; a failed one has zeros."""
    samples = iter(found.samples)
    rows = [(each, None if each.error else next(samples)) for each in outcome.run.replies]
    return {
        "input_lens": [_input_len(each) for each, _ in rows],
        "output_lens": [0 if each is None else each.output_len for _, each in rows],
        "ttfts": [0.0 if each is None else each.ttft_s for _, each in rows],
        "itls": [[] if each is None else each.itls_s for _, each in rows],
        "generated_texts": [each.text for each, _ in rows],
        "errors": [each.error for each, _ in rows],
    }


def load_fields(outcome: Outcome) -> dict[str, Any]:
    """Return what neither tool tells: whether the load was kept up with, what the client added, and what servers counted."""
    run, speed = outcome.run, pace(outcome.run, outcome.settings.request_rate)
    late, waiting = delays_s(run.replies)
    samples = measure(run, "sglang").samples
    plain = [each for each in outcome.succeeded if not each.text_times_s]
    tokens = [each.usage_count("completion_tokens") for each in outcome.succeeded]
    wanted = [each.wanted_len for each in outcome.succeeded]
    looked_up, drafts = cache_between(outcome.before, outcome.after), drafted_and_accepted(outcome)
    return {
        "offered_requests_per_s": speed.offered,
        "served_requests_per_s": speed.served,
        "keeping_up_requests_per_s": speed.keeping_up,
        "overloaded": speed.is_overloaded,
        "dispatch_delay_ms": _spread_ms(late),
        "client_queue_ms": _spread_ms(waiting),
        "sent": len(run.replies),
        "not_sent": outcome.planned_turns - len(run.replies),
        "failed": len(outcome.failed),
        "errors": _counted([each.error for each in outcome.failed]),
        "without_usage": sum(each is None for each in tokens),
        "without_text": len(plain),
        "other_length_than_asked": sum(
            got is not None and want is not None and got != want for got, want in zip(tokens, wanted, strict=True)
        ),
        "prompt_tokens": total_of(each.usage_count("prompt_tokens") for each in outcome.succeeded),
        "cached_tokens": cached_tokens(outcome),
        "prefix_cache_queries": None if looked_up is None else looked_up[0],
        "prefix_cache_hits": None if looked_up is None else looked_up[1],
        "draft_tokens": None if drafts is None else drafts[0],
        "accepted_draft_tokens": None if drafts is None else drafts[1],
        "ttft_by_turn_ms": _ttft_by_turn_ms(outcome),
        "empty_chunk_before_text_ms": _spread_ms(Spread(tuple(_empty_before_text_s(outcome.succeeded)))),
        "guidellm_time_per_output_token_ms": _spread_ms(Spread(tuple(time_per_output_token_s(each) for each in samples))),
    }


def drafted_and_accepted(outcome: Outcome) -> tuple[int, int] | None:
    """Return the draft tokens that were verified and those that were right: of the server's counters, else of the replies' usage.

    None where neither tells.
    """
    counted = drafts_between(outcome.before, outcome.after)
    if counted is not None:
        return counted.tokens, counted.accepted
    accepted, rejected = (_detail(outcome, f"{what}_prediction_tokens") for what in ("accepted", "rejected"))
    return None if accepted is None else (accepted + (rejected or 0), accepted)


def cached_tokens(outcome: Outcome) -> int | None:
    """Return prompt tokens that replies say were cached; None where none says so."""
    return total_of(each.usage_detail("prompt_tokens_details", "cached_tokens") for each in outcome.succeeded)


def _detail(outcome: Outcome, name: str) -> int | None:
    return total_of(each.usage_detail("completion_tokens_details", name) for each in outcome.succeeded)


def _ttft_by_turn_ms(outcome: Outcome) -> list[float]:
    """Return the median time to the first token of the first turns, the second ones, and so on."""
    by_turn = dict[int, list[float]]()
    for each in outcome.succeeded:
        if each.text_times_s:
            by_turn.setdefault(each.turn, []).append(each.text_times_s[0] - each.started_s)
    return [1000 * Spread(tuple(by_turn[turn])).median for turn in sorted(by_turn)]


def _empty_before_text_s(replies: Sequence[Reply]) -> Iterator[float]:
    """Yield how long before its first text a stream brought a chunk without any, which vLLM's rules take for the first token."""
    for each in replies:
        if each.text_times_s:
            yield each.text_times_s[0] - each.choice_times_s[0]


def _spread_ms(spread: Spread) -> dict[str, float]:
    values = {"mean": spread.mean, "median": spread.median, "p99": spread.percentile(99), "max": max(spread.values, default=0.0)}
    return {name: 1000 * value for name, value in values.items()}


def _counted(errors: Sequence[str]) -> dict[str, int]:
    return {error: errors.count(error) for error in dict.fromkeys(errors)}


def _prompt_tokens(reply: Reply) -> int:
    return reply.usage_count("prompt_tokens") or 0


def _input_len(reply: Reply) -> int:
    return _prompt_tokens(reply) or reply.prompt_len or 0


def _spell_rate(rate: float) -> float | str:
    """Return a rate as JSON can hold it."""
    return "inf" if math.isinf(rate) else rate


def parse_limits(text: str) -> dict[str, float]:
    """Read limits of goodput, such as `ttft:200,tpot:50`, in milliseconds. Raises ValueError that says what was expected."""
    found = dict[str, float]()
    for pair in text.replace(",", " ").split():
        name, _, value = pair.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in GOODPUT or name in found or not 0 < limit < math.inf:
            raise ValueError(f"expected limits in ms such as ttft:200,tpot:50,e2el:4000, each once, found {pair!r}")
        found[name] = limit
    return found
