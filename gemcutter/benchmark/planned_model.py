"""A model that is planned for, from headers or from a size's geometry: what a file stores of it, and how it would be held.

Owns the two ways there, and the step to what one tensor-parallel rank holds. Nothing is loaded and no tensor is made. Refuses to
know devices' figures and times: read `scale.py` for these, `checkpoint/load/memory_needs.py` for the count of bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gemcutter.benchmark.synthetic import QUANTS, plan_of
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.checkpoint.load.memory_needs import Holding, StoredPart, WeightMemory
from gemcutter.checkpoint.load.slices import UNITS, cuts_of
from gemcutter.errors import ConfigError
from gemcutter.ops.backend import Backend
from gemcutter.ops.registry import CPU, TRITON
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan
from gemcutter.quant.gguf_blocks import TYPES
from gemcutter.quant.recipes import BlockScheme, Recipe, Scheme, widest_group

DENSE_BYTES = 2  # of an element of a preset's dense matrices, which are bfloat16
SCALE_BYTES = 4  # of a group of MLX's affine layout: scale and bias
GROUP = re.compile(r"g(\d+)")  # in a scheme's name
MICRO_GROUPS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
BACKENDS: Mapping[str, Backend] = {"cpu": CPU, "cuda": TRITON}  # that a device is planned with, whatever this machine has


@dataclass(frozen=True)
class PlannedModel:
    """A whole plan, the stored parts of each matrix, how they are held, and the columns of an MLP that stay together."""

    name: str
    stored: str
    plan: ModelPlan
    parts: Mapping[str, tuple[StoredPart, ...]]
    holding: Holding
    unit: int

    def of_rank(self, rank: int, world: int) -> ModelPlan:
        """Return the plan of one rank, the whole plan where there is one. Raises ConfigError for ranks that can't share it."""
        if world == 1:
            return self.plan
        plan = self.plan.shard(rank, world, self.unit, cuts_ple=self.holding.device == "cuda")
        for spec in plan.params():
            groups = [group_of(part.dtype) for part in self.parts.get(spec.name, ()) if part.is_packed]
            for taken in spec.slices if spec.shard_axis == -1 else ():
                if any(edge % group for edge in (taken.start, taken.stop) if edge != taken.of for group in groups):
                    why = f"{spec.name} is packed in groups of {max(groups)} columns, one of which would be cut in two"
                    raise ConfigError(f"tensor parallelism over {world} ranks: {why}; use fewer ranks")
        return plan

    def weights(self, plan: ModelPlan) -> dict[str, WeightMemory]:
        """Return the bytes of every parameter of a rank's plan."""
        return {spec.name: self._weight(spec) for spec in plan.params()}

    def _weight(self, spec: ParamSpec) -> WeightMemory:
        parts = self.parts.get(spec.name, ())
        shapes = [[cut.shape(part.shape) for cut in cuts] for part, cuts in zip(parts, cuts_of(spec, parts), strict=True)]
        return self.holding.weight(spec, parts, shapes, [False] * len(parts))


def from_checkpoint(name: str, checkpoint: Checkpoint, compute: str, place: str, quant: str | None) -> PlannedModel:
    """Plan for a checkpoint whose headers were read. Raises ConfigError for an assistant, which runs beside its target."""
    if checkpoint.plan.is_drafter:
        raise ConfigError(f"{name} is an assistant, of which every rank of its target holds a slice; plan for its target")
    parts = {
        spec.name: tuple(StoredPart.of(piece.data) for piece in checkpoint.matched.pieces[spec.name])
        for spec in checkpoint.plan.params()
        if len(spec.shape) > 1
    }
    kinds = sorted({part.dtype for found in parts.values() for part in found})
    holding = Holding(compute, place, BACKENDS[place].packing, quant)
    return PlannedModel(name, ", ".join(kinds), checkpoint.plan, parts, holding, _column_unit(parts, quant))


def from_preset(preset: str, quant: str, compute: str, place: str) -> PlannedModel:
    """Plan for a released size, stored as a quantization says. Raises ConfigError for names that are none."""
    if quant not in QUANTS:
        raise ConfigError(f"quant: expected {', '.join(QUANTS)}, found {quant!r}")
    plan, recipe = plan_of(preset), QUANTS[quant]
    parts = {spec.name: tuple(_stored(spec, recipe)) for spec in plan.params() if len(spec.shape) > 1}
    holding = Holding(compute, place, BACKENDS[place].packing)
    return PlannedModel(preset, quant, plan, parts, holding, _column_unit(parts, None))


def _stored(spec: ParamSpec, recipe: Recipe) -> Iterator[StoredPart]:
    """Yield what a file holds of a matrix: its parts one by one, each in the recipe's scheme for it."""
    scheme = recipe.scheme(spec.name, spec.shape[-1])
    for rows in [rows for _, rows in spec.parts] or [spec.shape[-2]]:
        shape = (*spec.shape[:-2], rows, spec.shape[-1])
        if scheme is None:
            yield StoredPart("BF16", shape, DENSE_BYTES * math.prod(shape), is_packed=False)
        else:
            yield StoredPart(scheme.name, shape, int(math.prod(shape) * stored_bits(scheme) / 8), is_packed=True)


def stored_bits(scheme: Scheme) -> float:
    """Return the bits of an element in a file, its share of the scales included."""
    if isinstance(scheme, BlockScheme):
        return 8 * TYPES[scheme.name].nbytes / TYPES[scheme.name].values
    return scheme.bits + 8 * SCALE_BYTES / scheme.group


def _column_unit(parts: Mapping[str, Sequence[StoredPart]], quant: str | None) -> int:
    """Return the fewest columns of an MLP's out-projection that cut no group of any layer, as the loader finds them.

    Raises ConfigError where no cut is possible.
    """
    packed = [part for name, found in parts.items() if name.endswith(".mlp.out") for part in found if part.is_packed]
    groups = {group_of(part.dtype) for part in packed}
    if quant is not None:
        groups.add(widest_group(quant))
    for unit in UNITS:
        if all(unit % group == 0 for group in groups):
            return unit
    raise ConfigError(f"the MLP's columns are packed in groups of {max(groups)}, which no ranks can share")


def group_of(scheme: str) -> int:
    """Return how many columns of a packed matrix stay together: a block, or a group that has its scale; 1 where none do."""
    if scheme in TYPES:
        return TYPES[scheme].values
    found = GROUP.search(scheme)
    return int(found[1]) if found else MICRO_GROUPS.get(scheme, 1)


EXPERTS, TABLE = "experts", "per-layer table"
ROLES = {
    "attn.in": "attention",
    "attn.out": "attention",
    "mlp.in": "MLP",
    "mlp.out": "MLP",
    "moe.router": EXPERTS,
    "moe.in": EXPERTS,
    "moe.out": EXPERTS,
    "embed.tokens": "embeddings and head",
    "head": "embeddings and head",
    "embed.ple": TABLE,
    "ple.in": "per-layer embeddings",
    "ple.gate": "per-layer embeddings",
    "ple.out": "per-layer embeddings",
}
OTHERS = "norms and scales"
KINDS = (*dict.fromkeys(ROLES.values()), OTHERS)


def kind_of(spec: ParamSpec) -> str:
    """Return which kind of weight a parameter is, one of KINDS."""
    return ROLES.get(spec.name.split(".", 2)[2] if spec.name.startswith("layers.") else spec.name, OTHERS)
