"""Pipeline stages: contiguous layers, cut so that the fullest stage is as small as it can be.

Owns the choice among the cuts that the plan allows, which part no reader from the layer whose keys and values it reads. Refuses
to know how weights are held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from gemcutter.errors import ConfigError
from gemcutter.plan import ModelPlan


def cut_stages(plan: ModelPlan, weights: Mapping[str, int], count: int) -> tuple[range, ...]:
    """Return the layers of `count` stages of a whole plan, whose weights take so many bytes in memory, by parameter.

    What belongs to no layer lies on the last stage. Raises ConfigError for more stages than there can be.
    """
    costs, last = [0.0] * len(plan.layers), 0.0
    for spec in plan.params():
        if spec.layer is None:
            last += weights[spec.name]
        else:
            costs[spec.layer] += weights[spec.name]
    return choose_stages(plan, costs, last, count)


def choose_stages(plan: ModelPlan, costs: Sequence[float], last: float, count: int) -> tuple[range, ...]:
    """Return the layers of `count` stages, of which the costliest costs as little as possible.

    `costs` are the layers', `last` what the last stage holds beside. Raises ConfigError for more than there can be.
    """
    edges = (0, *plan.stage_starts, len(plan.layers))
    if count > len(edges) - 1:
        raise ConfigError(refusal(plan, count))
    sums = [0.0, *accumulate(costs)]

    def cost(start: int, stop: int) -> float:
        return sums[stop] - sums[start] + (last if stop == len(costs) else 0.0)

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}  # of so many stages up to an edge: worst cost, and cuts
    for stage in range(count):
        longer = dict[int, tuple[float, tuple[int, ...]]]()
        for stop in edges[stage + 1 :]:
            found = [(max(worst, cost(start, stop)), (*cuts, stop)) for start, (worst, cuts) in best.items() if start < stop]
            if found:
                longer[stop] = min(found)
        best = longer
    _, cuts = best[len(costs)]
    return tuple(range(start, stop) for start, stop in pairwise(cuts))


def refusal(plan: ModelPlan, count: int) -> str:
    """Return why a model has no `count` stages, and how many it has at most."""
    most, readers = len(plan.stage_starts) + 1, [layer for layer in plan.layers if not layer.writes]
    why = f"it has {len(plan.layers)} layers"
    if readers:
        sources = sorted({layer.kv_layer for layer in readers})
        spelled = " and ".join(map(str, sources))
        why = (
            f"layers {readers[0].index} to {readers[-1].index} read the keys and values of layers {spelled}, "
            "and lie on one stage with them"
        )
    return f"{count} pipeline stages: {most} at most can be cut, since {why}; use --pp {most} or less, or more ranks with --tp"
