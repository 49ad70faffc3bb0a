"""Parity with transformers for the five published sizes, shrunk: every layer's output, the states and the logits.

Owns the claim that the traits which tell the sizes apart are computed as the oracle computes them, for both tables of kernels
and any chunk size. Read `tests/topologies.py` for how the sizes were shrunk, `test_topologies.py` for everything between them.
"""

from __future__ import annotations

import functools

import pytest
from transformers import PreTrainedModel

from gemcutter import config as configs
from gemcutter.plan import Proj, derive
from tests.topologies import (
    SIZES,
    TOLERANCE,
    Trace,
    build_decoder,
    build_oracle,
    mismatches,
    oracle,
    plan_of,
    prompt,
    relative_error,
    run_alone,
    saved_config,
)

PROMPT = prompt(40)  # five windows

# By size: layers with own values, with the key projection as value, readers; then what else is special.
TRAITS = {
    "E2B": (5, 0, 5, {"double-wide", "per-layer embeddings"}),
    "E4B": (6, 0, 6, {"per-layer embeddings"}),
    "12B": (5, 1, 0, {"global key heads"}),
    "26B-A4B": (5, 1, 0, {"global key heads", "experts"}),
    "31B": (10, 2, 0, {"global key heads"}),
}


@functools.cache
def wanted(size: str) -> tuple[PreTrainedModel, Trace]:
    """Build the oracle of a size and run it once."""
    model = build_oracle(SIZES[size])
    return model, oracle(model, PROMPT)


@pytest.mark.parametrize("size", SIZES)
def test_shrunk_size_keeps_its_traits(size: str) -> None:
    plan = plan_of(SIZES[size])
    kinds = [layer.proj for layer in plan.layers]
    special = {
        "double-wide": len({layer.mlp_width for layer in plan.layers}) > 1,
        "per-layer embeddings": plan.ple_dim > 0,
        "global key heads": len({layer.kv_heads for layer in plan.layers}) > 1,
        "experts": any(layer.moe for layer in plan.layers),
    }
    counts = (kinds.count(Proj.QKV), kinds.count(Proj.QK_ONLY), kinds.count(Proj.Q_ONLY))
    assert (*counts, {name for name, found in special.items() if found}) == TRAITS[size]
    assert plan == derive(configs.read(saved_config(wanted(size)[0])))


@pytest.mark.parametrize("chunk", [len(PROMPT), 7, 1])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("size", SIZES)
def test_every_layer_equals_the_oracle(size: str, kernels: str, chunk: int) -> None:
    model, trace = wanted(size)
    decoder = build_decoder(model, plan_of(SIZES[size]), kernels=kernels)
    assert not mismatches(run_alone(decoder, PROMPT, chunk, page_tokens=4), trace)


@pytest.mark.parametrize("chunk", [len(PROMPT), 7, 1])
@pytest.mark.parametrize("size", SIZES)
def test_skipping_reader_rows_leaves_the_last_row_as_it_was(size: str, chunk: int) -> None:
    model, trace = wanted(size)
    plan = plan_of(SIZES[size])
    found = run_alone(build_decoder(model, plan), PROMPT, chunk, keep_all=False)
    assert relative_error(found.logits, trace.logits[-1:]) <= TOLERANCE
    for layer, rows in enumerate(found.layers):
        if layer < plan.first_reader - 1:
            assert relative_error(rows, trace.layers[layer]) <= TOLERANCE
        else:
            assert relative_error(rows, trace.layers[layer][-1:]) <= TOLERANCE
