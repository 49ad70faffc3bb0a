"""What kernels are given when they are bound: the primitive ops beneath, the precision, and the parameters.

Owns the signatures of primitive ops and `OpContext`; refuses arithmetic. Read `reference.py` for what each op computes,
`registry.py` for which implementation is selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gemcutter.ops.lora import add_low_rank
from gemcutter.ops.step import NO_ADAPTERS, AdapterRows, KVCache, Rotation, Step
from gemcutter.ops.turns import Turns
from gemcutter.plan import LayerPlan
from gemcutter.quant import Weight, dequantize
from gemcutter.quant.lora import Delta
from gemcutter.shard import Shard, Slice

TABLE_ROWS = 64  # of a mapped table that are gathered until its pages are given back
CHUNK_ELEMENTS = 1 << 22  # of a weight that is dequantized at a time

Param = Weight | Tensor
AdapterDeltas = Mapping[str, Sequence[Delta]]  # what an adapter adds to weights, by parameter
Linear = Callable[[Tensor, Weight], Tensor]  # rows [N, D] and a matrix [F, D] to [N, F]
Attention = Callable[[Tensor, Step, KVCache], Tensor]  # queries [N, H, E] to outputs [N, H, E]
Draft = Callable[[Tensor, Tensor, Step, KVCache, int, bool], "Drafts"]  # ids [S], states [S, T], how many tokens, with logits?
VisionLayer = Callable[[Tensor, "VisionRows"], Tensor]  # patches [P, D] to [P, D]; every piece of the work takes a turn
# Positions [T, D] of sounds whose first and last positions are listed to [T, D]; every piece of the work takes a turn.
AudioLayer = Callable[[Tensor, Sequence[tuple[int, int]], Turns], Tensor]
LayerOutput = tuple[Tensor, Tensor | None]  # rows [M, D], and their norm under the next layer's first weight if it was made


@dataclass(frozen=True, slots=True)
class Drafts:
    """K tokens in a row for S sequences, each the likeliest, how likely each was, and the states behind the last one.

    Logits are those of the last token, over the candidates `ids_SC`, in any order, or where that is None over the whole
    vocabulary; None where nobody asked for them.
    """

    tokens_KS: Tensor  # int64
    chances_KS: Tensor  # float32
    states_ST: Tensor
    logits_SC: Tensor | None = None  # float32
    ids_SC: Tensor | None = None


@dataclass(frozen=True)
class VisionRows:
    """What all layers of a vision tower share in one pass over the patches of some images, made once.

    `rotations` turn one half of each head by the column of a patch and the other by its row; `edges` are the first patch of each
    image and the one after its last. `turns` are taken by those who compute.
    """

    rotations: tuple[Rotation, Rotation]
    edges: Sequence[tuple[int, int]]
    turns: Turns
    buffers: list[Tensor] = field(default_factory=list)

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Return cos and sin of both rotations side by side, [P, 1, head dim / 2] in float32."""
        cos, sin = (torch.cat([rotation[each] for rotation in self.rotations], dim=-1).float() for each in (0, 1))
        return cos.contiguous(), sin.contiguous()

    @cached_property
    def starts(self) -> Tensor:
        """Return the first patch of each image, and the one after the last."""
        return torch.tensor([0, *(stop for _, stop in self.edges)], dtype=torch.long)

    def scratch(self, floats: int) -> Tensor:
        """Return so many floats, at least, for a layer to use until it returns; their values are anything."""
        if not self.buffers or len(self.buffers[0]) < floats:
            self.buffers[:] = [torch.empty(floats)]
        return self.buffers[0]


@dataclass(frozen=True, slots=True)
class AudioScales:
    """What an audio layer scales queries [E] and keys by, and its projected distances [P, H, E], the farthest past first.

    A query's product with the distance of a key is added to the key's score.
    """

    query_E: Tensor
    key: float
    distances_PHE: Tensor


