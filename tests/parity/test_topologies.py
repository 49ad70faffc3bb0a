"""Parity with transformers over topologies that nobody has published: hundreds of them, drawn by hypothesis.

Owns the claim that the plan covers the family and not five models. Every drawn config is built by transformers with random
weights; the decoder must hold exactly its parameters and give every layer's output, whatever the chunk and page sizes. Read
`tests/topologies.py` for what is drawn.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from gemcutter import config as configs
from gemcutter.plan import derive
from tests.topologies import (
    TOLERANCE,
    Raw,
    build_decoder,
    build_oracle,
    mismatches,
    oracle,
    plan_of,
    prompt,
    relative_error,
    run_alone,
    saved_config,
    topologies,
)

EXAMPLES = 80  # for each of the four kinds below
TIE = 1e-4  # expert choices closer than this may fall either way, in either implementation


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("shares", [False, True], ids=["writers", "readers"])
def test_drawn_topologies_equal_the_oracle(shares: bool, experts: bool) -> None:
    seen: list[Raw] = []

    # No shrinking: the models are small already, and a failure should show in seconds.
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        raw=topologies(shares, experts),
        seed=st.integers(0, 2**16),
        beyond=st.integers(1, 20),
        chunk=st.integers(1, 34),
        page_tokens=st.integers(1, 9),
        kernels=st.sampled_from(("auto", "reference")),
    )
    def check(raw: Raw, seed: int, beyond: int, chunk: int, page_tokens: int, kernels: str) -> None:
        model = build_oracle(raw, seed)
        plan = plan_of(raw)
        assert derive(configs.read(saved_config(model))) == plan, "the two spellings of a config must mean the same"

        ids = prompt(raw["sliding_window"] + beyond, seed)
        wanted = oracle(model, ids)
        assume(wanted.margin > TIE)
        decoder = build_decoder(model, plan, kernels=kernels)
        assert not mismatches(run_alone(decoder, ids, chunk, page_tokens), wanted)

        last = run_alone(decoder, ids, chunk, page_tokens, keep_all=False)
        assert relative_error(last.logits, wanted.logits[-1:]) <= TOLERANCE
        seen.append(raw)

    check()
    assert len(seen) >= EXAMPLES
    _assert_varied(seen, shares)


def _assert_varied(seen: list[Raw], shares: bool) -> None:
    """Fail if the strategy has come to draw one trait only: a thin draw proves little."""
    plans = [plan_of(raw) for raw in seen]
    traits = {
        "k_eq_v": [raw["attention_k_eq_v"] for raw in seen],
        "per-layer embeddings": [bool(raw["hidden_size_per_layer_input"]) for raw in seen],
        "soft cap": [raw["final_logit_softcapping"] is not None for raw in seen],
        "head sizes differ": [len({(layer.kv_heads, layer.head_dim) for layer in plan.layers}) > 1 for plan in plans],
        "several groups": [len(plan.groups()) > 1 for plan in plans],
        "grouped queries": [any(1 < layer.kv_heads < layer.heads for layer in plan.layers) for plan in plans],
        "some pairs stay": [any(layer.rope.pairs < layer.head_dim // 2 for layer in plan.layers) for plan in plans],
        "tied head": [plan.tied_head for plan in plans],
    }
    if shares:
        traits["double-wide"] = [len({layer.mlp_width for layer in plan.layers}) > 1 for plan in plans]
        traits["two donors"] = [len({layer.kv_layer for layer in plan.layers if not layer.writes}) > 1 for plan in plans]
        traits["a donor that is not the last writer"] = [
            any(not layer.writes and layer.kv_layer != plan.first_reader - 1 for layer in plan.layers) for plan in plans
        ]
    thin = {
        trait: sum(found) for trait, found in traits.items() if not EXAMPLES // 10 <= sum(found) <= len(seen) - EXAMPLES // 10
    }
    assert not thin
