"""The formats that checkpoints come in, one file each; add one here.

Owns the order in which they are asked: the first whose `sniff` says yes reads the file. Read `hf.py` for the plainest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import StoredTensor
from gemcutter.checkpoint.formats import compressed, gguf, gguf_towers, hf, hf_towers, mlx
from gemcutter.config import ModelConfig
from gemcutter.plan import ModelPlan
from gemcutter.tower_plan import TowerPlan


class Format(Protocol):
    """What a format's module exports. All of it looks at headers only."""

    @property
    def NAME(self) -> str:
        """Name the format for reports."""
        ...

    def sniff(self, source: Source) -> bool:
        """Return whether the checkpoint is of this format."""
        ...

    def config(self, source: Source, ignore: Sequence[str] = ()) -> ModelConfig:
        """Read the model's config. Raises ConfigError or CheckpointError with all problems."""
        ...

    def spell(self, name: str, part: str | None) -> str:
        """Return the name that the format's own tools write for a canonical parameter or part."""
        ...

    def pieces(self, source: Source, plan: ModelPlan) -> Iterator[StoredTensor]:
        """Yield every stored tensor under its canonical name, the parts of a packed one as one piece."""
        ...


FORMATS: tuple[Format, ...] = (gguf, mlx, compressed, hf)

# What yields the stored tensors of a tower, "vision" or "audio", by the name of the format.
TOWER_PIECES: dict[str, Callable[[Source, str, TowerPlan], Iterator[StoredTensor]]] = {
    gguf.NAME: gguf_towers.pieces,
    mlx.NAME: mlx.tower_pieces,
    compressed.NAME: compressed.tower_pieces,
    hf.NAME: hf_towers.pieces,
}