@dataclass(frozen=True, slots=True)
class Precision:
    """In which numbers a model is computed.

    `compute` is the dtype that was asked for: constants are rounded to it, the cache holds it. `rows` is the residual stream's,
    wider where kernels keep it in float32. `activations` says how native matmuls take the rows of packed weights: "float32",
    "int8" or "bf16".
    """

    compute: torch.dtype = torch.float32
    rows: torch.dtype = torch.float32
    activations: str = "float32"


class Ranks(Protocol):
    """The tensor-parallel ranks of which this process is one. All of them make the same calls in the same order."""

    @property
    def shard(self) -> Shard:
        """Return which rank of how many this is."""

    @property
    def view(self) -> int | None:
        """Return the address of the native library's `gc_ranks`, whose sums it computes itself; None where it can't."""

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x: the same on each of them, bit for bit. Raises RankError if a rank is gone."""

    def join(self, x_RV: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, [R, widths[rank]] each, side by side. Raises RankError if a rank is gone."""


class Pipe(Protocol):
    """The stages of a pipeline before and after this one. What arrives has the order in which it was sent."""

    def send(self, rows: Sequence[Tensor]) -> None:
        """Let the next stage have some tensors; returns before they are there."""

    def receive(self) -> list[Tensor]:
        """Wait for the next tensors of the stage before. Raises RankError once a stage is gone."""


@dataclass(frozen=True, slots=True)
class StaticShape:
    """A step over memory that never moves: up to `sequences` sequences of `context` tokens, `each` rows of each.

    `source` says what makes its tokens, as `engine/cuda_graphs.py` spells it.
    """

    context: int
    sequences: int
    each: int
    source: str


class StepLeader(Protocol):
    """Who tells the other ranks of what this one is about to do with them; what goes wrong meanwhile ends them all."""

    @property
    def problem(self) -> str | None:
        """Return why the ranks have ended, None while they run."""

    def step(self, step: Step, cache: KVCache) -> AbstractContextManager[None]:
        """Let them run a step. Raises RankError if a rank is gone."""

    def finish(self) -> AbstractContextManager[None]:
        """Let those of this stage finish the oldest step that was begun. Raises RankError if a rank is gone."""

    def close(self) -> None:
        """Let them end, and give this process back what they shared with it."""

    def load_adapter(self, name: str, path: str, ignore: Sequence[str]) -> None:
        """Let them load an adapter that this rank found to fit; any thread may ask. Raises RankError if a rank is gone."""

    def unload_adapter(self, name: str) -> None:
        """Let them forget an adapter; any thread may ask. Raises RankError if a rank is gone."""

    def watch(self, watcher: Callable[[str], None]) -> None:
        """Let somebody know, in any thread, when the ranks end because of a problem, and of which."""

    def drafts(
        self, ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache, count: int | None
    ) -> AbstractContextManager[None]:
        """Let them draft so many tokens in a row, or the logits of one (None). Raises RankError if a rank is gone."""

    def head(self, h_RD: Tensor) -> AbstractContextManager[None]:
        """Let them run the head over some states. Raises RankError if a rank is gone."""

    def capture(self, static: StaticShape, cache: KVCache) -> AbstractContextManager[None]:
        """Let them capture a static step as a graph. Raises RankError if a rank is gone."""

    def static_step(self, static: StaticShape, cache: KVCache, numbers: Tensor) -> AbstractContextManager[None]:
        """Let them run a static step over these bytes, the last of its numbers. Raises RankError if a rank is gone."""


class TablePages:
    """The pages of a mapped table from which rows are gathered. `release` gives them back; None: they need not be.

    For one page that is read the kernel maps all those around it that lie in the page cache, a megabyte or more. These cost
    nothing, but count as this process' memory.
    """

    def __init__(self) -> None:
        self.release: Callable[[], None] | None = None
        self._rows = 0

    def pieces(self, rows: int) -> Iterator[slice]:
        """Yield which of a step's rows to gather next, one piece at least; pages are given back once many rows were gathered."""
        step = max(1, rows if self.release is None else TABLE_ROWS)
        for start in range(0, max(1, rows), step):
            yield slice(start, start + step)
            self._count(min(step, rows - start))

    def _count(self, rows: int) -> None:
        self._rows += rows
        if self.release is not None and self._rows >= TABLE_ROWS:
            self.release()
            self._rows = 0


