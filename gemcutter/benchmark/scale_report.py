"""A plan for several ranks as one object: memory of each stage's fullest rank, exchanges, speeds, and which numbers of ranks fit.

Owns the names in the JSON: sizes in bytes, times in seconds, speeds in tokens a second. Refuses to know how it is shown. Read
`scale.py` for the arithmetic, `cli/plan.py` for the tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemcutter.benchmark.devices import Device
from gemcutter.benchmark.planned_model import KINDS, TABLE, PlannedModel
from gemcutter.benchmark.scale import RankNeeds, StepTime, Workload, step_time
from gemcutter.checkpoint.load.memory_needs import WeightMemory
from gemcutter.errors import ConfigError
from gemcutter.parallel.stages import cut_stages

TABLE_SHARE = 4  # a per-layer table goes to a GPU if this many of its size are free there, as in `ple_placement.py`
BOUNDS = {"read_s": "memory", "compute_s": "compute", "exchange_s": "link"}


@dataclass(frozen=True)
class ScalePlan:
    """A model on `world` tensor-parallel ranks in each of some stages, for one workload."""

    model: PlannedModel
    device: Device
    work: Workload
    ranks: tuple[RankNeeds, ...]
    stages: tuple[range, ...]


def make_plan(model: PlannedModel, device: Device, work: Workload, world: int, stages: int) -> ScalePlan:
    """Cut a model for so many ranks and stages. Raises ConfigError where it can't be shared so."""
    ranks = tuple(RankNeeds(model, rank, world, work) for rank in range(world))
    weights = {name: memory.held for name, memory in model.weights(model.plan).items()}
    return ScalePlan(model, device, work, ranks, cut_stages(model.plan, weights, stages))


def describe(plan: ScalePlan) -> dict[str, Any]:
    """Return everything that the command shows, but for other numbers of ranks."""
    model, work = plan.model, plan.work
    stages = [describe_stage(plan, layers) for layers in plan.stages]
    needs = max(stage["needs_bytes"] for stage in stages)
    return {
        "model": model.name,
        "stored": model.stored,
        "quant": model.holding.quant,
        "compute_dtype": model.holding.compute,
        "layers": len(model.plan.layers),
        "tensor_parallel": len(plan.ranks),
        "pipeline_stages": len(stages),
        "device": asdict(plan.device),
        "workload": asdict(work),
        "stages": stages,
        "needs_bytes": needs,
        "fits": fits(needs, plan.device),
        "speeds": [
            decode_speed(plan, 0),
            decode_speed(plan, work.context - 1),
            prompt_speed(plan),
        ],
    }


def fits(needs: int, device: Device) -> bool | None:
    """Return whether a rank has the memory; None for a device whose memory is not known."""
    return None if device.memory_bytes is None else needs <= device.memory_bytes


def describe_stage(plan: ScalePlan, layers: range) -> dict[str, Any]:
    """Return the memory of a stage's fullest rank, and what it exchanges for one token."""
    every = [describe_memory(rank, layers, plan.device) for rank in plan.ranks]
    fullest = max(every, key=lambda found: int(found["needs_bytes"]))
    rank = plan.ranks[every.index(fullest)]
    exchanges = rank.exchanges(layers, 1, 1)
    return {
        "first_layer": layers.start,
        "last_layer": layers.stop - 1,
        **fullest,
        "least_needs_bytes": min(found["needs_bytes"] for found in every),
        "exchanges_per_token": [
            {
                "name": each.name,
                "times": each.times,
                "bytes": each.floats * each.width,
                "received_bytes": each.received(rank.world, rank.place),
            }
            for each in exchanges
        ],
        "received_bytes_per_token": sum(each.received(rank.world, rank.place) for each in exchanges),
        "handed_on_bytes_per_token": rank.handed_on(layers, plan.stages, 1),
    }


