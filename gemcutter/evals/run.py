"""One task in one mode on one model, from its items to a written record of each.

Owns which items are asked, how many at a time, and what the log is told; refuses to know tasks. Items that can't be asked,
because they are too long or hold what the model can't read, are recorded with the reason, and the run goes on. Read `records.py`
for the file, `report.py` for the table.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gemcutter.errors import GemcutterError, RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.records import Log, Record, sha256_of
from gemcutter.evals.task import Asked, Item, Mode, Reply, Task
from gemcutter.scoring import Pair, check_pairs, score_pairs

if TYPE_CHECKING:
    from gemcutter.api import Model
    from gemcutter.completion import Completion, Stream

STRIDE = 8  # tokens
AT_A_TIME = 64  # items whose choices are scored together

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class How:
    """What a run asks of the model beside the mode: thinking, a cap of its own, sampling that replaces the mode's."""

    think: bool = False
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def cap(self, mode: Mode) -> int:
        """Return the most tokens of a reply."""
        return mode.max_tokens if self.max_tokens is None else self.max_tokens


def select(items: Sequence[Item], asked: Asked) -> list[Item]:
    """Return the items that are asked, in the order of the data. Raises RequestError for subjects that there are not.

    A limit draws items at random, since the files of most tasks are sorted by subject.
    """
    known = {item.subject for item in items}
    if unknown := [subject for subject in asked.subjects if subject not in known]:
        raise RequestError(f"no items of the subject {', '.join(unknown)}; subjects are: {', '.join(sorted(known))}")
    found = [item for item in items if not asked.subjects or item.subject in asked.subjects]
    twice = len(found) - len({item.id for item in found})
    if twice:
        raise RequestError(f"{twice} items have the id of another; ids must differ for runs to be compared")
    if not found:
        raise RequestError("the task has no items")
    if asked.limit is None or asked.limit >= len(found):
        return found
    return [found[index] for index in sorted(random.Random(asked.seed).sample(range(len(found)), asked.limit))]


def items_of(task: Task, data: Data, mode: Mode, asked: Asked) -> list[Item]:
    """Return the items of a run. Raises RequestError, also where a mode has nothing of what is asked."""
    if asked.extract is not None and asked.extract not in mode.rules:
        known = f"expected {' or '.join(mode.rules)}" if mode.rules else "this mode reads answers in one way only"
        raise RequestError(f"--extract {asked.extract}: {task.name}/{mode.name}: {known}")
    if asked.shots is not None and mode.shots is None:
        raise RequestError(f"--shots {asked.shots}: {task.name}/{mode.name} asks without examples")
    return select(list(task.items(data, mode, asked)), asked)


def run(model: Model, task: Task, mode: Mode, items: Sequence[Item], asked: Asked, how: How, log: Log, advance: Advance) -> float:
    """Ask all items that the log does not have, and write each down as it is answered; returns the seconds that took."""
    started, pending = time.perf_counter(), [item for item in items if item.id not in log.done]
    seen = SeenBeginnings()
    replies = _scored(model, mode, pending, seen) if mode.how == "score" else _generated(model, mode, pending, how, seen)
    done = len(items) - len(pending)
    for item, outcome, predicted in replies:
        log.append(_record(task, mode, asked, item, outcome, predicted))
        done += 1
        advance(done, len(items))
    return time.perf_counter() - started


def _record(task: Task, mode: Mode, asked: Asked, item: Item, outcome: Reply | GemcutterError, predicted: int) -> Record:
    """Judge a reply."""
    record = Record(item.id, item.subject, sha256_of(item.prompt), item.gold, predicted_tokens=predicted)
    if isinstance(outcome, GemcutterError):
        return replace(record, error=str(outcome))
    grade = task.grade(item, mode, outcome, asked)
    return replace(
        record,
        extracted=grade.extracted,
        metrics=dict(grade.metrics),
        counts=dict(grade.counts),
        reply=outcome.text,
        logprobs=outcome.logprobs,
        finish=outcome.finish,
        prompt_tokens=outcome.prompt_tokens,
        cached_tokens=outcome.cached_tokens,
        output_tokens=outcome.output_tokens,
    )


class SeenBeginnings:
    """How prompts have begun so far, in pieces of STRIDE tokens: what a prefix cache without bounds would spare."""

    def __init__(self) -> None:
        self._seen = set[int]()

    def predict(self, ids: Sequence[int], most: int) -> int:
        """Return how many of the first `most` tokens began an earlier prompt, too, and note this one's."""
        known, key, is_known = 0, 0, True
        for start in range(0, len(ids) - STRIDE + 1, STRIDE):
            key = hash((key, *ids[start : start + STRIDE]))
            is_known = is_known and key in self._seen
            known += STRIDE * is_known
            self._seen.add(key)
        return min(known, most)


