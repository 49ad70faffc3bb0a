"""Drafts beside everything else that an engine does with a cache: no reply changes, and each thing still happens.

Owns one scene for each: adapters in a batch, prefixes that are reused, prompts in chunks, one prompt with several seeds,
sequences sent back for want of pages, a cache in 8 bits. Each is played without drafts, and with those of an assistant, of
lookups, and of a smaller model: the demo's own quantized self, which is nearly always right. Read `test_speculation.py` for
sampling, grammars and stops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

import gemcutter
from gemcutter import native
from gemcutter.cache.kv_cache import PagedKVCache, PoolSize
from gemcutter.cache.prefix_cache import PrefixCache
from gemcutter.engine.engine import Engine
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, RequestEvent
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.speculate.assistant import AssistantProposer
from gemcutter.engine.speculate.draft_model import DraftModelProposer
from gemcutter.engine.speculate.ngram import NgramProposer
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_drafter
from gemcutter.model.drafter import Drafter
from gemcutter.model.text import Decoder
from tests.trained import golden, trained
from tests.unit.test_drafts import assert_same, run

Events = list[list[RequestEvent]]

EXACT = "reference" if native.missing() else "auto"  # kernels whose rows never depend on their neighbours
CONTEXT, ROWS, BATCH = 192, 24, 3  # three windows of the demo; prompts take several steps
DRAFTS = 4
PROPOSERS = ("mtp", "ngram", "model")


@functools.cache
def models(kernels: str) -> tuple[Decoder, Drafter, Decoder]:
    """Return the demo with an adapter beside it, its assistant, and its quantized self."""
    how = {"dtype": "float32", "kernels": kernels}
    with gemcutter.load("demo", context=CONTEXT, adapters={"lora": trained("tiny-e-lora")}, **how) as model:
        target = model.decoder
    options = LoadOptions(model="demo", draft_model=str(trained("tiny-e-assistant")), dtype="float32", kernels=kernels)
    assistant = open_drafter(options, target, [])
    smaller = open_drafter(replace(options, draft_model="demo", quant="q4"), target, [])
    assert isinstance(assistant, Drafter)
    assert isinstance(smaller, Decoder)
    return target, assistant, smaller


def speculator(proposer: str, kernels: str) -> Speculator:
    _, assistant, smaller = models(kernels)
    if proposer == "ngram":
        return Speculator(NgramProposer(1), draft_tokens=DRAFTS)
    drafting = AssistantProposer(assistant) if proposer == "mtp" else DraftModelProposer(smaller, CONTEXT, BATCH)
    return Speculator(assistant=drafting, draft_tokens=DRAFTS)


def prompt(which: int, tokens: int) -> tuple[int, ...]:
    """Return text whose second half repeats the first, so that there is something to look up."""
    ids: Sequence[int] = golden("prompts")["prompts"][which]["token_ids"]
    half = (list(ids) * tokens)[: tokens // 2]
    return (*half, *half)


def requests(adapters: Iterable[str | None] = (None,) * 4, tokens: int = 60) -> list[Request]:
    """Return requests that are greedy and sampled in turn."""
    kinds = (SamplingParams(), SamplingParams(0.7, seed=3))
    return [
        Request(prompt(place, tokens + 6 * place), kinds[place % 2], max_tokens=18 + place, adapter=adapter)
        for place, adapter in enumerate(adapters)
    ]


def cached(events: Events) -> list[int]:
    """Return how many tokens of each prompt were found in the cache."""
    return [next(event.prompt.cached_tokens for event in each if event.prompt is not None) for each in events]


# ---- scenes ----


def adapters(engine: Engine) -> Events:
    """Neighbours with an adapter and without: the assistant, made for the model without, drafts for both."""
    return run(engine, requests(("lora", None, "lora", None)), stagger=2)[0]


def chunks(engine: Engine) -> Events:
    """Prompts of several steps, some of which run while others decode."""
    return run(engine, requests(tokens=120), stagger=1)[0]


def seeds(engine: Engine) -> Events:
    """One prompt, several replies: its beginning is computed once, and pages are shared until they are written."""
    first = prompt(1, 90)
    found, _ = run(engine, [Request(first, SamplingParams(1.0, seed=seed), max_tokens=20) for seed in range(BATCH + 1)])
    assert sum(count >= 64 for count in cached(found)) >= BATCH
    return found


def prefixes(engine: Engine) -> Events:
    """A conversation that goes on, twice: rows that held drafts must not be what is found."""
    found, ids = Events(), prompt(2, 70)
    for turn in range(3):
        number = engine.submit(Request(ids, SamplingParams(0.5, seed=turn), max_tokens=21))
        events = list[RequestEvent]()
        while engine.has_work:
            events += [event for event in engine.step() if event.request == number]
        found.append(events)
        reply = tuple(event.token for event in events if event.token is not None)
        assert cached([events])[0] >= (len(ids) - 11 if turn else 0)  # the last token of a reply has no key yet
        ids = (*ids, *reply, *prompt(3, 10))
    return found


def pages(engine: Engine, tokens: int = 80) -> Events:
    """Sequences that are sent back to wait in the middle of their replies, and computed anew."""
    plan, rows = engine.decoder.plan, engine.scheduler.max_batched_tokens
    sizes = page_counts(plan, CONTEXT, rows, page_tokens=8)
    roomier = {group: PoolSize(size.pages + 4, size.tokens) for group, size in sizes.items()}
    (dtype,) = {kept.dtype for kept in engine.pool.keys.values()}
    engine.pool = engine.scheduler.pool = engine.runner.pool = PagedKVCache(plan, roomier, dtype, engine.decoder.device)
    engine.prefix = engine.scheduler.prefix = PrefixCache(engine.pool, dict.fromkeys(sizes, 0))
    found = run(engine, requests(tokens=tokens), stagger=1)[0]
    assert engine.stats().preemptions > 0
    return found


def eight_bits(engine: Engine) -> Events:
    """Keys and values rounded to 8 bits, which the assistant reads as they are."""
    assert {kept.itemsize for kept in engine.pool.keys.values()} == {1}
    return run(engine, requests(), stagger=2)[0]


@dataclass(frozen=True, slots=True)
class Scene:
    """What happens, on which kernels and over which cache."""

    play: Callable[[Engine], Events]
    kernels: str = EXACT
    kv_dtype: torch.dtype | None = None
    prefix_bytes: int | None = 0

    def run(self, guesses: Speculator | None) -> Events:
        """Play it on a new engine."""
        target = models(self.kernels)[0]
        engine = Engine(target, CONTEXT, ROWS, BATCH, self.prefix_bytes, graphs=False, kv_dtype=self.kv_dtype, speculator=guesses)
        return self.play(engine)


SCENES = {
    "adapters": Scene(adapters),
    "chunks": Scene(chunks),
    "one prompt": Scene(seeds, prefix_bytes=None),
    "conversation": Scene(prefixes, prefix_bytes=None),
    "few pages": Scene(pages),
    "8 bits": Scene(eight_bits, "reference", torch.float8_e4m3fn),
    "int8": Scene(eight_bits, kv_dtype=torch.int8),
    "int8, conversation": Scene(prefixes, kv_dtype=torch.int8, prefix_bytes=None),
    "int8, one prompt": Scene(seeds, kv_dtype=torch.int8, prefix_bytes=None),
    "int8, few pages": Scene(functools.partial(pages, tokens=100), kv_dtype=torch.int8),
}


@functools.cache
def plain(scene: str) -> Events:
    return SCENES[scene].run(None)


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("scene", SCENES)
def test_replies_are_those_without_drafts(scene: str, proposer: str) -> None:
    guesses = speculator(proposer, SCENES[scene].kernels)
    found = SCENES[scene].run(guesses)
    assert_same(found, plain(scene))
    assert [len(each) for each in found] == [len(each) for each in plain(scene)]
    assert guesses.tally.drafted > guesses.tally.accepted > 0, "nothing was guessed, or nothing taken back"
    assert not guesses._own, "what is known of a sequence outlives it"
    if isinstance(guesses.assistant, DraftModelProposer):
        books = guesses.assistant._cache.allocators.values()
        assert all(book.free == len(book.ref_counts) for book in books), "pages were leaked"
