"""Drafts by an assistant, for all sequences of a step at once, a token after the other.

Owns what a burst of drafts needs: the last token and the target's state behind it, the rows over the target's cache, and the
choice of each draft with the very random number that its position has, which makes it the target's choice more often. Refuses to
know how many drafts are worth it. Read `model/drafter.py` for the model, `speculator.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.engine.request import SequenceState
from gemcutter.engine.sampling import sample_token, uniform
from gemcutter.engine.speculate.captured_drafts import CapturedBursts
from gemcutter.engine.speculate.confidence import Guess
from gemcutter.engine.threads import one_thread
from gemcutter.model.drafter import Drafter, DraftLogits
from gemcutter.ops.step import Step, send
from gemcutter.ops.types import Drafts

Wanted = Sequence[tuple[SequenceState, int]]  # sequences, each with how many drafts it may get


class AssistantProposer:
    """Asks a drafter, whose plan says where its queries stand."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self._offset = drafter, drafter.decoder.plan.query_offset
        refusals = [each.capture_refusal() for each in (drafter.decoder, drafter.target)]
        is_led = drafter.target.leader is not None  # the other ranks draft op by op
        self._captured = None if is_led or any(refusals) else CapturedBursts(drafter)

    needs_states = True

    def forget(self, sequence: SequenceState) -> None:
        """Do nothing: what is known of a sequence is part of it."""

    def can_draft(self, sequence: SequenceState) -> bool:
        """Return whether the target's state behind the last token is known."""
        return sequence.state_D is not None

    @torch.inference_mode()
    def propose(self, wanted: Wanted) -> dict[int, Guess]:
        """Return drafts by the sequences' numbers; all can be drafted for, and none has rows reserved."""
        if not wanted:
            return {}
        sequences, count = [sequence for sequence, _ in wanted], max(limit for _, limit in wanted)
        step = self._step(sequences)
        ids = [sequence.ids(sequence.num_tokens - 1, sequence.num_tokens)[0] for sequence in sequences]
        states_ST = torch.stack([_state(sequence) for sequence in sequences])
        (ids_S,) = send((ids,), torch.long, states_ST.device)
        if all(sequence.request.sampling.temperature == 0 for sequence in sequences):
            found = self._likeliest(sequences, ids_S, states_ST, step, count)
            tokens, chances = found.tokens_KS.tolist(), found.chances_KS.tolist()
        else:
            tokens, chances = self._sampled(sequences, ids_S, states_ST, step, count)
        guesses = dict[int, Guess]()
        for column, (sequence, limit) in enumerate(wanted):
            columns = [tuple(row[column] for row in rows[:limit]) for rows in (tokens, chances)]
            guesses[sequence.number] = Guess(*columns)
        return guesses

    def _likeliest(self, sequences: Sequence[SequenceState], ids_S: Tensor, states_ST: Tensor, step: Step, count: int) -> Drafts:
        tables = [_table(sequence) for sequence in sequences]
        if self._captured is not None and self._captured.accepts(tables, count):
            turned = [self._turned(table) for table in tables]
            return self._captured.draft(ids_S, states_ST, step, tables, turned, count)
        return self._drafter.draft_likeliest(ids_S, states_ST, self._drafter.start(step), tables[0].cache, count)

    def _turned(self, table: BlockTable) -> int:
        """Return the position that a sequence's queries are turned to."""
        return max(table.length + self._offset, 0)

    def _sampled(
        self, sequences: Sequence[SequenceState], ids_S: Tensor, states_ST: Tensor, step: Step, count: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return `count` drafts in a row of each sequence, one list a place, and how likely each was."""
        step, cache = self._drafter.start(step), _table(sequences[0]).cache
        tokens, chances = list[list[int]](), list[list[float]]()
        for place in range(count):
            found, states_ST = self._drafter.draft(ids_S, states_ST, step, cache)
            chosen, likely = choose_drafts(found, sequences, place)
            (ids_S,) = send((chosen,), torch.long, states_ST.device)
            tokens.append(chosen)
            chances.append(likely)
        return tokens, chances

    @one_thread()
    def _step(self, sequences: Sequence[SequenceState]) -> Step:
        """Return one row a sequence, which sees every key that has been committed."""
        decoder = self._drafter.decoder
        tables = [_table(sequence) for sequence in sequences]
        last_keys = [table.length - 1 for table in tables]  # the last token itself has no key yet
        (positions_N,) = send((last_keys,), torch.long, decoder.device)
        return Step(
            ids_N=positions_N,
            ple_ids_N=positions_N,
            positions_N=positions_N,
            query_start=tuple(range(len(tables) + 1)),
            kv_ranges={group: tuple(table.kv_range(group) for table in tables) for group in tables[0].cache.allocators},
            slot_mapping={},
            logit_rows=None,
            rope=decoder.rope_tables(self._drafter.turned(positions_N)),
        )


def _table(sequence: SequenceState) -> BlockTable:
    assert sequence.table is not None
    return sequence.table


def _state(sequence: SequenceState) -> Tensor:
    assert sequence.state_D is not None
    return sequence.state_D


@one_thread()
def choose_drafts(found: DraftLogits, sequences: Sequence[SequenceState], place: int) -> tuple[list[int], list[float]]:
    """Return the draft of each row, what would be sampled there if these were the target's logits, and how likely it was."""
    found = found.in_order()
    tokens, chances = list[int](), list[float]()
    for row, sequence in enumerate(sequences):
        logits_C, params = found.logits_SC[row], sequence.request.sampling
        if params.temperature == 0:
            token = int(logits_C.numpy().argmax())
        else:
            token = sample_token(logits_C, params, uniform(sequence.seed, sequence.num_tokens + place))
        chances.append(float((logits_C[token] - logits_C.logsumexp(0)).exp()))
        tokens.append(token if found.ids_SC is None else int(found.ids_SC[row, token]))
    return tokens, chances
