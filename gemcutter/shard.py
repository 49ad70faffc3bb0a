"""What one of several processes holds of a model: shares of tensors, and stages of layers.

Owns the arithmetic of shares and of places; refuses to know which axis of which tensor is cut, and where layers are, which
`plan.py` says. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcutter.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements `start` to `stop - 1` of axis `axis`: what one tensor-parallel rank holds of a tensor, or of one of its parts.

    `of` is the size of the whole on that axis.
    """

    axis: int
    start: int
    stop: int
    of: int

    @property
    def size(self) -> int:
        """Count the elements held along the axis."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Return whether nothing is left to other ranks."""
        return self.size == self.of


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `world` tensor-parallel ranks."""

    rank: int
    world: int

    def cut(self, axis: int, size: int, unit: int = 1, is_even: bool = True) -> Slice:
        """Return this rank's share of an axis whose blocks of `unit` elements stay whole; of few blocks several ranks hold one.

        The last block may be smaller. Where shares need not be even, some ranks hold one block more than others. Raises
        ConfigError where the ranks can't share evenly, or there is no block for each of several that need not.
        """
        blocks = -(-size // unit)
        if not is_even:
            if blocks < self.world:
                raise ConfigError(f"{blocks} blocks of {unit} can't be shared by {self.world} ranks")
            first, last = (rank * blocks // self.world * unit for rank in (self.rank, self.rank + 1))
            return Slice(axis, first, min(last, size), size)
        if size % unit or (blocks % self.world and self.world % blocks):
            raise ConfigError(f"{blocks} blocks of {unit} can't be shared evenly by {self.world} ranks")
        first = self.rank * blocks // self.world
        return Slice(axis, first * unit, (first + max(1, blocks // self.world)) * unit, size)


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `first` to `stop - 1` of the `count` that a model has: what one stage of a pipeline holds.

    The last stage has all that belongs to no layer, too: requests begin and end there, with the token table and the head.
    """

    first: int
    stop: int
    count: int

    @property
    def is_last(self) -> bool:
        """Return whether the stage ends with the model's last layer."""
        return self.stop == self.count

    @property
    def layer_before(self) -> int:
        """Return the last layer of the stage before; -1 in the first stage."""
        return self.first - 1

    def holds(self, layer: int | None) -> bool:
        """Return whether the stage has what belongs to a layer, or to none (None)."""
        return self.is_last if layer is None else self.first <= layer < self.stop


@dataclass(frozen=True, slots=True)
class Place:
    """Process `number` of a model on `tensor_parallel` x `pipeline_parallel` processes.

    Neighbours in number share the layers of a stage. Process 0 leads: it has the requests, and so the last stage; the next ones
    have the first stage, and so on.
    """

    number: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def count(self) -> int:
        """Count all processes."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def shard(self) -> Shard:
        """Return which of a stage's ranks this is."""
        return Shard(self.number % self.tensor_parallel, self.tensor_parallel)

    @property
    def stage(self) -> int:
        """Return which stage the process belongs to, in the order of layers."""
        return (self.number // self.tensor_parallel - 1) % self.pipeline_parallel

    @property
    def next(self) -> int:
        """Return the number of the process that this one sends its rows to."""
        return (self.number + self.tensor_parallel) % self.count

    @property
    def previous(self) -> int:
        """Return the number of the process whose rows this one gets."""
        return (self.number - self.tensor_parallel) % self.count
