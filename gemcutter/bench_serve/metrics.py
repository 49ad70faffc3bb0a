"""The arithmetic of a run, under sglang's rules and under vLLM's, which differ in what counts as a chunk.

Owns the definitions, as pure functions of replies; seconds throughout. Refuses to know names of fields; read `report.py` for
them.

| | sglang.bench_serving 0.5.23 | vllm bench serve 0.32 |
|---|---|---|
| first token | first chunk whose text or reasoning is not empty | first chunk that carries a choice, of empty text, too |
| ITL | gaps between such chunks | gaps between chunks with a choice, the one of finish_reason among them |
| E2E | until the last line, usage and [DONE] among them | until the last chunk with a choice |
| tokens of a reply | usage, else as many as were asked for | usage, else the text encoded again, else 1 |
| TPOT | (E2E - TTFT) / (tokens - 1), of replies of more than one token | the same; a reply of one token has 0 for goodput |

Chunks may hold several tokens, so ITL is the time between chunks. guidellm's time per output token contains the first one:
`time_per_output_token_s`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from gemcutter.bench_serve.load import Run
from gemcutter.bench_serve.reply import Reply

Rules = Literal["sglang", "vllm"]
GOODPUT = ("ttft", "tpot", "e2el")  # measures that may have a limit
KEEPS_UP = 0.9  # share of the rate of a server that keeps up, below which one is overloaded
QUICK = 25  # percentile of E2E that stands for a request which waits for no other


@dataclass(frozen=True, slots=True)
class Sample:
    """One reply under one tool's rules. `chunks_s` are the times of its chunks after it was sent."""

    ttft_s: float
    e2e_s: float
    output_len: int
    chunks_s: tuple[float, ...]
    start_s: float

    @property
    def itls_s(self) -> list[float]:
        """Return the gaps between chunks."""
        return [later - earlier for earlier, later in pairwise(self.chunks_s)]

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time of a token after the first one; None for a reply of one token."""
        return (self.e2e_s - self.ttft_s) / (self.output_len - 1) if self.output_len > 1 else None

    def value_s(self, measure: str) -> float:
        """Return what a limit of goodput is compared with."""
        return {"ttft": self.ttft_s, "tpot": self.tpot_s or 0.0, "e2el": self.e2e_s}[measure]


def sample(reply: Reply, rules: Rules, count: Callable[[str], int] | None = None) -> Sample:
    """Return a successful reply as a tool would have seen it; `count` returns how many tokens a text has."""
    times = reply.text_times_s if rules == "sglang" else reply.choice_times_s
    chunks_s = tuple(time_s - reply.started_s for time_s in times)
    end_s = reply.ended_s - reply.started_s if rules == "sglang" else max(chunks_s, default=0.0)
    return Sample(chunks_s[0] if chunks_s else 0.0, end_s, _output_len(reply, rules, count), chunks_s, reply.started_s)


def _output_len(reply: Reply, rules: Rules, count: Callable[[str], int] | None) -> int:
    told = reply.usage_count("completion_tokens")
    if told:
        return told
    if rules == "sglang":
        return (reply.wanted_len or 0) if told is None else told
    return count(reply.text) if count is not None else 1


def time_per_output_token_s(found: Sample) -> float:
    """Return guidellm's measure of this name: the whole time until the last chunk over all tokens, the first one included."""
    return max(found.chunks_s, default=0.0) / max(found.output_len, 1)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median, standard deviation and percentiles of some values; all 0 where there are none, as both tools have it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean."""
        return float(np.mean(self.values or 0))

    @property
    def median(self) -> float:
        """Return the median."""
        return float(np.median(self.values or 0))

    @property
    def std(self) -> float:
        """Return the standard deviation of the values themselves (divided by n)."""
        return float(np.std(self.values or 0))

    def percentile(self, percent: float) -> float:
        """Return a percentile, interpolated linearly."""
        return float(np.percentile(self.values or 0, percent))


@dataclass(frozen=True, slots=True)
class Measures:
    """A run under one tool's rules."""

    samples: tuple[Sample, ...]
    duration_s: float

    @property
    def spreads(self) -> dict[str, Spread]:
        """Return the four measures by vLLM's names."""
        tpots = [each.tpot_s for each in self.samples]
        return {
            "ttft": Spread(tuple(each.ttft_s for each in self.samples)),
            "tpot": Spread(tuple(each for each in tpots if each is not None)),
            "itl": Spread(tuple(gap for each in self.samples for gap in each.itls_s)),
            "e2el": Spread(tuple(each.e2e_s for each in self.samples)),
        }

    @property
    def output_tokens(self) -> int:
        """Return the tokens of all replies."""
        return sum(each.output_len for each in self.samples)

    @property
    def concurrency(self) -> float:
        """Return how many requests the server had on average."""
        return sum(each.e2e_s for each in self.samples) / self.duration_s

    def good(self, limits_ms: Mapping[str, float]) -> int:
        """Return how many replies meet all limits."""
        return sum(all(each.value_s(name) * 1000 <= limit for name, limit in limits_ms.items()) for each in self.samples)

    def most_chunks_per_s(self) -> float:
        """Return the most chunks of one second, counted in whole seconds after the first request; both tools call them tokens."""
        if not self.samples:
            return 0.0
        first_s = min(each.start_s for each in self.samples)
        seconds = [int(each.start_s + chunk_s - first_s) for each in self.samples for chunk_s in each.chunks_s]
        return float(np.bincount(seconds).max()) if seconds else 0.0

    def most_at_once(self) -> int:
        """Return the most requests that the server had at a time."""
        edges = sorted(edge for each in self.samples for edge in ((each.start_s, 1), (each.start_s + each.e2e_s, -1)))
        return int(np.cumsum([step for _, step in edges]).max()) if edges else 0


