"""What a server tells Prometheus, under the names that dashboards of vLLM know.

Owns a registry of its own, so that several servers may live in one process. Refuses to know requests beyond what is counted of
them. Read `service.py` for who counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from gemcutter.completion import Completion
from gemcutter.engine.stats import EngineStats

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)


class Metrics:
    """Counters, gauges and histograms of one model."""

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series a counter that nobody reads
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self.running = self._gauge("num_requests_running", "Requests that the engine works on.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for the engine.")
        self.cache_usage = self._gauge("kv_cache_usage_perc", "Share of the cache's pages that are held, 0 to 1.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, cached ones included.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of replies.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found there.")
        self.preemptions = self._counter("num_preemptions", "Requests that gave their pages to others and began anew.")
        self.unreadable = self._counter("unreadable_tool_calls", "Tool calls that could not be read and became text.")
        self.drafts = self._counter("spec_decode_num_drafts", "Drafts that were verified.")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens of drafts that were verified.")
        self.accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Tokens of drafts that were right.")
        at = (*self._labels, "position")
        help = "Drafts that were right up to a position."
        self._accepted_at = Counter("vllm:spec_decode_num_accepted_tokens_per_pos", help, at, registry=self.registry)
        self.media_queries = self._counter("mm_cache_queries", "Images, frames and sounds looked up among those encoded lately.")
        self.media_hits = self._counter("mm_cache_hits", "Images, frames and sounds found there.")
        kinds = (*self._labels, "modality")
        self._media = Counter("vllm:mm_items", "Images, sounds and videos of requests.", kinds, registry=self.registry)
        self._media_known = (0, 0)
        self.rejections = self._counter("admission_rejections", "Requests turned away because too much waited.")
        names = (*self._labels, "finished_reason")
        self._success = Counter("vllm:request_success", "Requests that ended.", names, registry=self.registry)
        self.ttft = self._seconds("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token = self._seconds("inter_token_latency_seconds", "Between two tokens of a reply.")
        self.tpot = self._seconds("request_time_per_output_token_seconds", "Mean time between tokens of a reply.")
        self.e2e = self._seconds("e2e_request_latency_seconds", "From arrival to the last token.")
        self.queue = self._seconds("request_queue_time_seconds", "From arrival to the first prompt row.")
        self.prefill = self._seconds("request_prefill_time_seconds", "From the first prompt row to the first token.")
        self.inference = self._seconds("request_inference_time_seconds", "From the first prompt row to the last token.")
        self.decode = self._seconds("request_decode_time_seconds", "From the first token to the last.")
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.request_most = self._histogram("request_params_max_tokens", "Reply tokens that a request allowed.", TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", "Reply tokens of a request.", TOKENS)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, tuple(self._labels), buckets=buckets, registry=self.registry)
        return made.labels(**self._labels)

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, SECONDS)

    def finished(self, completion: Completion, reason: str) -> None:
        """Count a request that ended with a completion."""
        spent = completion.metrics
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self.prompt_tokens.inc(len(completion.prompt_tokens))
        self.generation_tokens.inc(len(completion.tokens))
        self.prefix_queries.inc(len(completion.prompt_tokens))
        self.prefix_hits.inc(spent.cached_tokens)
        self.request_prompt.observe(len(completion.prompt_tokens))
        self.request_generation.observe(len(completion.tokens))
        self.e2e.observe(spent.e2e_s)
        self.queue.observe(spent.queue_s)
        self.prefill.observe(spent.prefill_s)
        self.decode.observe(spent.decode_s)
        self.inference.observe(spent.prefill_s + spent.decode_s)
        self.unreadable.inc(completion.unreadable_calls)
        if spent.decode_tokens:
            self.tpot.observe(spent.tpot_s)

    def worked(self, before: EngineStats, now: EngineStats) -> None:
        """Count what an engine did between two snapshots."""
        self.preemptions.inc(now.preemptions - before.preemptions)
        self.drafts.inc(now.tally.bursts - before.tally.bursts)
        self.draft_tokens.inc(now.tally.drafted - before.tally.drafted)
        self.accepted_tokens.inc(now.tally.accepted - before.tally.accepted)
        for place, (first, last) in enumerate(zip(before.tally.accepted_at, now.tally.accepted_at, strict=True)):
            if now.tally.drafted:
                self._accepted_at.labels(**self._labels, position=str(place)).inc(last - first)

    def read_media(self, kinds: Iterable[str]) -> None:
        """Count media that a request brought and that could be read, by their kinds."""
        for kind in kinds:
            self._media.labels(**self._labels, modality=kind).inc()

    def looked_up(self, queries: int, hits: int) -> None:
        """Bring the counts of a reader of media up to date."""
        before, self._media_known = self._media_known, (queries, hits)
        self.media_queries.inc(queries - before[0])
        self.media_hits.inc(hits - before[1])

    def aborted(self) -> None:
        """Count a request that was cancelled or failed."""
        self._success.labels(**self._labels, finished_reason="abort").inc()

    def text(self, refresh: Callable[[Metrics], None]) -> bytes:
        """Return everything in Prometheus's format, the gauges refreshed."""
        refresh(self)
        return generate_latest(self.registry)
