"""Layers of vision towers in one native call against the same layer op by op, at every level.

Owns head dims that fill no vector, several heads to a key head, clipped products, images of unequal sizes, with more patches than
a block of queries or keys has. Read `parity/test_vision.py` for whole towers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemcutter import native
from gemcutter.errors import KernelError
from gemcutter.model.rope import Rope
from gemcutter.model.tower import open_context
from gemcutter.model.vision import build_plain_layer
from gemcutter.ops.cpu import tower_ops
from gemcutter.ops.cpu.vision_ops import build_vision_layer
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import Param, VisionRows
from gemcutter.plan import RopeSpec
from gemcutter.quant import Weight
from gemcutter.tower_plan import VisionPlan
from tests.topologies import relative_error
from tests.tower_layers import draw_layer

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

SHAPES = {"64": (64, 1, 1, 64), "72": (40, 2, 1, 72), "20": (60, 3, 1, 20), "4": (24, 2, 2, 4)}  # hidden, heads, key heads, dim
EDGES = [(0, 5), (5, 5), (5, 275), (275, 310)]  # patches of images, one of which has none
PATCHES = EDGES[-1][1]
# In float32 sums are taken in another order; in bfloat16 rows, keys, values and weights are rounded once each.
TOLERANCES = {"float32": 2e-5, "bf16": 2e-2}


def plan_of(shape: str, clipped: bool = False) -> VisionPlan:
    hidden, heads, kv_heads, head_dim = SHAPES[shape]
    return VisionPlan(1, hidden, heads, kv_heads, head_dim, 50, 16, 3, 64, 280, 100.0, 1e-6, clipped, False, 32)


def params_of(plan: VisionPlan, dtype: torch.dtype) -> dict[str, Param]:
    """Draw a layer's parameters; bounds that cut some values off, and unlike ones for the queries."""

    def vector(name: str, drawn: Tensor) -> Tensor:
        # Small query norms make scores of a few units: larger ones would blow up the rounding before them.
        return (0.3 if name.endswith("q_norm") else 1.0) * (1 + 0.2 * drawn)

    return draw_layer(plan, "vision.layers.0.", plan.head_dim, dtype, (1.5, 2.0), vector)


def inputs(plan: VisionPlan) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    draw = torch.Generator().manual_seed(1)
    axial = Rope(RopeSpec(plan.theta, plan.head_dim // 2, plan.head_dim // 4), torch.device("cpu"), torch.float32)
    x_P, y_P = torch.randint(0, 40, (2, PATCHES), generator=draw)
    return torch.randn(PATCHES, plan.hidden, generator=draw), (axial.tables(x_P), axial.tables(y_P))


@pytest.mark.parametrize("activations", TOLERANCES)
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_its_ops(shape: str, clipped: bool, activations: str, level: str) -> None:
    plan = plan_of(shape, clipped)
    dtype = torch.float32 if activations == "float32" else torch.bfloat16
    params = params_of(plan, dtype)
    x_PD, rotations = inputs(plan)
    wide = {name: _widened(each) for name, each in params.items()}
    plain = build_plain_layer(plan, wide, open_context(wide, torch.float32, "cpu", "reference"))
    found = build_vision_layer(plan, params, activations)(x_PD, VisionRows(rotations, EDGES, Turns()))
    assert relative_error(found, plain(x_PD, VisionRows(rotations, EDGES, Turns()))) < TOLERANCES[activations]


def _widened(param: Param) -> Param:
    if not isinstance(param, Weight):
        return param
    return Weight(tuple(part.float() for part in param.parts if isinstance(part, Tensor)), param.names)


@pytest.mark.parametrize("activations", TOLERANCES)
def test_threads_do_not_matter(activations: str, level: str) -> None:
    plan = plan_of("72", clipped=True)
    params = params_of(plan, torch.float32 if activations == "float32" else torch.bfloat16)
    x_PD, rotations = inputs(plan)
    layer, before = build_vision_layer(plan, params, activations), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(layer(x_PD, VisionRows(rotations, EDGES, Turns())))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("activations", TOLERANCES)
def test_how_rows_are_cut_does_not_matter(activations: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("20", clipped=True)
    params = params_of(plan, torch.float32 if activations == "float32" else torch.bfloat16)
    (x_PD, rotations), found = inputs(plan), list[Tensor]()
    for rows in (17, 64, 1 << 16):
        monkeypatch.setattr(tower_ops, "UNIT_ROWS", rows)
        monkeypatch.setattr(tower_ops, "FIRST_ROWS", rows)
        monkeypatch.setattr(tower_ops, "MOST_ROWS", rows)
        found.append(build_vision_layer(plan, params, activations)(x_PD, VisionRows(rotations, EDGES, Turns())))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_not_a_number_stays_one(level: str) -> None:
    plan = plan_of("64", clipped=True)
    x_PD, rotations = inputs(plan)
    x_PD[7, 3] = torch.nan  # of the second image
    found = build_vision_layer(plan, params_of(plan, torch.float32), "float32")(x_PD, VisionRows(rotations, EDGES, Turns()))
    assert found[:5].isfinite().all()
    assert found[5:275].isnan().any()
    assert found[275:].isfinite().all()


def test_edges_that_do_not_ascend_are_refused() -> None:
    plan = plan_of("64")
    x_PD, rotations = inputs(plan)
    layer = build_vision_layer(plan, params_of(plan, torch.float32), "float32")
    for edges in ([(0, 300), (300, 200), (200, PATCHES)], [(0, PATCHES - 1)], []):
        with pytest.raises(KernelError, match="images do not make up the patches"):
            layer(x_PD, VisionRows(rotations, edges, Turns()))