def describe_memory(rank: RankNeeds, layers: range, device: Device) -> dict[str, Any]:
    """Return what one rank of a stage needs, by what it is for."""
    kinds = rank.weights_by_kind(layers)
    if TABLE in kinds and rank.place != "cpu":
        beside = sum(memory.nbytes for kind, memory in kinds.items() if kind != TABLE)
        if device.memory_bytes is not None and kinds[TABLE].nbytes * TABLE_SHARE > device.memory_bytes - beside:
            kinds[TABLE] = WeightMemory(by_rows=kinds[TABLE].nbytes)  # in the host's memory, which the GPU reads by rows
    total = sum(kinds.values(), WeightMemory())
    running, kept = rank.kv_bytes(layers)
    others = {"buffer_bytes": rank.buffer_bytes(layers), "process_bytes": rank.process_bytes(total)}
    held = total.held
    return {
        "weights": {kind: asdict(kinds[kind]) for kind in KINDS if kind in kinds},
        "weight_bytes": held,
        "mapped_weight_bytes": total.mapped,
        "by_rows_weight_bytes": total.by_rows,
        "kv_bytes": running,
        "prefix_bytes": kept,
        **others,
        "needs_bytes": held + running + kept + sum(others.values()),
    }


# ---- speeds ----


def decode_speed(plan: ScalePlan, depth: int) -> dict[str, Any]:
    """Return the most tokens a second of all sequences behind `depth` positions, which pass the stages in as many groups."""
    groups = min(len(plan.stages), plan.work.batch)
    rows = math.ceil(plan.work.batch / groups)
    times = [_slowest(plan, layers, [(depth, 1)] * rows, rows) for layers in plan.stages]
    found: dict[str, Any] = {"test": "decode", "depth": depth, "batch": plan.work.batch, **_parts(times)}
    seconds = _total(times)
    if seconds is not None:
        period = max(seconds, groups * max(each.total_s or 0.0 for each in times))
        found |= {"seconds": period, "tok_s": plan.work.batch / period}
    return found


def prompt_speed(plan: ScalePlan) -> dict[str, Any]:
    """Return the most tokens a second of one prompt, whose chunks follow each other through the stages."""
    tokens, most = plan.work.prompt, -(-plan.work.rows // len(plan.stages))  # as the scheduler shares a step's rows
    ends = [0.0] * len(plan.stages)
    every = list[StepTime]()
    for start in range(0, tokens, most):
        rows = min(most, tokens - start)
        times = [_slowest(plan, layers, [(start, rows)], int(start + rows == tokens)) for layers in plan.stages]
        every += times
        before = 0.0
        for at, each in enumerate(times):
            before = ends[at] = max(before, ends[at]) + (each.total_s or 0.0)
    found: dict[str, Any] = {"test": "prompt", "tokens": tokens, "batch": 1, **_parts(every)}
    if _total(every) is not None and found["compute_s"] is not None:
        found |= {"seconds": ends[-1], "tok_s": tokens / ends[-1]}
    return found


def _slowest(plan: ScalePlan, layers: range, cases: Sequence[tuple[int, int]], wanted: int) -> StepTime:
    """Return the time of the rank for which the others of its stage wait."""
    times = [step_time(rank, plan.device, layers, plan.stages, cases, wanted) for rank in plan.ranks]
    return max(times, key=lambda each: each.total_s or 0.0)


def _total(times: Sequence[StepTime]) -> float | None:
    found = [each.total_s for each in times]
    return None if None in found else sum(each or 0.0 for each in found)


def _parts(times: Sequence[StepTime]) -> dict[str, Any]:
    """Return what the steps' times are made of, and the part that bounds them; None in place of what can't be told."""
    sums: dict[str, float | None] = {}
    for name in BOUNDS:
        own = [getattr(each, name) for each in times]
        sums[name] = None if None in own else sum(own)
    most = max(sums, key=lambda name: sums[name] or 0.0)
    return {
        "tok_s": None,
        "seconds": None,
        **sums,
        "bound": None if sums["read_s"] is None or sums["exchange_s"] is None else BOUNDS[most],
    }


# ---- other numbers of ranks ----


def other_sizes(plan: ScalePlan) -> list[dict[str, Any]]:
    """Return for every number of ranks that divides the query heads what the fullest rank needs, or why it can't be."""
    heads = math.gcd(*(layer.heads for layer in plan.model.plan.layers))
    found = list[dict[str, Any]]()
    for world in (number for number in range(1, heads + 1) if heads % number == 0):
        row: dict[str, Any] = {"tensor_parallel": world, "needs_bytes": None, "fits": None, "problem": None}
        try:
            other = make_plan(plan.model, plan.device, plan.work, world, len(plan.stages))
        except ConfigError as error:
            row["problem"] = str(error)
        else:
            needs = max(
                describe_memory(rank, layers, plan.device)["needs_bytes"] for rank in other.ranks for layers in other.stages
            )
            row |= {"needs_bytes": needs, "fits": fits(needs, plan.device)}
        found.append(row)
    return found
