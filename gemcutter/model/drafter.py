"""A drafter: an assistant's layers over its target's keys and values, of which it writes none.

Owns what lies around the layers: the target's embedding and a state go in, logits and the next state come out. The query position
stays the same for all drafts in a row, since no keys are added. Refuses to know sequences and sampling. Read `text.py` for the
layers, `engine/speculate/assistant.py` for who asks. Shape letters: S sequences, D the drafter's width, T the target's, V
vocabulary, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.errors import ConfigError
from gemcutter.model.text import Decoder
from gemcutter.ops.step import KVCache, Step
from gemcutter.ops.types import matrix, vector


@dataclass(frozen=True, slots=True)
class DraftLogits:
    """Logits of the next token, one row a sequence: over `ids_SC`, or where that is None over the whole vocabulary."""

    logits_SC: Tensor  # float32
    ids_SC: Tensor | None = None


class Drafter:
    """An assistant bound to its target. Raises ConfigError for one of another vocabulary or width."""

    def __init__(self, decoder: Decoder, target: Decoder) -> None:
        self.decoder, self.target = decoder, target
        plan, other = decoder.plan, target.plan
        if plan.backbone != other.hidden or plan.vocab != other.vocab:
            found = f"a hidden size of {plan.backbone} and {plan.vocab:,} tokens"
            raise ConfigError(f"the assistant was made for {found}, its target has {other.hidden} and {other.vocab:,}")

        self._table = matrix(decoder.params, "embed.tokens" if plan.tied_head else "head")
        # Rows of packed tables are gathered panel by panel: 4,096 of them take 20 times as long as the product with all.
        self._looks_near = bool(plan.centroids) and self._table.is_dense

    def start(self, step: Step) -> Step:
        """Complete a step of one row a sequence, for all drafts of a burst."""
        return self.decoder.prepare(step)

    def draft(self, ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache) -> tuple[DraftLogits, Tensor]:
        """Return the logits of the tokens after `ids_S`, and the states [S, T] from which the tokens after those are drafted.

        `states_ST` are the target's final-normed states of the rows that gave `ids_S`, or what this returned for them. `step` is
        one that `start` completed, `cache` the target's.
        """
        decoder = self.decoder
        with decoder.on_device():
            rows_ST = self.target.embed(ids_S)
            x_SD = decoder.multiply(torch.cat((rows_ST, states_ST.to(rows_ST.dtype)), dim=1), "draft.in")
            y_SD = decoder.run_layers(x_SD.contiguous(), step, cache)
            return self._head(y_SD), decoder.multiply(y_SD, "draft.out")

    def _head(self, y_SD: Tensor) -> DraftLogits:
        """Return logits of all tokens, or where tokens are sorted under centroids of those under the nearest ones.

        The latter are the same numbers, and the best of them nearly always the best of all.
        """
        plan = self.decoder.plan
        if not self._looks_near:
            return DraftLogits(self.decoder.logits(y_SD))
        near_SK = self.decoder.multiply(y_SD, "draft.centroids").float().topk(plan.centroid_top_k, dim=1).indices
        order = vector(self.decoder.params, "draft.order").view(plan.centroids, -1)
        ids_SC = order[near_SK].flatten(1).sort(dim=1).values  # ascending, as samplers draw from a whole vocabulary
        rows_SCD = self._table.gather(ids_SC.flatten(), torch.float32).view(*ids_SC.shape, -1)
        return DraftLogits(torch.einsum("scd,sd->sc", rows_SCD, y_SD.float()), ids_SC)
