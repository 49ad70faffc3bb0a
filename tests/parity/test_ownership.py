"""Each layer holds, computes and caches what its place in the model needs, and nothing else.

Owns the project's central claim, measured on running models: readers have no key or value weights and no cache, a layer whose
value is its key projects it once, and no row passes the last writer unless somebody wants it. Rows are counted at the one word
that all matrix products go through. Read `gemcutter/plan.py` for where it is decided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.engine import Engine
from gemcutter.engine.memory import page_counts
from gemcutter.model.text import Decoder
from gemcutter.ops import reference
from gemcutter.ops.types import Param
from gemcutter.plan import LayerPlan, ModelPlan, Proj
from gemcutter.quant import Weight
from tests.parity.batches import Job, drive
from tests.topologies import SIZES, build_decoder, build_oracle, plan_of, prompt

TOKENS = 40
READERS = ["E2B", "E4B"]
K_EQ_V = ["12B", "26B-A4B", "31B"]


@dataclass(slots=True)
class Meter:
    """Counts the rows that meet each part of each parameter, such as "layers.3.attn.in[k]", and the multiply-accumulates."""

    owners: dict[int, str] = field(default_factory=dict)  # by address of the storage
    rows: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    macs: int = 0

    def know(self, params: Mapping[str, Param]) -> None:
        """Learn where each matrix lies; the experts' two parts share one place and one name."""
        for name, param in params.items():
            if isinstance(param, Weight):
                for part, tensor in zip(param.names or (None,), param.parts, strict=True):
                    label = name if part is None or "moe" in name else f"{name}[{part}]"
                    self.owners[tensor.untyped_storage().data_ptr()] = label

    def note(self, x_ND: Tensor, weight: Weight) -> None:
        """Count one product."""
        self.macs += x_ND.shape[0] * weight.rows * weight.columns
        for label in {self.owners[part.untyped_storage().data_ptr()] for part in weight.parts}:
            self.rows[label] += x_ND.shape[0]
            self.calls[label] += 1


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Put a meter into the reference's matrix product; decoders built from now on run through it."""
    found, plain = Meter(), reference.linear

    def metered(x_ND: Tensor, weight: Weight) -> Tensor:
        found.note(x_ND, weight)
        return plain(x_ND, weight)

    monkeypatch.setattr(reference, "linear", metered)
    return found


def metered_decoder(size: str, meter: Meter) -> Decoder:
    """Build a decoder whose products are counted."""
    decoder = build_decoder(build_oracle(SIZES[size]), plan_of(SIZES[size]), kernels="reference")
    meter.know(decoder.params)
    return decoder


@pytest.mark.parametrize("size", READERS)
def test_readers_hold_no_keys_and_values(size: str) -> None:
    plan = plan_of(SIZES[size])
    decoder = build_decoder(build_oracle(SIZES[size]), plan)
    pool = PagedKVCache(plan, page_counts(plan, TOKENS, TOKENS), torch.float32)
    readers = [layer.plan for layer in decoder.layers if layer.plan.proj is Proj.Q_ONLY]
    assert readers
    for layer in readers:
        params = decoder.layers[layer.index].params
        assert {name for name in params if name.startswith("attn.")} == {
            f"attn.{n}" for n in ("norm", "in", "q_norm", "out", "post_norm")
        }
        weight = params["attn.in"]
        assert isinstance(weight, Weight)
        assert (weight.names, weight.rows) == (("q",), layer.heads * layer.head_dim)
        assert layer.index not in pool.keys
        assert layer.index not in pool.values
        assert layer.kv_layer in pool.keys


@pytest.mark.parametrize("size", SIZES)
def test_cache_holds_what_the_writers_write(size: str) -> None:
    plan = plan_of(SIZES[size])
    pool = PagedKVCache(plan, page_counts(plan, 128, 1, page_tokens=1), torch.float32)
    writers = {layer.index for layer in plan.layers if layer.writes}
    assert pool.keys.keys() == pool.values.keys() == writers
    # One token a page leaves no slack but the row in flight and the page it shares: windows are kept, not contexts.
    assert plan.kv_bytes(128, 4) <= pool.nbytes <= plan.kv_bytes(128, 4) * 1.3


@pytest.mark.parametrize("size", K_EQ_V)
def test_a_value_that_is_its_key_is_projected_once(size: str, meter: Meter) -> None:
    decoder = metered_decoder(size, meter)
    layers = [layer for layer in decoder.plan.layers if layer.proj is Proj.QK_ONLY]
    assert layers
    drive(Engine(decoder, 64, max_batched_tokens=16), [Job(prompt(TOKENS), max_tokens=0)])
    for layer in layers:
        weight = decoder.params[f"layers.{layer.index}.attn.in"]
        assert isinstance(weight, Weight)
        assert weight.names == ("q", "k")
        assert weight.part("k").rows == layer.kv_heads * layer.head_dim
        assert meter.calls[f"layers.{layer.index}.attn.in[k]"] == 3  # one a chunk
        assert meter.rows[f"layers.{layer.index}.attn.in[k]"] == TOKENS
        assert not meter.calls[f"layers.{layer.index}.attn.in[v]"]


def expected_rows(plan: ModelPlan, wanted: int) -> dict[str, int]:
    """Describe how many of TOKENS rows meet each weight when `wanted` of them go all the way and the last goes to the head."""
    rows = {"embed.tokens" if plan.tied_head else "head": 1}
    for layer in plan.layers:
        late, last = layer.index >= plan.first_reader, layer.index == plan.first_reader - 1
        through = wanted if late or last else TOKENS
        rows |= {f"layers.{layer.index}.{name}": through for name in _inner(layer)}
        rows |= {f"layers.{layer.index}.attn.in[{part}]": TOKENS for part, _ in layer.attn_parts()}
        rows[f"layers.{layer.index}.attn.in[q]"] = through
        if layer.moe:
            rows[f"layers.{layer.index}.moe.router"] = through
            rows |= {f"layers.{layer.index}.moe.{name}": through * layer.moe.top_k for name in ("in", "out")}
    if plan.ple_dim:
        # The early layers' share for all rows and the late layers' for the kept ones: one product where those are the same.
        rows["ple.in"] = TOKENS if wanted == TOKENS else TOKENS + wanted
    return rows


def _inner(layer: LayerPlan) -> list[str]:
    names = ["attn.out", "mlp.in[gate]", "mlp.in[up]", "mlp.out"]
    return names + ["ple.gate", "ple.out"] * (layer.ple_dim > 0)


@pytest.mark.parametrize("max_rows", [TOKENS, 7])
@pytest.mark.parametrize("size", SIZES)
def test_no_unwanted_row_passes_the_last_writer(size: str, max_rows: int, meter: Meter) -> None:
    decoder = metered_decoder(size, meter)
    drive(Engine(decoder, 64, max_batched_tokens=max_rows), [Job(prompt(TOKENS), max_tokens=1)])
    assert dict(meter.rows) == expected_rows(decoder.plan, wanted=1)
    assert 2 * meter.macs == decoder.plan.flops(TOKENS, wanted=1, attention=False)


@pytest.mark.parametrize("size", SIZES)
def test_wanted_rows_pass_all_layers(size: str, meter: Meter) -> None:
    decoder = metered_decoder(size, meter)
    drive(Engine(decoder, 64, max_batched_tokens=7), [Job(prompt(TOKENS), max_tokens=0, wants_states=True)])
    assert dict(meter.rows) == expected_rows(decoder.plan, wanted=TOKENS)
