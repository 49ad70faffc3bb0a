"""What a model needs on several ranks, and how fast they can be: memory, exchanges and times of each pipeline stage's ranks.

Owns the arithmetic over rank plans: which bytes lie where, what a step reads, computes and exchanges, and how these become times.
Times are bounds, as `roofline.py`'s ceilings are: no launch, no wait and no cache is counted. Refuses to know devices by name and
how stages are chosen: that is in `devices.py` and `stages.py`. Read `scale_report.py` for what is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from gemcutter.benchmark import roofline
from gemcutter.benchmark.devices import Device
from gemcutter.benchmark.planned_model import BACKENDS, EXPERTS, PlannedModel, kind_of
from gemcutter.checkpoint.load.held import ITEM_BYTES
from gemcutter.checkpoint.load.memory_needs import (
    MOST_PACKING_BYTES,
    PIECE_BYTES,
    PROCESS_BYTES,
    WeightMemory,
    kv_widths,
    step_memory,
)
from gemcutter.engine.memory import page_counts, prefix_pages
from gemcutter.parallel.shared_ranks import SLOT_FLOATS
from gemcutter.param_spec import ParamKind, ParamSpec
from gemcutter.plan import LayerPlan, ModelPlan
from gemcutter.shard import Stage

FLOAT_BYTES = 4  # of what ranks exchange on a CPU, and of logits everywhere


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to run at once: `batch` sequences of up to `context` tokens, in steps of up to `rows` rows; how it is cached."""

    context: int
    batch: int = 1
    rows: int = 512
    prompt: int = 2048
    kv: str | None = None
    prefix_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the ranks of a stage exchange in one step: so often so many floats of `width` bytes, summed or joined."""

    name: str
    times: int
    floats: int
    width: int
    is_sum: bool = True

    def received(self, world: int, place: str) -> float:
        """Count the bytes that one rank receives.

        Ranks of one host read every other rank's part from shared memory. GPUs sum in a ring: each part travels twice, but for
        the share that a rank has already.
        """
        payload = self.times * self.floats * self.width
        if not self.is_sum:
            return payload * (world - 1) / world
        return payload * (world - 1) * (1.0 if place == "cpu" else 2 / world)


class RankNeeds:
    """One rank's plan with the bytes of all that it holds; stages ask for the layers that are theirs."""

    def __init__(self, model: PlannedModel, rank: int, world: int, work: Workload) -> None:
        self.model, self.world, self.work = model, world, work
        self.plan: ModelPlan = model.of_rank(rank, world)
        self.place, self.compute = model.holding.device, model.holding.compute
        self.weights = model.weights(self.plan)
        self.specs = tuple(self.plan.params())
        self.kv, self.prefixes = self._kv_bytes()

    def of_stage(self, spec: ParamSpec, layers: range) -> bool:
        """Return whether the stage of some layers holds a parameter."""
        return Stage(layers.start, layers.stop, len(self.plan.layers)).holds(spec.layer)

    # ---- memory ----

    def weights_by_kind(self, layers: range) -> dict[str, WeightMemory]:
        """Return the bytes of each kind of weights that a stage holds."""
        found = dict[str, WeightMemory]()
        for spec in self.specs:
            if self.of_stage(spec, layers):
                kind = kind_of(spec)
                found[kind] = found.get(kind, WeightMemory()) + self.weights[spec.name]
        return found

    def _kv_bytes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return the bytes of each writer's pages: those of running sequences, and those kept for prompts that begin alike."""
        work, plan, backend = self.work, self.plan, BACKENDS[self.place]
        itemsize, scale_bytes = kv_widths(self.compute, work.kv)
        compact = {layer.index for layer in plan.writers if backend.is_compact(layer)}
        kept = prefix_pages(plan, work.context, work.batch, work.prefix_bytes, itemsize, compact, scale_bytes=scale_bytes)
        counts = page_counts(plan, work.context, work.rows, work.batch)

        def size(layer: LayerPlan, pages: int) -> int:
            return int(pages * counts[layer.group].tokens * layer.kv_bytes(itemsize, layer.index in compact, scale_bytes))

        running = {layer.index: size(layer, counts[layer.group].pages) for layer in plan.writers}
        return running, {layer.index: size(layer, kept[layer.group]) for layer in plan.writers}

    def kv_bytes(self, layers: range) -> tuple[int, int]:
        """Return the bytes of a stage's keys and values: of running sequences, and of kept beginnings."""
        running, kept = (sum(found.get(index, 0) for index in layers) for found in (self.kv, self.prefixes))
        return running, kept

    def buffer_bytes(self, layers: range) -> int:
        """Estimate the rows of a step on their way, the logits of a batch, and slots for exchanges."""
        logits = FLOAT_BYTES * self.work.batch * self.plan.vocab if layers.stop == len(self.plan.layers) else 0
        slots = 2 * FLOAT_BYTES * SLOT_FLOATS if self.world > 1 and self.place == "cpu" else 0
        return step_memory(self.plan, self.work.rows) + logits + slots

    def process_bytes(self, weights: WeightMemory) -> int:
        """Estimate what a process on a CPU takes beside, at its most while weights are packed; a GPU's is the host's."""
        if self.place != "cpu":
            return 0
        packing = MOST_PACKING_BYTES if weights.resident > weights.mapped else 0
        return PROCESS_BYTES + PIECE_BYTES * self.plan.vocab + packing

    # ---- what a step takes ----

    def exchanges(self, layers: range, rows: int, wanted: int) -> list[Exchange]:
        """List what a step of some rows, of which `wanted` get logits, exchanges with the stage's other ranks."""
        if self.world == 1:
            return []
        plan, last = self.plan, layers.stop == len(self.plan.layers)
        width = ITEM_BYTES[BACKENDS[self.place].row_dtype(self.compute)]
        own = [plan.layers[index] for index in layers]
        passing = sum(plan.whole_rows(layer, rows, wanted) for layer in own)
        times = sum(plan.whole_rows(layer, rows, wanted) > 0 for layer in own)
        floats = passing * plan.hidden // max(1, times)
        found = [Exchange("embedding", 1, rows * plan.hidden, width)] if last else []
        if last and plan.cuts_ple and plan.ple_dim:
            spans = 2 if 0 < wanted < rows else 1  # layers that all rows pass, and those that only wanted ones do
            passed = sum(plan.whole_rows(layer, rows, wanted) for layer in plan.layers)
            found.append(Exchange("per-layer rows", spans, passed * plan.ple_dim // spans, width))
        found += [Exchange(name, times, floats, width) for name in ("attention", "MLP")]
        found += [Exchange(EXPERTS, times, floats, width)] if any(layer.moe for layer in own) else []
        found += [Exchange("logits", 1, wanted * plan.vocab, FLOAT_BYTES, is_sum=False)] if last and wanted else []
        return [each for each in found if each.times]

    def handed_on(self, layers: range, stages: Sequence[range], rows: int) -> int:
        """Count the bytes that a stage sends to the next one: rows of states, and per-layer embeddings of others' layers.

        The last stage embeds rows and sends them to the first one; its own per-layer embeddings stay with it.
        """
        if len(stages) == 1:
            return 0
        first = layers.stop % len(self.plan.layers)  # of the layers that are still to come
        width = ITEM_BYTES[BACKENDS[self.place].row_dtype(self.compute)]
        return width * rows * (self.plan.hidden + (stages[-1].start - first) * self.plan.ple_dim)

    def weight_reads(self, layers: range, rows: int, wanted: int) -> float:
        """Count the bytes of weights that a step reads, of experts as many as the fullest rank has chosen ones."""
        total, last = 0.0, layers.stop == len(self.plan.layers)
        for spec in self.specs:
            index = spec.layer
            if not self.of_stage(spec, layers) or (index is not None and not self._passes(index, rows, wanted)):
                continue
            nbytes = self.weights[spec.name].nbytes
            if not (last and wanted) and spec.name in ("embed.tokens", "head"):
                total += rows * nbytes / spec.shape[0] if spec.name == "embed.tokens" else 0.0  # the head is not asked
            else:
                total += roofline.read_bytes(self.plan, spec, nbytes, rows) * self._crowding(spec, rows)
        return total

    def _passes(self, index: int, rows: int, wanted: int) -> bool:
        layer = self.plan.layers[index]
        return layer.drops_rows or self.plan.whole_rows(layer, rows, wanted) > 0

    def _crowding(self, spec: ParamSpec, rows: int) -> float:
        """Return how many more experts than on average the fullest rank reads, for whom the others wait in every layer."""
        if spec.kind is not ParamKind.EXPERTS or self.world == 1:
            return 1.0
        moe = next(layer.moe for layer in self.plan.layers if layer.moe)
        chosen = moe.experts * self.plan.read_share(spec, rows)
        return crowding(moe.experts, round(chosen), self.world)

    def kv_reads(self, layers: range, tokens: int) -> float:
        """Count the bytes of keys and values that the row at position tokens - 1 reads."""
        itemsize, scale_bytes = kv_widths(self.compute, self.work.kv)
        backend, every = BACKENDS[self.place], self.plan.layers
        read = ((every[every[index].kv_layer], every[index].visible(tokens)) for index in layers)  # who wrote it, and how much
        return sum((source.kv_bytes(itemsize, backend.is_compact(source), scale_bytes) * seen for source, seen in read), 0.0)

    def flops(self, layers: range, depth: int, rows: int, wanted: int) -> int:
        """Count the operations of `rows` more rows of one sequence after `depth`, the last `wanted` of which get logits."""
        every, head = self.plan.layers, 2 * self.plan.head_rows.size * self.plan.hidden * wanted
        found = sum(
            self.plan.layer_flops(every[index], depth + rows, wanted) - self.plan.layer_flops(every[index], depth, 0)
            for index in layers
        )
        return found + (head if layers.stop == len(every) else 0)


@cache
def crowding(experts: int, chosen: int, world: int) -> float:
    """Return the mean of the most experts that one of `world` ranks holds of `chosen` different ones, over the mean of all.

    Every choice is equally likely. Exact: ways to choose at most m on each rank are a coefficient of a power of a polynomial.
    """
    held = experts // world
    ways, before, mean = math.comb(experts, chosen), 0, 0.0
    for most in range(1, min(held, chosen) + 1):
        term = [math.comb(held, count) for count in range(most + 1)]
        power = [1]
        for _ in range(world):
            power = _product(power, term, chosen)
        found = power[chosen] if chosen < len(power) else 0
        mean += most * (found - before) / ways
        before = found
    return mean * world / chosen if chosen else 1.0


def _product(one: Sequence[int], other: Sequence[int], degree: int) -> list[int]:
    found = [0] * min(len(one) + len(other) - 1, degree + 1)
    for at, left in enumerate(one):
        for place, right in enumerate(other[: len(found) - at]):
            found[at + place] += left * right
    return found


# ---- times ----


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step takes in a stage at the least: reading and computing overlap, exchanges do not. None: a rate is unknown."""

    read_s: float | None
    compute_s: float | None
    exchange_s: float | None

    @property
    def total_s(self) -> float | None:
        """Return the time of the whole step; None where it can't be told."""
        if self.read_s is None or self.exchange_s is None:
            return None
        return max(self.read_s, self.compute_s or 0.0) + self.exchange_s


def step_time(
    rank: RankNeeds, device: Device, layers: range, stages: Sequence[range], cases: Sequence[tuple[int, int]], wanted: int
) -> StepTime:
    """Return the time of a step in one of some stages: of each sequence (depth, rows), of which `wanted` in all get logits."""
    rows, is_decoding = sum(count for _, count in cases), all(count == 1 for _, count in cases)
    read = rank.weight_reads(layers, rows, wanted)
    if is_decoding:
        read += sum(rank.kv_reads(layers, depth + 1) for depth, _ in cases)
    flops = sum(rank.flops(layers, depth, count, min(count, wanted)) for depth, count in cases)
    return StepTime(
        None if device.bandwidth is None else read / device.bandwidth,
        None if device.flops is None else flops / device.flops,
        exchange_time(rank, device, layers, stages, rows, wanted),
    )


def exchange_time(
    rank: RankNeeds, device: Device, layers: range, stages: Sequence[range], rows: int, wanted: int
) -> float | None:
    """Return the time of a step's exchanges within a stage and of handing on its rows; None for an unknown link."""
    found, sent = rank.exchanges(layers, rows, wanted), rank.handed_on(layers, stages, rows)
    if not found and not sent:
        return 0.0
    if device.link_bandwidth is None or device.link_latency_s is None:
        return None
    received = sum(each.received(rank.world, rank.place) for each in found) + sent
    times = sum(each.times for each in found) + (sent > 0)
    return times * device.link_latency_s + received / device.link_bandwidth
