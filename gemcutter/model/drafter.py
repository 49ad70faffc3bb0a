"""A drafter: an assistant's layers over its target's keys and values, of which it writes none.

Owns what lies around the layers: the target's embedding and a state go in, tokens, logits and the next state come out. The query
position stays the same for all drafts in a row, since no keys are added. Refuses to know sequences and sampling. Read `text.py`
for the layers, `engine/speculate/assistant.py` for who asks. Shape letters: S sequences, D the drafter's width, T the target's, V
vocabulary, C candidates, K drafts in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.model.text import NO_CONTEXT, Decoder
from gemcutter.ops.registry import select_kernel
from gemcutter.ops.step import KVCache, Step
from gemcutter.ops.types import Draft, Drafts, Param, matrix, rounded_root, vector
from gemcutter.plan import ModelPlan


def sort_under_centroids(plan: ModelPlan, params: Mapping[str, Param]) -> dict[str, Param]:
    """Return an assistant's parameters with the head's rows in the order of `draft.order`, those under one centroid together.

    So the nearest ones are runs of neighbouring rows, which kernels can read whole. Where there are no centroids, nothing
    changes. Raises CheckpointError for an order that does not name every token once.
    """
    if not plan.centroids:
        return dict(params)
    order, name = vector(params, "draft.order"), _head_name(plan)
    if not torch.equal(order.sort().values, torch.arange(plan.vocab, device=order.device)):
        raise CheckpointError(f"the assistant's token order does not name each of its {plan.vocab:,} tokens once")
    return dict(params) | {name: matrix(params, name).take(order)}


@dataclass(frozen=True, slots=True)
class DraftLogits:
    """Logits of the next token, one row a sequence: over `ids_SC`, in any order, or where that is None over the vocabulary."""

    logits_SC: Tensor  # float32
    ids_SC: Tensor | None = None

    def in_order(self) -> DraftLogits:
        """Return the same on the CPU with ascending candidates, as samplers draw from a whole vocabulary."""
        if self.ids_SC is None:
            return DraftLogits(self.logits_SC.cpu())
        ids_SC, places_SC = self.ids_SC.cpu().sort(dim=1)
        return DraftLogits(self.logits_SC.cpu().gather(1, places_SC), ids_SC)


class Drafter:
    """An assistant bound to its target; its parameters have passed `sort_under_centroids`.

    Raises ConfigError for one of another vocabulary or width.
    """

    def __init__(self, decoder: Decoder, target: Decoder) -> None:
        self.decoder, self.target = decoder, target
        plan, other = decoder.plan, target.plan
        if plan.backbone != other.hidden or plan.vocab != other.vocab:
            found = f"a hidden size of {plan.backbone} and {plan.vocab:,} tokens"
            raise ConfigError(f"the assistant was made for {found}, its target has {other.hidden} and {other.vocab:,}")
        self._table = matrix(decoder.params, _head_name(plan))
        # A GPU multiplies with all rows of a packed table in less time than it takes to unpack some.
        self._looks_near = bool(plan.centroids) and (self._table.is_dense or decoder.device.type == "cpu")
        self._place_of = vector(decoder.params, "draft.order").argsort() if plan.centroids else None
        self._fused = self._bind_fused()

    def start(self, step: Step) -> Step:
        """Complete a step of one row a sequence, for all drafts of a burst."""
        return self.decoder.prepare(step)

    def draft_likeliest(self, ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache, count: int) -> Drafts:
        """Return `count` tokens in a row after `ids_S`, each the likeliest one, the lowest among equals.

        `states_ST` are the target's final-normed states of the rows that gave `ids_S`, or the states of drafts before. `step` is
        one that `start` completed, `cache` the target's.
        """
        if self._fused is not None:
            return self._fused(ids_S, states_ST, step, cache, count, False)
        with self._together(ids_S, states_ST, step, cache, count):
            return self._burst(ids_S, states_ST, step, cache, count)

    def _burst(self, ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache, count: int) -> Drafts:
        tokens, chances = list[Tensor](), list[Tensor]()
        for _ in range(count):
            found, states_ST = self._forward(ids_S, states_ST, step, cache)
            ids_S, chances_S = likeliest(found)
            tokens.append(ids_S)
            chances.append(chances_S)
        return Drafts(torch.stack(tokens), torch.stack(chances), states_ST)

    def draft(self, ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache) -> tuple[DraftLogits, Tensor]:
        """Return the logits of the tokens after `ids_S`, and the states [S, T] from which the tokens after those are drafted."""
        if self._fused is None:
            with self._together(ids_S, states_ST, step, cache, None):
                return self._forward(ids_S, states_ST, step, cache)
        found = self._fused(ids_S, states_ST, step, cache, 1, True)
        assert found.logits_SC is not None
        return DraftLogits(found.logits_SC, found.ids_SC), found.states_ST

    def turned(self, positions_N: Tensor) -> Tensor:
        """Return the positions that queries are turned to, of rows that see the keys up to `positions_N`."""
        return (positions_N + 1 + self.decoder.plan.query_offset).clamp(min=0)

    def _together(
        self, ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache, count: int | None
    ) -> AbstractContextManager[object]:
        """Let other ranks draft, too, where this one leads them."""
        leader = self.target.leader
        return NO_CONTEXT if leader is None else leader.drafts(ids_S, states_ST, step, cache, count)

    def _bind_fused(self) -> Draft | None:
        """Return what makes a burst at once, where the kernels of both models can; otherwise it is made op by op."""
        decoder, target = self.decoder, self.target
        impl = select_kernel(decoder.kernel_plan.at("draft")).impl
        natives = {impl.name, target.kernels["embed"], *(layer.kernels["layer"] for layer in decoder.layers)}
        if len(natives) > 1 or self._table.deltas:
            return None
        ctx, embed = decoder.op_context, matrix(target.params, "embed.tokens")
        found: Draft | None = impl.load()(decoder.plan, decoder.params, ctx, embed, rounded_root(target.plan.hidden, ctx))
        return found

    def _forward(self, ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache) -> tuple[DraftLogits, Tensor]:
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
            logits_SV = self.decoder.logits(y_SD)
            return DraftLogits(logits_SV if self._place_of is None else logits_SV[:, self._place_of])
        near_SK = self.decoder.multiply(y_SD, "draft.centroids").float().topk(plan.centroid_top_k, dim=1).indices
        each = plan.vocab // plan.centroids
        places_SC = (near_SK.unsqueeze(2) * each + torch.arange(each, device=near_SK.device)).flatten(1)
        rows_SCD = self._table.gather(places_SC.flatten(), torch.float32).view(*places_SC.shape, -1)
        ids_SC = vector(self.decoder.params, "draft.order")[places_SC]
        return DraftLogits(torch.einsum("scd,sd->sc", rows_SCD, y_SD.float()), ids_SC)


def likeliest(found: DraftLogits) -> tuple[Tensor, Tensor]:
    """Return the likeliest token of each row [S], the lowest among equals, and how likely it is among the row's candidates."""
    best_S = found.logits_SC.amax(dim=1, keepdim=True)
    chances_S = (found.logits_SC - best_S).exp().sum(dim=1).reciprocal()
    if found.ids_SC is None:
        return found.logits_SC.argmax(dim=1), chances_S
    none = torch.iinfo(torch.long).max
    tokens_S = found.ids_SC.masked_fill(found.logits_SC != best_S, none).amin(dim=1)
    return tokens_S.where(tokens_S != none, 0), chances_S  # rows of NaN equal nothing


def _head_name(plan: ModelPlan) -> str:
    return "embed.tokens" if plan.tied_head else "head"
