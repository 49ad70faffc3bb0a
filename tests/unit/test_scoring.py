"""Continuations and their log-probabilities: against the whole prompt's report, in batches, over the prefix cache, and in errors.

Read `tests/evals/test_agreement.py` for transformers' and lm-eval's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import gemcutter
from gemcutter.errors import RequestError
from gemcutter.scoring import Pair, encode_pair, score_pairs
from tests.topologies import prompt
from tests.unit.test_scheduler import ask, assert_no_leaks, make_engine

CONTEXTS = ("The lamp stood in the window", "A", "In the beginning God created the heaven and the earth. " * 9, "")
CONTINUATIONS = (" and", " of the house.", " of the hill", "\n\nAnd the earth was without form", "  x")


@pytest.fixture(scope="module")
def model() -> Iterator[gemcutter.Model]:
    with gemcutter.load("demo", dtype="float32", kernels="reference") as loaded:
        yield loaded


def report(model: gemcutter.Model, pair: Pair) -> list[float]:
    """Return the log-probabilities of a continuation from the report on all rows, computed by itself."""
    whole = [*pair.context, *pair.continuation]
    (found,) = model.generate([whole], max_tokens=0, prompt_logprobs=0, cache_salt="nobody else")
    return [each.logprob for each in found.prompt.logprobs[len(pair.context) - 1 :]]


def test_scores_are_those_of_the_whole_prompts_report(model: gemcutter.Model) -> None:
    """In a batch whose rows are shared and cut off, every log-probability is the same number to rounding."""
    asked = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    for asked_pair, found in zip(asked, model.score_all(asked), strict=True):
        pair = model.encode_pair(*asked_pair)
        expected = report(model, pair)
        assert found.tokens == pair.continuation
        assert found.logprobs == pytest.approx(expected, abs=2e-4, rel=2e-5)
        assert found.logprob == pytest.approx(sum(expected), abs=1e-3)


def test_greedy_text_is_greedy_and_other_text_is_not(model: gemcutter.Model) -> None:
    (reply,) = model.generate(["The lamp"], max_tokens=6, temperature=0, ignore_eos=True)
    context, tokens = list(reply.prompt_tokens), list(reply.tokens)
    assert model.score(context, tokens).is_greedy
    for place in range(len(tokens)):
        other = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
        assert not model.score(context, other).is_greedy, place


def test_choices_of_one_token_take_one_row(model: gemcutter.Model) -> None:
    """Four letters after one context are one request; so are continuations that differ in their last token."""
    context = tuple(model.encode("Which of these is an animal?\nAnswer:", add_generation_prompt=True))
    pairs = [Pair(context, (7, 8, last)) for last in (300, 301, 302)] + [Pair(context, (last,)) for last in (300, 301)]
    found = dict(score_pairs(model.loop, pairs, in_flight=8, salt="rows"))
    rows = [found[index].cached_tokens + found[index].computed_tokens for index in range(len(pairs))]
    assert rows == [len(context) + 2, 0, 0, len(context), 0]
    assert len({found[index].logprobs[:2] for index in range(3)}) == 1
    assert len({found[index].logprobs[2] for index in range(3)}) == 3


def test_a_long_context_is_computed_once(model: gemcutter.Model) -> None:
    page = model.engine.scheduler.prefix.page_tokens
    context = tuple(model.encode("In the beginning God created the heaven and the earth. " * 20))
    pairs = [Pair(context, tuple(range(first, first + 5))) for first in range(300, 320, 5)]
    found = dict(score_pairs(model.loop, pairs, in_flight=8, salt="long"))
    computed = sum(each.computed_tokens for each in found.values())
    assert computed <= len(context) + len(pairs) * (page + 5)
    assert sum(each.cached_tokens for each in found.values()) >= (len(pairs) - 1) * (len(context) - page)


@pytest.mark.parametrize("first", [1, 2, 9, 30, 39, 40])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_report_begins_where_it_was_asked_to(first: int, rows: int) -> None:
    """However a prompt is cut into steps and whatever of it is cached, rows from the first on are reported, and no others."""
    request = ask(prompt(40, 3), 0, prompt_logprobs=1, next_logprobs=(5, 6), top_logits=2)
    engine = make_engine(max_rows=rows, checkpoints=20)
    whole = _run(engine, request)
    engine = make_engine(max_rows=rows, checkpoints=20)
    _run(engine, ask(prompt(40, 3), 0))
    part = _run(engine, replace(request, prompt_logprobs_from=first))
    assert len(whole.logprobs) == 39
    assert [each.token for each in part.logprobs] == [each.token for each in whole.logprobs[first - 1 :]]
    for found, expected in zip(part.logprobs, whole.logprobs[first - 1 :], strict=True):
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert found.top[0][0] == expected.top[0][0]
    assert part.next_logprobs == pytest.approx(whole.next_logprobs, abs=1e-4)
    assert part.cached_tokens <= first - 1
    assert_no_leaks(engine)


def _run(engine: Any, request: gemcutter.Request) -> Any:
    reports = list[Any]()
    engine.submit(request)
    while engine.has_work:
        reports += [event.prompt for event in engine.step() if event.prompt is not None]
    (found,) = reports
    return found


def test_the_border_is_lm_evals(model: gemcutter.Model) -> None:
    """Spaces at a context's end belong to what follows; a token over the border is noted."""
    spaced, plain = encode_pair(model.tokenizer, "A lamp ", "and"), encode_pair(model.tokenizer, "A lamp", " and")
    assert spaced == plain
    assert plain.is_clean
    assert plain.context[0] == model.tokenizer.bos_id
    torn = encode_pair(model.tokenizer, "A lam", "p and")
    assert torn.is_clean == (list(torn.context + torn.continuation) == model.encode("A lamp and"))
    assert encode_pair(model.tokenizer, "<bos>A", " b").context.count(model.tokenizer.bos_id) == 1
    assert encode_pair(model.tokenizer, "", "word").context == (model.tokenizer.bos_id,)


def test_a_conversation_is_scored_by_its_answer(model: gemcutter.Model) -> None:
    asked = [{"role": "user", "content": "Say A or B."}]
    found = model.score(asked, "A")
    assert found.tokens == tuple(model.tokenizer.encode("A", bos=False))
    assert found.logprobs == pytest.approx(report(model, Pair(tuple(model.encode(asked)), found.tokens)), abs=1e-4)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("A", ""), "no tokens"),
        (([1, 2], []), "no tokens"),
        (([], [1]), "empty"),
        (([1, 10**9], [1]), "outside the vocabulary"),
        (([1], [10**9]), "outside the vocabulary"),
        ((["x"], " a"), "expected text, a list of token ids or a list of messages"),
        (([5] * 200_000, [5, 5]), "the context holds"),
    ],
)
def test_what_can_not_be_scored_is_refused(model: gemcutter.Model, pair: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        model.score(*pair)
    assert model.score("A", " b").logprob < 0, "the model goes on"


@pytest.mark.parametrize("first", [0, -1, 5, "1", 1.0, True])
def test_positions_outside_the_prompt_are_refused(first: Any) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs_from"):
        make_engine().check(ask([1, 2, 3, 4], 0, prompt_logprobs=0, prompt_logprobs_from=first))
