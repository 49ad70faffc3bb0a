"""Two runs of the same items, item by item: which of them flipped, and whether that may be chance.

Owns the comparison and its table; refuses to know models. Read `statistics.py` for McNemar's test, `cli/eval_compare.py` for who
asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.evals.records import Record, RunFile
from gemcutter.evals.report import LOSS, Mean, means_of
from gemcutter.evals.statistics import Z_95, mcnemar, weighted_mean

SAME = ("task", "mode", "prompt_id", "items_sha256")  # of two headers, or the numbers are of different things
SHOWN = 20  # flipped items in a table; JSON has all


@dataclass(frozen=True, slots=True)
class Flip:
    """An item that only one of the runs has right; the answers are what was read out of the replies."""

    id: str
    gold: Any
    first: Any
    second: Any
    is_gain: bool  # the second is right


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs come to, on the metric that is the task's headline.

    `difference` is the second mean less the first, with its interval of 95 percent and its standard error over pairs of answers
    to one item. `p` is McNemar's, exact, over the `flips`; None where answers are more than right or wrong. `failed` counts items
    that failed in either run, which count as wrong; of a loss they are left out of both. `settings` are what the headers have
    that differs.
    """

    metric: str
    items: int
    first: Mean
    second: Mean
    difference: Mean
    both: int
    neither: int
    flips: tuple[Flip, ...]
    p: float | None
    failed: int
    settings: Mapping[str, tuple[Any, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON has it."""
        gains = sum(flip.is_gain for flip in self.flips)
        return {
            "metric": self.metric,
            "items": self.items,
            "first": self.first.as_json(),
            "second": self.second.as_json(),
            "difference": self.difference.as_json(),
            "both_right": self.both,
            "neither_right": self.neither,
            "only_first_right": len(self.flips) - gains,
            "only_second_right": gains,
            "mcnemar_p": self.p,
            "failed": self.failed,
            "flips": [
                {"id": flip.id, "gold": flip.gold, "first": flip.first, "second": flip.second, "gain": flip.is_gain}
                for flip in self.flips
            ],
            "settings": {name: list(pair) for name, pair in self.settings.items()},
        }


def compare(first: RunFile, second: RunFile) -> Comparison:
    """Compare two runs. Raises RequestError where they are not of the same items, or one is not complete."""
    _insist_comparable(first, second)
    pairs = [(record, second.records[id]) for id, record in first.records.items()]
    names = list(dict.fromkeys(name for pair in pairs for record in pair for name in record.metrics))
    if not names:
        raise RequestError("every item of both runs failed, so there is nothing to compare")
    metric = names[0]
    failed = sum(any(record.error is not None for record in pair) for pair in pairs)
    if metric == LOSS:
        pairs = [pair for pair in pairs if all(record.error is None for record in pair)]
    values = [(one.metrics.get(metric, 0.0), other.metrics.get(metric, 0.0)) for one, other in pairs]
    is_binary = metric != LOSS and {value for pair in values for value in pair} <= {0.0, 1.0}
    flips = [_flip(pair) for pair, (one, other) in zip(pairs, values, strict=True) if is_binary and one != other]
    gains = sum(flip.is_gain for flip in flips)
    change, error = weighted_mean([other - one for one, other in values], [float(one.counts.get(metric, 1)) for one, _ in pairs])
    return Comparison(
        metric=metric,
        items=len(first.records),
        first=means_of(metric, [one for one, _ in pairs])[0],
        second=means_of(metric, [other for _, other in pairs])[0],
        difference=Mean("difference", change, change - Z_95 * error, change + Z_95 * error, error),
        both=sum(is_binary and pair == (1.0, 1.0) for pair in values),
        neither=sum(is_binary and pair == (0.0, 0.0) for pair in values),
        flips=tuple(flips),
        p=mcnemar(len(flips) - gains, gains) if is_binary else None,
        failed=failed,
        settings=_settings(first.header, second.header),
    )


def _insist_comparable(first: RunFile, second: RunFile) -> None:
    for name in SAME:
        one, other = first.header.get(name), second.header.get(name)
        if one != other:
            what = (
                "the prompts of their items differ"
                if name == "items_sha256"
                else f"{name} is {one!r} in one, {other!r} in the other"
            )
            raise RequestError(f"the runs can't be compared: {what}; ask both with the same task, mode, seed, limit and data")
    for run, which in ((first, "first"), (second, "second")):
        if (count := len(run.records)) != run.header["items"]:
            raise RequestError(
                f"the {which} run has {count} of its {run.header['items']} items; the command that began it completes it"
            )
    if first.records.keys() != second.records.keys():
        raise RequestError("the runs can't be compared: their records have different ids")


def _flip(pair: tuple[Record, Record]) -> Flip:
    one, other = pair
    return Flip(one.id, one.gold, one.extracted, other.extracted, other.metrics.get(next(iter(other.metrics), ""), 0.0) == 1.0)


def _settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two headers have that differs, the parts of "measured" by their own names."""
    one, other = ({**header, **header.get("measured", {})} for header in (first, second))
    names = [name for name in {**one, **other} if name != "measured" and one.get(name) != other.get(name)]
    return {name: (one.get(name), other.get(name)) for name in names}


def spell(header: Mapping[str, Any], found: Comparison) -> Iterable[str]:
    """Yield the lines that a reader is shown."""
    yield f"{header['task']}/{header['mode']}  {found.metric} of {found.items} items, failed in either {found.failed}"
    for name, (one, other) in found.settings.items():
        yield f"{name:<11} {one} | {other}"
    for label, mean in (("first", found.first), ("second", found.second), ("difference", found.difference)):
        sign = "+" if label == "difference" else ""
        yield f"{label:<11} {mean.mean:{sign}.4f}  [{mean.low:{sign}.4f}, {mean.high:{sign}.4f}]  standard error {mean.error:.4f}"
    if found.p is None:
        yield "no test     answers are more than right or wrong; see the difference's interval"
        return
    gains = sum(flip.is_gain for flip in found.flips)
    lost = len(found.flips) - gains
    only = f"only in the first {lost}, only in the second {gains}"
    yield f"items       right in both {found.both}, {only}, in neither {found.neither}"
    yield f"McNemar     p = {found.p:.4g}, exact"
    for flip in found.flips[:SHOWN]:
        yield f"  {flip.id}: {_spell(flip.first)} -> {_spell(flip.second)}, right is {_spell(flip.gold)}"
    if len(found.flips) > SHOWN:
        yield f"  and {len(found.flips) - SHOWN} more; --json lists all"


def _spell(answer: Any) -> str:
    text = repr(answer)
    return text if len(text) <= 60 else f"{text[:57]}..."
