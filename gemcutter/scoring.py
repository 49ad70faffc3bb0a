"""How likely texts are after others: pairs of ids in, their log-probabilities out.

Owns `Score`, the border between a context and what follows it, and which requests give the log-probabilities of many pairs with
the fewest rows. Refuses to know chat templates and tasks. Read `engine/request.py` for the reports that are asked for,
`api.py` for `Model.score`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from gemcutter.engine.engine import Engine
from gemcutter.engine.loop import EngineLoop, failure
from gemcutter.engine.request import PromptReport, Request, RequestEvent


class TextEncoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the ids of a text, with exactly one BOS before them if asked for."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A context and the tokens whose log-probabilities are wanted after it, neither of them empty.

    `is_clean` is False where a token of the whole text reaches over the border, so that the context's ids are not those with
    which the whole text begins.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    is_clean: bool = True


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is after its context.

    `logprob` is the natural logarithm of its probability, the sum of `logprobs`, one for each of `tokens`; it `is_greedy` where
    every token is the most likely one at its place. `cached_tokens` and `computed_tokens` are the context's and continuation's
    rows that were found in the prefix cache and computed for it; pairs that need the same rows count them once.
    """

    logprob: float
    is_greedy: bool
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int = 0
    computed_tokens: int = 0
    is_clean: bool = True


def encode_pair(tokenizer: TextEncoder, context: str, continuation: str) -> Pair:
    """Return the ids of two texts as lm-eval splits them: spaces at the context's end belong to the continuation.

    The context begins with <bos>; what the whole text has beyond as many ids as the context has is the continuation.
    """
    spaces = len(context) - len(context.rstrip())
    border = len(context) - spaces
    before, whole = context[:border], context + continuation
    ids, all_ids = tokenizer.encode(before), tokenizer.encode(whole)
    return Pair(tuple(ids), tuple(all_ids[len(ids) :]), all_ids[: len(ids)] == ids)


@dataclass(slots=True)
class _Rows:
    """Rows that pairs have in common, and which pairs: a continuation's last token needs no row of its own."""

    prompt: tuple[int, ...]
    first: int  # the position of the continuation's first token
    pairs: list[int]


def score_pairs(
    loop: EngineLoop, pairs: Sequence[Pair], *, in_flight: int, adapter: str | None = None, salt: str | None = None
) -> Iterator[tuple[int, Score]]:
    """Yield the place and the score of each pair, as they are found. Raises the GemcutterError of a request that failed.

    Pairs whose rows are equal take one request: the letters of a multiple choice are told apart by one row's logits. Others
    share the rows of equal contexts through the prefix cache, and rows before a continuation pass no layer that reads shared
    keys.
    """
    groups = _group(pairs)
    requests = (_request(group, pairs, adapter, salt) for group in groups)
    for place, events in loop.complete_each(requests, in_flight):
        if (error := events[-1].error) is not None:
            raise failure(error)
        group, report = groups[place], _report_of(events)
        computed = len(group.prompt) - report.cached_tokens
        for index, next_logprob in zip(group.pairs, report.next_logprobs, strict=True):
            found = _score(pairs[index], report, next_logprob)
            if index == group.pairs[0]:
                found = replace(found, cached_tokens=report.cached_tokens, computed_tokens=computed)
            yield index, found


def check_pairs(engine: Engine, pairs: Sequence[Pair]) -> None:
    """Raise RequestError, with every problem, where pairs can't be scored, such as those that are too long."""
    for group in _group(pairs):
        engine.check(_request(group, pairs, None, None))


def _group(pairs: Sequence[Pair]) -> list[_Rows]:
    """Return pairs by their rows, in the order in which these first come."""
    found = dict[tuple[tuple[int, ...], int], _Rows]()
    for index, pair in enumerate(pairs):
        prompt, first = pair.context + pair.continuation[:-1], len(pair.context)
        found.setdefault((prompt, first), _Rows(prompt, first, [])).pairs.append(index)
    return list(found.values())


def _request(group: _Rows, pairs: Sequence[Pair], adapter: str | None, salt: str | None) -> Request:
    return Request(
        group.prompt,
        max_tokens=0,
        prompt_logprobs=1 if group.first < len(group.prompt) else None,
        prompt_logprobs_from=group.first,
        next_logprobs=tuple(pairs[index].continuation[-1] for index in group.pairs),
        top_logits=1,
        adapter=adapter,
        cache_salt=salt,
    )


def _report_of(events: Iterable[RequestEvent]) -> PromptReport:
    return next(event.prompt for event in events if event.prompt is not None)


def _score(pair: Pair, report: PromptReport, next_logprob: float) -> Score:
    """Return the score of a pair from the report on its rows."""
    logprobs = (*(each.logprob for each in report.logprobs), next_logprob)
    best = (*(each.top[0][0] for each in report.logprobs), report.top_logits[0][0])
    return Score(sum(logprobs), best == pair.continuation, pair.continuation, logprobs, is_clean=pair.is_clean)
