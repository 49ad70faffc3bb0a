"""What a run came to: means with intervals, shares of what went wrong, and the tokens that reuse has spared.

Owns the summary of records and its table; refuses to know models. Read `records.py` for a record, `statistics.py` for intervals.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcutter.evals.perplexity import exponential
from gemcutter.evals.records import Record
from gemcutter.evals.statistics import Z_95, weighted_mean, wilson

LOSS, EXPONENTIAL = "nll", "perplexity"  # the metric that is a loss, and what its mean is told as, too


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric's mean over all items, or over all things that they ask for, with an interval of 95 percent.

    Items that failed count as 0. Where every item is right or wrong the interval is Wilson's, else the normal distribution's. Of
    a loss the items that failed are left out, and its exponential is a mean of its own.
    """

    name: str
    mean: float
    low: float
    high: float
    error: float  # the standard error as lm-eval gives it

    def as_json(self) -> dict[str, float]:
        """Return the mean as JSON has it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "standard_error": self.error}


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to."""

    items: int
    means: tuple[Mean, ...]
    subjects: Mapping[str, tuple[int, float]]  # items, and the mean of the first metric
    failed: int
    unparsed: int
    truncated: int
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int
    output_tokens: int

    def as_json(self) -> dict[str, Any]:
        """Return the summary as JSON has it."""
        return {
            "items": self.items,
            "metrics": {each.name: each.as_json() for each in self.means},
            "subjects": {name: {"items": count, "mean": mean} for name, (count, mean) in self.subjects.items()},
            **{name: getattr(self, name) for name in ("failed", "unparsed", "truncated")},
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "predicted_tokens": self.predicted_tokens,
            "output_tokens": self.output_tokens,
        }


def summarize(records: Sequence[Record]) -> Summary:
    """Return what records come to; those with an error count as wrong in every metric."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    headline = names[0] if names else ""
    subjects = dict[str, list[Record]]()
    for record in records:
        subjects.setdefault(record.subject, []).append(record)
    answered = [record for record in records if record.error is None]
    return Summary(
        items=len(records),
        means=tuple(mean for name in names for mean in means_of(name, records)),
        subjects={
            name: (len(of_subject), means_of(headline, of_subject)[0].mean)
            for name, of_subject in sorted(subjects.items(), key=_order)
        },
        failed=len(records) - len(answered),
        unparsed=sum(record.extracted is None for record in answered),
        truncated=sum(record.finish == "length" for record in answered),
        prompt_tokens=sum(record.prompt_tokens for record in records),
        cached_tokens=sum(record.cached_tokens for record in records),
        predicted_tokens=sum(record.predicted_tokens for record in records),
        output_tokens=sum(record.output_tokens for record in records),
    )


def _order(subject: tuple[str, Any]) -> tuple[int, str]:
    """Return what subjects are sorted by: numbers by their size, before names."""
    name = subject[0]
    return (int(name), "") if name.isdecimal() else (sys.maxsize, name)


def _values(records: Sequence[Record], name: str) -> list[float]:
    """Return a metric's values, one for each item, or for each thing that an item asks for where those are counted."""
    found = list[float]()
    for record in records:
        value, count = record.metrics.get(name, 0.0), record.counts.get(name)
        right = None if count is None else round(value * count)
        found += [value] if right is None or count is None else [1.0] * right + [0.0] * (count - right)
    return found


def means_of(name: str, records: Sequence[Record]) -> list[Mean]:
    """Return the mean of a metric, and of a loss its exponential, too."""
    if name == LOSS:
        counted = [record for record in records if record.error is None]
        values, weights = [record.metrics[name] for record in counted], [float(record.counts[name]) for record in counted]
    else:
        values = _values(records, name)
        weights = [1.0] * len(values)
    mean, error = weighted_mean(values, weights)
    if set(values) <= {0.0, 1.0}:
        low, high = wilson(math.fsum(values), len(values))
    else:
        low, high = mean - Z_95 * error, mean + Z_95 * error
    found = [Mean(name, mean, low, high, error)]
    if name == LOSS:
        found.append(Mean(EXPONENTIAL, exponential(mean), exponential(low), exponential(high), exponential(mean) * error))
    return found


def spell(header: Mapping[str, Any], found: Summary, seconds: float | None = None) -> Iterable[str]:
    """Yield the lines that a reader is shown: what was done first, since numbers of other modes can't be compared."""
    yield f"{header['task']}/{header['mode']}  {header['about']}"
    yield f"prompt      {header['prompt_id']}, {_spell_how(header)}"
    for each in found.means:
        yield f"{each.name:<11} {each.mean:.4f}  [{each.low:.4f}, {each.high:.4f}]  standard error {each.error:.4f}"
    yield f"items       {found.items}{_spell_choice(header)}"
    shares = [f"{name} {count} ({count / max(found.items, 1):.1%})" for name, count in _wrong(header, found)]
    yield f"not right   {', '.join(shares)}"
    if found.prompt_tokens:
        reused, could = found.cached_tokens / found.prompt_tokens, found.predicted_tokens / found.prompt_tokens
        yield f"prompts     {found.prompt_tokens} tokens, {reused:.1%} of them reused; {could:.1%} began an earlier prompt"
    if found.output_tokens:
        yield f"replies     {found.output_tokens} tokens"
    if seconds is not None:
        yield f"time        {seconds:.1f} s"
    if len(found.subjects) > 1:
        width = max(map(len, found.subjects))
        for name, (count, mean) in found.subjects.items():
            yield f"  {name:<{width}}  {count:>5}  {mean:.4f}"


def _wrong(header: Mapping[str, Any], found: Summary) -> list[tuple[str, int]]:
    counts = [("failed", found.failed)]
    if header["how"] == "generate" and header["max_tokens"] > 1:
        counts = [("truncated", found.truncated), *counts]
    if header["how"] == "generate":
        counts = [("unparsed", found.unparsed), *counts]
    return counts


def _spell_how(header: Mapping[str, Any]) -> str:
    words = ["chat template" if header["is_chat"] else "raw text"]
    if header.get("template_sha256"):
        words.append(f"template {header['template_sha256'][:12]}")
    if header.get("shots"):
        words.append(f"{header['shots']} examples")
    if header["how"] == "generate":
        sampling = ", ".join(f"{name} {value}" for name, value in header["sampling"].items())
        words += [f"thinking {'on' if header['think'] else 'off'}", sampling, f"at most {header['max_tokens']} tokens"]
    else:
        words.append("log-likelihoods")
    return ", ".join(words)


def _spell_choice(header: Mapping[str, Any]) -> str:
    words = list[str]()
    if header.get("limit") is not None:
        words.append(f"drawn with seed {header['seed']}")
    if header.get("subjects"):
        words.append(f"of {', '.join(header['subjects'])}")
    return f", {' '.join(words)}" if words else ""