def measure(run: Run, rules: Rules, count: Callable[[str], int] | None = None) -> Measures:
    """Return a run's successful replies under one tool's rules."""
    return Measures(tuple(sample(each, rules, count) for each in run.replies if each.is_success), run.duration_s)


def total_of(counts: Iterable[int | None]) -> int | None:
    """Return the sum of what servers told; None where none told anything."""
    known = [each for each in counts if each is not None]
    return sum(known) if known else None


@dataclass(frozen=True, slots=True)
class Pace:
    """The load that was offered beside what was served, in requests a second.

    `offered` is None where all were sent at once. `keeping_up` is the rate of a server that answers the last request as quickly
    as it does the quickest quarter of all: a finite run ends later than its last arrival on any server. It is None where nothing
    was offered at a rate: all at once, or turns that wait for each other.
    """

    offered: float | None
    served: float
    keeping_up: float | None

    @property
    def is_overloaded(self) -> bool:
        """Return whether requests came faster than they were served, so that the latencies are those of a queue."""
        return self.keeping_up is not None and self.served < KEEPS_UP * self.keeping_up


def pace(run: Run, rate: float) -> Pace:
    """Compare what was offered at `rate` requests a second with what was served."""
    found = measure(run, "sglang")
    served = len(found.samples) / run.duration_s
    offered = None if math.isinf(rate) else rate
    if offered is None or not found.samples or any(each.turn for each in run.replies):
        return Pace(offered, served, None)
    quick_s = found.spreads["e2el"].percentile(QUICK)
    return Pace(offered, served, len(found.samples) / (max(run.arrivals_s) + quick_s))


def delays_s(replies: Sequence[Reply]) -> tuple[Spread, Spread]:
    """Return how late the client's own loop came to requests, and how long they waited for the limit on concurrency."""
    late = tuple(max(0.0, each.dispatched_s - each.due_s) for each in replies)
    return Spread(late), Spread(tuple(each.started_s - each.dispatched_s for each in replies))
