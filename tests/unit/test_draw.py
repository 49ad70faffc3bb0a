"""Tokens chosen for many rows at once are the tokens that are chosen row by row on the host."""

from __future__ import annotations

import pytest
import torch

from gemcutter.engine.draw import CANDIDATES, FLOATS, Draws, can_draw, draw, numbers_of
from gemcutter.engine.request import Request
from gemcutter.engine.sampling import Sampling, sample

SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, top_k=64, top_p=0.95),  # the family's own
    Sampling(temperature=0.3, top_k=5),
    Sampling(temperature=2.0, top_k=CANDIDATES, min_p=0.1),
    Sampling(temperature=1.0, top_k=1, top_p=0.01),
    Sampling(temperature=1.5, top_k=20, top_p=0.5, min_p=0.05),
)
VOCABULARY = 600


def draws_of(requests: list[Request], seeds: list[int], position: int) -> Draws:
    rows = [numbers_of(request, seed, position) for request, seed in zip(requests, seeds, strict=True)]
    *floats, top_k = zip(*rows, strict=True)
    named = {name: torch.tensor(column, dtype=torch.float64) for name, column in zip(FLOATS, floats, strict=True)}
    return Draws(**named, top_k=torch.tensor(top_k))


def test_rows_get_the_tokens_that_the_host_would_choose() -> None:
    generator = torch.Generator().manual_seed(0)
    requests = [Request((1, 2, 3), sampling) for sampling in SAMPLINGS]
    found = set()
    for position in range(3, 60):
        logits = torch.randn(len(requests), VOCABULARY, generator=generator) * 4
        seeds = list(range(position, position + len(requests)))
        reply = [0] * (position - 3)
        wanted = [
            sample(row, request.sampling, request.prompt, reply, seed)
            for row, request, seed in zip(logits, requests, seeds, strict=True)
        ]
        assert draw(logits, draws_of(requests, seeds, position)).tolist() == wanted
        found.add(tuple(row.argmax().item() == token for row, token in zip(logits, wanted, strict=True)))
    assert len(found) > 8  # draws do differ from the arg max, in many ways


def test_a_greedy_row_takes_the_first_of_equals_beside_whom_ever() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, [400, 7, 90]] = 3.0
    requests = [Request((1,)), Request((1,), SAMPLINGS[1])]
    assert draw(logits, draws_of(requests, [0, 0], 1))[0].item() == logits[0].argmax().item()


def test_a_vocabulary_smaller_than_the_candidates() -> None:
    requests = [Request((1,), Sampling(temperature=1.0, top_k=100))]
    for seed in range(20):
        logits = torch.randn(1, 7)
        assert draw(logits, draws_of(requests, [seed], 1)).item() == sample(logits[0], requests[0].sampling, (1,), [], seed)


@pytest.mark.parametrize(
    ("request_", "is_drawn"),
    [
        (Request((1,)), True),
        (Request((1,), SAMPLINGS[1]), True),
        (Request((1,), Sampling(temperature=1.0)), False),
        (Request((1,), Sampling(temperature=1.0, top_k=CANDIDATES + 1)), False),
        (Request((1,), Sampling(repetition_penalty=1.1)), False),
        (Request((1,), Sampling(logprobs=0)), False),
        (Request((1,), max_tokens=0), False),
    ],
)
def test_what_the_host_must_see(request_: Request, is_drawn: bool) -> None:
    assert can_draw(request_, in_prompt=False) is is_drawn


def test_logits_of_the_prompt_go_to_the_host() -> None:
    request = Request((1,), top_logits=3)
    assert [can_draw(request, in_prompt) for in_prompt in (True, False)] == [False, True]


def test_rows_that_pad_a_batch_draw_anything_but_an_error() -> None:
    nothing = Draws(**{name: torch.zeros(1, dtype=torch.float64) for name in FLOATS}, top_k=torch.zeros(1, dtype=torch.long))
    assert 0 <= draw(torch.randn(1, VOCABULARY), nothing).item() < VOCABULARY
