"""Bursts of drafts over static memory are those of plain steps: padded, of several sequences, longer ones after shorter ones."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from gemcutter import config as configs
from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.speculate import captured_drafts
from gemcutter.engine.speculate.assistant import AssistantProposer
from gemcutter.engine.speculate.captured_drafts import CapturedBursts
from gemcutter.engine.step import build_step
from gemcutter.model.drafter import Drafter, sort_under_centroids
from gemcutter.model.text import Decoder
from gemcutter.plan import derive
from tests.trained import GOLDENS
from tests.triton.decoders import GLOBAL, PAGE_TOKENS, SLIDING, decode_with, draw_params, prompt

pytest.importorskip("gemcutter.ops.triton.linear")
pytestmark = pytest.mark.usefixtures("plain_products")

NARROW: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 4,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, GLOBAL],
}


def drafter_of(target: Decoder, centroids: int) -> Drafter:
    """Make a small assistant with random weights."""
    raw: dict[str, Any] = json.loads((GOLDENS / "configs" / "gemma-4-E2B-it-assistant.json").read_text())
    raw |= {"backbone_hidden_size": 64, "num_centroids": 6, "centroid_intermediate_top_k": 2}
    raw["use_ordered_embeddings"] = bool(centroids)
    raw["text_config"] |= NARROW
    plan = derive(configs.read(raw), target.plan)
    params = draw_params(plan, torch.float32, target.device)
    if plan.centroids:
        order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).to(target.device)
        params = sort_under_centroids(plan, params | {"draft.order": order})
    return Drafter(Decoder(plan, params, torch.float32, target.device, "triton"), target)


@torch.inference_mode()
def sequences_of(target: Decoder, lengths: list[int]) -> list[SequenceState]:
    """Compute prompts, and give each sequence a state to draft from."""
    counts = page_counts(target.plan, 60, max(lengths), len(lengths), page_tokens=PAGE_TOKENS)
    pool, found = PagedKVCache(target.plan, counts, torch.float32, target.device), list[SequenceState]()
    for number, length in enumerate(lengths):
        sequence = SequenceState(number, Request(prompt(length + 1, number)))
        sequence.table = table = BlockTable(pool)
        table.reserve(length)
        chunk = replace(ScheduledChunk.of(sequence, table, length), is_last=False)
        target.forward(build_step(target, [chunk]), pool)
        table.commit(length)
        sequence.state_D = torch.randn(target.plan.hidden, generator=torch.Generator().manual_seed(number)).to(target.device)
        found.append(sequence)
    return found


@pytest.mark.parametrize("centroids", [0, 6])
def test_static_bursts_are_plain_ones(centroids: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_drafts, "BUCKETS", (1, 2, 4))
    target = decode_with("triton", "readers", device)
    drafter = drafter_of(target, centroids)
    assert bool(drafter.decoder.plan.centroids) == bool(centroids)
    everyone = sequences_of(target, [5, 11, 34])
    plain, static = AssistantProposer(drafter), AssistantProposer(drafter)
    plain._captured, static._captured = None, CapturedBursts(drafter)
    alone, all_three, two = [(everyone[0], 3)], [(everyone[0], 3), (everyone[1], 2), (everyone[2], 3)], [(everyone[2], 3)] * 2
    for wanted in (alone, alone, all_three, all_three, two, alone, two):  # each is static from the second time on
        mine, other = static.propose(wanted), plain.propose(wanted)
        assert {number: guess.tokens for number, guess in mine.items()} == {number: each.tokens for number, each in other.items()}
        for number, guess in mine.items():
            assert guess.chances == pytest.approx(other[number].chances, rel=1e-4)
    assert {(key.sequences, key.drafts) for key in static._captured._buffers} == {(1, 3), (4, 3), (2, 3)}
