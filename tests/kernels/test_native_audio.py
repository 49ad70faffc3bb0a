"""Layers of audio towers in native calls against the same layer op by op, at every level.

Owns head dims that fill no vector, contexts short and long, looks ahead, clipped products, sounds shorter than what a row reads.
Read `parity/test_audio_tower.py` for whole towers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.errors import KernelError
from gemcutter.model.audio import build_plain_layer, scales_of
from gemcutter.model.tower import open_context
from gemcutter.ops.cpu import tower_ops
from gemcutter.ops.cpu.audio_ops import build_audio_layer
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import AudioLayer, Param
from gemcutter.quant import Weight
from gemcutter.tower_config import AudioConfig
from gemcutter.tower_plan import AudioPlan, plan_audio
from tests.topologies import relative_error
from tests.tower_layers import draw_layer

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

SHAPES = {  # hidden, heads, chunk, keys before and with a query's own, keys behind, taps
    "whole vectors": (32, 2, 12, 13, 0, 5),
    "ragged heads": (36, 3, 5, 9, 0, 3),
    "a look ahead": (20, 1, 6, 7, 4, 5),
    "distances that have no name": (24, 2, 20, 5, 3, 1),
}
EDGES = [(0, 2), (2, 90), (90, 131)]  # positions of sounds
POSITIONS = EDGES[-1][1]
# In float32 sums are taken in another order; in bfloat16 rows are rounded before products.
TOLERANCES = {"float32": 2e-5, "bf16": 2e-2}


def plan_of(shape: str, clipped: bool = False, clamp: float = 1e10) -> AudioPlan:
    hidden, heads, chunk, left, right, taps = SHAPES[shape]
    config = AudioConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        conv_kernel_size=taps,
        attention_chunk_size=chunk,
        attention_context_left=left,
        attention_context_right=right,
        attention_logit_cap=3.0,
        residual_weight=0.4,
        gradient_clipping=clamp,
        use_clipped_linears=clipped,
    )
    plan = plan_audio(config, 16)
    assert isinstance(plan, AudioPlan)
    return plan


def params_of(plan: AudioPlan, dtype: torch.dtype) -> dict[str, Param]:
    """Draw a layer's parameters; bounds that cut some values off, and unlike ones for the queries."""
    return draw_layer(plan, "audio.layers.0.", plan.hidden, dtype, (1.0, 1.5), lambda name, drawn: 1 + 0.3 * drawn)


def rows_of(plan: AudioPlan) -> Tensor:
    return torch.randn(POSITIONS, plan.hidden, generator=torch.Generator().manual_seed(1))


def both_layers(plan: AudioPlan, activations: str) -> tuple[AudioLayer, AudioLayer]:
    """Build the layer as native calls, over weights of the stored dtype, and op by op, over the same values in float32."""
    params = params_of(plan, torch.float32 if activations == "float32" else torch.bfloat16)
    wide = {name: _widened(each) for name, each in params.items()}
    ctx = open_context(wide, torch.float32, "cpu", "reference")
    scales = scales_of(plan, wide, ctx)
    whole = build_audio_layer(plan, params, activations, scales)
    assert whole is not None
    return whole, build_plain_layer(plan, wide, ctx, scales)


def _widened(param: Param) -> Param:
    if not isinstance(param, Weight):
        return param
    return Weight(tuple(part.float() for part in param.parts if isinstance(part, Tensor)), param.names)


@pytest.mark.parametrize("activations", TOLERANCES)
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("level")
def test_a_layer_is_its_ops(shape: str, clipped: bool, activations: str) -> None:
    plan = plan_of(shape, clipped, clamp=0.9 if clipped else 1e10)
    whole, plain = both_layers(plan, activations)
    x_TD = rows_of(plan)
    assert relative_error(whole(x_TD, EDGES, Turns()), plain(x_TD, EDGES, Turns())) < TOLERANCES[activations]


@pytest.mark.parametrize("activations", TOLERANCES)
@pytest.mark.usefixtures("level")
def test_threads_and_cuts_do_not_matter(activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, before, found = plan_of("ragged heads", clipped=True), torch.get_num_threads(), list[Tensor]()
    params = params_of(plan, torch.float32 if activations == "float32" else torch.bfloat16)
    scales = scales_of(plan, params, open_context(params, torch.float32, "cpu", "auto"))
    try:
        for threads, rows in ((1, 1 << 16), (2, 1 << 16), (3, 1 << 16), (1, 17), (2, 64)):
            torch.set_num_threads(threads)
            for name in ("UNIT_ROWS", "FIRST_ROWS", "MOST_ROWS"):
                monkeypatch.setattr(tower_ops, name, rows)
            whole = build_audio_layer(plan, params, activations, scales)
            assert whole is not None
            found.append(whole(rows_of(plan), EDGES, Turns()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found[1:])


@pytest.mark.usefixtures("level")
def test_not_a_number_stays_in_its_sound() -> None:
    plan = plan_of("whole vectors", clipped=True)
    x_TD = rows_of(plan)
    x_TD[40, 3] = torch.nan  # of the second sound
    found = both_layers(plan, "float32")[0](x_TD, EDGES, Turns())
    assert found[:40].isfinite().all()
    assert found[40].isnan().any()
    assert found[90:].isfinite().all()


def test_hidden_positions_that_have_a_weight_are_computed_op_by_op() -> None:
    plan = plan_of("whole vectors")
    params = params_of(plan, torch.float32)
    scales = scales_of(plan, params, open_context(params, torch.float32, "cpu", "auto"))
    assert build_audio_layer(plan, params, "float32", scales) is not None
    assert build_audio_layer(replace(plan, masked_logit=-10.0), params, "float32", scales) is None


def test_edges_that_do_not_ascend_are_refused() -> None:
    plan = plan_of("whole vectors")
    whole, _ = both_layers(plan, "float32")
    for edges in ([(0, 100), (100, 50), (50, POSITIONS)], [(0, POSITIONS - 1)], []):
        with pytest.raises(KernelError, match="sounds do not make up the positions"):
            whole(rows_of(plan), edges, Turns())
