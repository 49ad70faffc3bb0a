"""Speculation changes no reply: not a token, reason, log-probability or count, whatever is asked for and in whatever batch.

Owns runs of the trained demo with its trained assistant, and with lookups in the text itself, beside runs without. On the native
kernels, or else the reference, where a row never depends on its neighbours.
"""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import gemcutter
from gemcutter import native
from gemcutter.completion import Completion
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.speculate.assistant import AssistantProposer
from gemcutter.engine.speculate.ngram import NgramProposer
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.watchdog import TokenClasses
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_drafter
from gemcutter.model.drafter import Drafter
from gemcutter.model.text import Decoder
from gemcutter.text.grammar import Constraint
from gemcutter.text.token_classes import blank_and_data_ids
from tests.trained import golden, trained
from tests.unit.test_drafts import assert_same, no_repeats, run, tokens

CASES = int(os.environ.get("GEMCUTTER_CASES", "40"))
CONTEXT = 192  # three windows of the demo
PLAIN = ("reference" if native.missing() else "auto", "float32")  # kernels whose rows never depend on their neighbours
MODES = {"mtp": (False, True), "ngram": (True, False), "both": (True, True)}


@functools.cache
def pair(kernels: str = PLAIN[0], dtype: str = PLAIN[1]) -> tuple[Decoder, Drafter, TokenClasses]:
    with gemcutter.load("demo", dtype=dtype, kernels=kernels, context=CONTEXT) as model:
        blanks, data = blank_and_data_ids(model.tokenizer)
        decoder = model.decoder
    options = LoadOptions(model="demo", draft_model=str(trained("tiny-e-assistant")), dtype=dtype, kernels=kernels)
    return decoder, open_drafter(options, decoder, []), TokenClasses(blanks, data)


def speculator(mode: str, drafts: int | None, how: tuple[str, str] = PLAIN) -> Speculator:
    looks, asks = MODES[mode]
    return Speculator(NgramProposer(3) if looks else None, AssistantProposer(pair(*how)[1]) if asks else None, drafts)


def engine(batch: int, guesses: Speculator | None = None, how: tuple[str, str] = PLAIN) -> Engine:
    return Engine(
        pair(*how)[0], CONTEXT, max_batched_tokens=48, max_num_seqs=batch, prefix_cache_bytes=1 << 20, speculator=guesses
    )


def ban_after_three(prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
    """Allow even ids alone after three tokens, as a grammar that changes its state."""
    if len(reply) >= 3:
        logits_V[1::2] = -torch.inf
    return logits_V


def draw(seed: int) -> Request:
    """Draw a request: any sampling, stops, lengths, processors."""
    rng = random.Random(seed)
    prompts = golden("prompts")["prompts"]
    ids = tuple(rng.choice(prompts)["token_ids"])[: rng.randint(4, 150)]
    params = SamplingParams(
        temperature=rng.choice([0, 0, 0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 5, 64]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.4]),
        logit_bias={rng.randrange(4096): rng.choice([-5.0, 3.0])} if rng.random() < 0.3 else {},
        suppress=(rng.randrange(4096),),
        seed=seed,
        logprobs=rng.choice([None, 0, 2]),
    )
    return Request(
        ids,
        params,
        max_tokens=rng.randint(1, 30),
        stop_ids=frozenset({1, 7}) if rng.random() < 0.7 else frozenset(rng.sample(range(4096), 200)),
        min_tokens=rng.choice([0, 0, 1]),
        logits_processors=rng.choice([(), (), (ban_after_three,), (no_repeats, ban_after_three)]),
        watchdog=pair()[2] if rng.random() < 0.3 else None,
    )


@functools.cache
def plain(first: int, count: int) -> tuple[list[Request], list[list[gemcutter.engine.request.RequestEvent]], int]:
    requests = [draw(seed) for seed in range(first, first + count)]
    return requests, *run(engine(5), requests, stagger=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("drafts", [0, 1, 2, 4, 8, None])
@pytest.mark.parametrize("batch", [1, 5])
def test_replies_are_the_same(mode: str, drafts: int | None, batch: int) -> None:
    count = max(CASES // 20, 2)
    first = count * (list(MODES).index(mode) * 12 + [0, 1, 2, 4, 8, None].index(drafts) * 2 + (batch > 1))
    requests, wanted, _ = plain(first, count)
    guesses = speculator(mode, drafts)
    found, _ = run(engine(batch, guesses), requests, stagger=1)
    assert_same(found, wanted)
    assert drafts != 0 or guesses.tally.drafted == 0


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("drafts", [2, 7])
def test_kernels_give_a_row_the_same_in_any_step(drafts: int, kernels: str) -> None:
    """Token for token, because no row depends on how many are beside it; fast attention and products included."""
    requests, how = [draw(seed) for seed in range(1000, 1004)], (kernels, "float32" if kernels == "reference" else "bfloat16")
    wanted, _ = run(engine(1, how=how), requests)
    guesses = speculator("both", drafts, how)
    found, _ = run(engine(3, guesses, how), requests, stagger=1)
    assert tokens(found) == tokens(wanted)
    assert guesses.tally.drafted > 0


def test_lookups_pay_where_a_text_repeats() -> None:
    repeated = tuple(golden("prompts")["prompts"][0]["token_ids"][:20]) * 4
    request = Request(repeated, SamplingParams(), max_tokens=30, logits_processors=(Parrot(repeated),))
    wanted, plain_steps = run(engine(1), [request])
    guesses = speculator("ngram", 8)
    found, steps = run(engine(1, guesses), [request])
    assert tokens(found) == tokens(wanted)
    assert steps < plain_steps / 4
    assert guesses.tally.accepted == guesses.tally.drafted > 0


class Parrot:
    """Makes a model repeat a text from its beginning."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text = text

    def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        logits_V[self.text[len(reply) % len(self.text)]] += 1000.0
        return logits_V


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["lamp", "ship"]},
            "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
        },
        "required": ["kind", "sizes"],
    }
)
TOOL = {
    "type": "function",
    "function": {"name": "light", "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}}},
}
FORMS: dict[str, dict[str, Any]] = {
    "schema": {"constraint": Constraint("json_schema", SCHEMA)},
    "regex": {"constraint": Constraint("regex", "([a-z]{2,5} ){3}[0-9]+")},
    "call": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    "adapter": {"adapter": "lora"},
    "free": {"tools": [TOOL], "stop": ["the ", "of a"], "watchdog": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_grammars_calls_and_stops_hold_within_drafts(form: str, temperature: float) -> None:
    """Text, calls, reasons and counts are those without speculation."""
    asked: dict[str, Any] = {"max_tokens": 40, "temperature": temperature, "seed": 5, "logprobs": 1, **FORMS[form]}
    found = list[Completion]()
    for options in ({}, {"draft_model": trained("tiny-e-assistant"), "draft_tokens": 4}):
        adapters = {"lora": trained("tiny-e-lora")} if form == "adapter" else {}
        with gemcutter.load("demo", dtype="float32", kernels=PLAIN[0], context=256, adapters=adapters, **options) as model:
            found.append(model.chat([{"role": "user", "content": "What is a lantern?"}], **asked))
    alone, guessed = found
    assert (guessed.text, guessed.tokens, guessed.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)
    assert guessed.tool_calls == alone.tool_calls
    assert [each.logprob for each in guessed.logprobs] == pytest.approx([each.logprob for each in alone.logprobs], abs=1e-4)
    assert guessed.metrics.drafted_tokens > 0 == alone.metrics.drafted_tokens
    assert 0 <= guessed.metrics.accepted_tokens <= guessed.metrics.drafted_tokens