Outcome = tuple[Item, Reply | GemcutterError, int]


def _scored(model: Model, mode: Mode, items: Sequence[Item], seen: SeenBeginnings) -> Iterator[Outcome]:
    """Yield items with the log-likelihoods of their choices."""
    for first in range(0, len(items), AT_A_TIME):
        pairs, owners = list[Pair](), list[int]()
        batch = items[first : first + AT_A_TIME]
        for place, item in enumerate(batch):
            try:
                found = [_pair(model, mode, item, choice) for choice in item.choices]
                check_pairs(model.engine, found)
            except GemcutterError as error:
                yield item, error, 0
            else:
                pairs += found
                owners += [place] * len(found)
        yield from _score_batch(model, batch, pairs, owners, seen)


def _pair(model: Model, mode: Mode, item: Item, choice: str | tuple[int, ...]) -> Pair:
    """Return the ids of a choice: it answers a conversation, follows raw text after a delimiter, and ids as it is."""
    is_after = isinstance(choice, str) and not mode.is_chat
    return model.encode_pair(item.prompt, f"{item.delimiter}{choice}" if is_after else choice)


def _score_batch(
    model: Model, items: Sequence[Item], pairs: Sequence[Pair], owners: Sequence[int], seen: SeenBeginnings
) -> Iterator[Outcome]:
    logprobs = [[0.0] * len(item.choices) for item in items]
    left = [owners.count(place) for place in range(len(items))]
    first = {owner: owners.index(owner) for owner in set(owners)}
    counts = [[0, 0, 0] for _ in items]  # cached, all, predicted
    rows = set[tuple[int, ...]]()
    for index, pair in enumerate(pairs):
        if (prompt := pair.context + pair.continuation[:-1]) not in rows:
            rows.add(prompt)
            counts[owners[index]][2] += seen.predict(prompt, len(pair.context) - 1)
    for index, score in score_pairs(model.loop, pairs, in_flight=model.in_flight):
        owner = owners[index]
        logprobs[owner][index - first[owner]] = score.logprob
        counts[owner][0] += score.cached_tokens
        counts[owner][1] += score.cached_tokens + score.computed_tokens
        left[owner] -= 1
        if not left[owner]:
            cached, rows_in_all, predicted = counts[owner]
            reply = Reply(tuple(logprobs[owner]), prompt_tokens=rows_in_all, cached_tokens=cached)
            yield items[owner], reply, predicted


def _generated(model: Model, mode: Mode, items: Sequence[Item], how: How, seen: SeenBeginnings) -> Iterator[Outcome]:
    """Yield items with the texts that were generated, in their order; so many run at a time that every step is full."""
    running: deque[tuple[Item, Stream | GemcutterError, int]] = deque()
    try:
        for item in items:
            running.append(_start(model, mode, item, how, seen))
            if len(running) >= model.in_flight:
                yield _finish(*running.popleft())
        while running:
            yield _finish(*running.popleft())
    finally:
        for _, stream, _ in running:
            if not isinstance(stream, GemcutterError):
                stream.close()


def options_of(mode: Mode, item: Item, how: How) -> dict[str, Any]:
    """Return the options of an item's request."""
    found: dict[str, Any] = {**mode.sampling, **how.sampling, "max_tokens": how.cap(mode), "stop": list(mode.stop) or None}
    found |= {"seed": how.seed, **item.options}
    if mode.is_chat:
        found["enable_thinking"] = how.think
    return found


def _start(model: Model, mode: Mode, item: Item, how: How, seen: SeenBeginnings) -> tuple[Item, Stream | GemcutterError, int]:
    try:
        prepared = model.prepare(item.prompt, **options_of(mode, item, how))
    except GemcutterError as error:
        return item, error, 0
    ids = prepared.request.prompt
    return item, model.submit(prepared), seen.predict(ids, len(ids) - 1)


def _finish(item: Item, stream: Stream | GemcutterError, predicted: int) -> Outcome:
    if isinstance(stream, GemcutterError):
        return item, stream, 0
    try:
        found: Completion = stream.finish()
    except GemcutterError as error:
        return item, error, predicted
    reply = Reply(
        text=found.text,
        reasoning=found.reasoning,
        finish=found.finish_reason,
        tool_calls=found.tool_calls,
        prompt_tokens=len(found.prompt_tokens),
        cached_tokens=found.metrics.cached_tokens,
        output_tokens=len(found.tokens),
    )
    return item, reply, predicted
