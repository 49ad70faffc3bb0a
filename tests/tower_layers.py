"""Parameters of one layer of a tower, drawn at random, for tests of kernels that compute a layer at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemcutter.ops.types import Param
from gemcutter.param_spec import ParamKind
from gemcutter.quant import Weight
from gemcutter.tower_plan import AudioPlan, VisionPlan


def draw_layer(
    plan: AudioPlan | VisionPlan,
    prefix: str,
    seed: int,
    dtype: torch.dtype,
    bounds: tuple[float, float],
    vector: Callable[[str, Tensor], Tensor],
) -> dict[str, Param]:
    """Draw the parameters under a prefix; `bounds` of the queries' products and of the others' cut some values off.

    `vector` makes a vector of its name and of values of the normal distribution.
    """
    draw, found = torch.Generator().manual_seed(seed), dict[str, Param]()
    for spec in plan.params():
        name = spec.name.removeprefix(prefix)
        if name == spec.name:
            continue
        if spec.kind is ParamKind.MATRIX:
            rows = [rows for _, rows in spec.parts] or [spec.shape[0]]
            drawn = [(torch.randn(each, spec.shape[1], generator=draw) * spec.shape[1] ** -0.5).to(dtype) for each in rows]
            found[name] = Weight(tuple(drawn), tuple(part for part, _ in spec.parts))
        elif spec.kind is ParamKind.SCALAR:
            most = bounds[0] if ".q." in name else bounds[1]
            found[name] = torch.tensor(-most if name.endswith("min") else most)
        else:
            found[name] = vector(name, torch.randn(spec.shape, generator=draw))
    return found
