"""Equal shares of a tensor for tensor parallelism: which elements of an axis one rank holds.

Owns the arithmetic of shares; refuses to know which axis of which tensor is cut, which `plan.py` says. Standard library only.
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
