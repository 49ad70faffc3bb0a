"""A budget of thought tokens ends thoughts, counts all of a reply, and leaves everything else alone."""

from __future__ import annotations

import pytest
import torch

import gemcutter
from gemcutter.engine.thinking_budget import ThinkingBudget

OPEN, CLOSE, CALL, TURN = 100, 101, 48, 105
BUDGET = ThinkingBudget(3, OPEN, CLOSE, frozenset({CALL, TURN}))


@pytest.mark.parametrize(
    ("prompt", "reply", "spent", "is_open"),
    [
        ([TURN, 1], [], 0, False),
        ([TURN, OPEN, 1], [], 0, True),
        ([TURN, OPEN, 1], [7, 8], 2, True),
        ([OPEN, CLOSE, 1], [7, 8], 0, False),
        ([OPEN, TURN], [7], 0, False),
        ([OPEN, CALL], [7], 0, False),
        ([TURN], [OPEN, 7, 8, CLOSE, 9], 2, False),
        ([TURN], [1, OPEN, 7, CLOSE, 9, OPEN, 8, 8], 3, True),
        ([TURN], [OPEN, 7, CALL, 9, 9], 1, False),
        ([TURN], [OPEN, 7, OPEN, 8], 2, True),
        ([TURN], [OPEN, CLOSE, OPEN], 0, True),
        ([TURN], [CLOSE, CLOSE], 0, False),
    ],
)
def test_thought_tokens_are_counted(prompt: list[int], reply: list[int], spent: int, is_open: bool) -> None:
    assert BUDGET.spent(prompt, reply) == (spent, is_open)


def allowed(reply: list[int]) -> list[int]:
    logits = BUDGET([TURN], reply, torch.full((110,), -1.0))
    return torch.isfinite(logits).nonzero().flatten().tolist()


def test_the_closing_marker_is_forced_when_the_budget_is_spent() -> None:
    everything = list(range(110))
    assert allowed([OPEN, 7, 8]) == everything
    assert allowed([OPEN, 7, 8, 9]) == [CLOSE]
    assert allowed([OPEN, 7, 8, 9, CLOSE]) == [id for id in everything if id != OPEN]


def test_a_model_that_thinks_is_made_to_answer() -> None:
    """The demo model is made to think on by a bias; with a budget it closes its thought in time."""
    with gemcutter.load("demo") as model:
        opening, closing = model.tokenizer.id_of("<|channel>"), model.tokenizer.id_of("<channel|>")
        assert opening is not None
        assert closing is not None
        budget = ThinkingBudget(5, opening, closing)
        prompt = [*model.encode([{"role": "user", "content": "Hi"}]), opening]
        prepared = {"max_tokens": 12, "ignore_eos": True, "logit_bias": {closing: -100.0}}
        free, held = (model.generate([prompt], logits_processors=p, **prepared)[0] for p in ((), (budget,)))
    assert closing not in free.tokens
    assert held.tokens[:5] == free.tokens[:5]
    assert held.tokens[5] == closing