@dataclass(frozen=True, slots=True)
class OpContext:
    """The primitive ops that a layer op or model op is built from, and the precision.

    `low_rank` multiplies with adapters' factors; None where no adapter is loaded, or
    where steps with adapters use another set of ops. `ranks` are those that share the
    model, None where one process holds all of it. `table_pages` are those of the table of
    per-layer embeddings.
    """

    linear: Linear
    precision: Precision = Precision()
    low_rank: Linear | None = None
    ranks: Ranks | None = None
    table_pages: TablePages = field(default_factory=TablePages)

    def summed(self, x: Tensor) -> Tensor:
        """Return a product of this rank's columns as that of all columns: itself where there is one rank."""
        return x if self.ranks is None else self.ranks.sum(x)

    def gatherer(self, gather: Callable[[Tensor], Tensor], held: Slice) -> Callable[[Tensor], Tensor]:
        """Return what gathers rows [N, D] of a whole table by their numbers [N], given what does so of the rows that are held.

        Where ranks share a table, each brings the rows that it holds, and the others zeros.
        """
        ranks = self.ranks
        if ranks is None or held.is_whole:
            return gather

        def rows(ids_N: Tensor) -> Tensor:
            is_missing_N = (ids_N < held.start) | (ids_N >= held.stop)
            found = gather((ids_N - held.start).clamp(0, held.size - 1))
            return ranks.sum(found.masked_fill(is_missing_N[:, None], 0))

        return rows

    def table_gatherer(self, gather: Callable[[Tensor], Tensor], held: Slice) -> Callable[[Tensor], Tensor]:
        """Return what `gatherer` does for the table of per-layer embeddings, whose pages are given back on the way."""

        def rows(ids_N: Tensor) -> Tensor:
            found = [gather(ids_N[piece]) for piece in self.table_pages.pieces(len(ids_N))]
            return found[0] if len(found) == 1 else torch.cat(found)

        return self.gatherer(rows, held)

    @property
    def is_adapted(self) -> bool:
        """Return whether products may add what adapters change."""
        return self.low_rank is not None

    def linear_lora(self, x_ND: Tensor, weight: Weight, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        """Multiply rows [N, D] with a matrix [F, D] and add the changes of the adapters that some rows want: [N, F]."""
        out = self.linear(x_ND, weight)
        if adapters and weight.deltas and self.low_rank is not None:
            add_low_rank(out, x_ND, weight, adapters, self.low_rank)
        return out


def matrix(params: Mapping[str, Param], name: str) -> Weight:
    """Return a parameter that must be a matrix."""
    found = params[name]
    assert isinstance(found, Weight), name
    return found


def vector(params: Mapping[str, Param], name: str) -> Tensor:
    """Return a parameter that must be a plain tensor: a float32 vector."""
    found = params[name]
    assert isinstance(found, Tensor), name
    return found


def rounded_root(size: int, context: OpContext) -> float:
    """Return the square root of a size as the compute dtype holds it."""
    return float(torch.tensor(size**0.5, dtype=context.precision.compute))


def closing_scale(layer: LayerPlan, params: Mapping[str, Param], op: str) -> float:
    """Return the layer's scalar in the op that closes the layer, "ple_gate" or else "mlp"; 1 in any other."""
    return float(vector(params, "scale")) if op == ("ple_gate" if layer.ple_dim else "mlp") else 1.0


def has_finite_values(param: Param) -> bool:
    """Return whether all values of a parameter are finite."""
    if isinstance(param, Weight):
        return all(bool(torch.isfinite(dequantize(chunk)).all()) for chunk in param.row_chunks(CHUNK_ELEMENTS))
    return bool(torch.isfinite(param).all())
