"""One stage of a pipeline: a decoder's own layers between rows that come in and rows that go out.

The last stage has the requests: it embeds tokens, sends their rows to the first stage, and gets them back for its own layers and
the head. Between the two it can begin other steps, whose rows follow through the same stages; every stage takes them in one
order, so what a step reads has been written. Refuses to know sockets and who cuts. Read `text.py` for the layers,
`parallel/pipe.py` for the way of rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemcutter.ops.step import KVCache, Step
from gemcutter.ops.types import Pipe

if TYPE_CHECKING:
    from gemcutter.model.text import Decoder, Layer

Observer = Callable[[int, Tensor], None]  # layer index and its output rows
LayerInputs = Sequence[Tensor | None]  # the per-layer embeddings [N, P] or [M, P] of some layers, where a model has such


@dataclass(slots=True)
class BegunStep:
    """A step that was begun, and what it gives once it has passed all layers.

    In a pipeline its rows are in other stages; `layers` are its own ones as they were when it began, whatever adapters leave
    meanwhile, `early` and `late` what they get beside the rows.
    """

    step: Step
    cache: KVCache
    observe: Observer | None = None
    layers: Sequence[Layer] = ()
    early: LayerInputs = ()
    late: LayerInputs = ()
    states_MD: Tensor | None = None


class Pipeline:
    """The place of one decoder among `stages` stages; `pipe` is the way to the others."""

    def __init__(self, pipe: Pipe, stages: int) -> None:
        self.stages, self._pipe = stages, pipe
        self.begun = deque[BegunStep]()  # in the last stage: the oldest first

    def _receive(self, decoder: Decoder) -> list[Tensor]:
        """Wait for the next tensors, which come through the host's memory."""
        return [rows.to(decoder.device) for rows in self._pipe.receive()]

    def begin(self, decoder: Decoder, step: Step, cache: KVCache, observe: Observer | None = None) -> BegunStep:
        """Embed a prepared step's rows and send them on their way.

        `observe` will be called with the output of own layers, and of the last one before them.
        """
        assert decoder.plan.stage is not None
        first = decoder.plan.stage.first
        with decoder.together(lambda leader: leader.step(step, cache)), decoder.on_device():
            x_ND = decoder.embed_rows(step)
            layers, early, late = decoder.layer_inputs(x_ND, step)
            others = [ple_NP for ple_NP in early[:first] if ple_NP is not None]
            self._pipe.send([x_ND, torch.stack(others, dim=1)] if others else [x_ND])
        begun = BegunStep(step, cache, observe, layers, early[first:], late)
        self.begun.append(begun)
        return begun

    def finish(self, decoder: Decoder, begun: BegunStep) -> Tensor:
        """Return what a step gives that was begun, and complete those before it."""
        while begun.states_MD is None:
            self.finish_oldest(decoder)
        return begun.states_MD

    def finish_oldest(self, decoder: Decoder) -> None:
        """Pass the rows that come back first through the last layers."""
        begun = self.begun.popleft()
        with decoder.together(lambda leader: leader.finish()), decoder.on_device():
            (x_ND,) = self._receive(decoder)
            if begun.observe is not None and decoder.plan.stage is not None:
                begun.observe(decoder.plan.stage.layer_before, x_ND)
            begun.states_MD = decoder.run(begun.layers, x_ND, begun.step, begun.cache, begun.early, begun.late, begun.observe)

    def finish_all(self, decoder: Decoder) -> None:
        """Complete all steps that were begun; what was lost with a rank is forgotten."""
        while self.begun:
            if decoder.leader is not None and decoder.leader.problem is not None:
                self.begun.clear()
                return
            self.finish_oldest(decoder)

    def pass_on(self, decoder: Decoder, step: Step, cache: KVCache) -> None:
        """Run a prepared step in a stage other than the last: rows come in, pass its layers, and go out."""
        layers = decoder.body_of(step).layers
        x_ND, *ple = self._receive(decoder)
        own: LayerInputs = [None] * len(layers)
        if ple:
            own, ple = ple[0][:, : len(layers)].unbind(1), [ple[0][:, len(layers) :]]
        normed = None
        for layer, ple_NP in zip(layers, own, strict=True):
            x_ND, normed = layer.forward(x_ND, step, cache, ple_NP, normed)
        self._pipe.send([x_ND, *(each for each in ple if each.shape[1])])
