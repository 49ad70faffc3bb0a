"""Drafts that are right as often as somebody has published: a replay, which says what they are worth here, and nothing of models.

Owns the assistant of a size with synthetic weights, which takes the time that the real one would take, and the tokens that are
put in the place of its drafts: those of a reply that is known, spoilt so that each place is right as often as the pattern says.
Refuses to know how runs are timed: that is in `drafts.py`. Read `engine/speculate/assistant.py` for who drafts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from gemcutter.benchmark import synthetic
from gemcutter.engine.request import SequenceState
from gemcutter.engine.speculate.assistant import AssistantProposer, Wanted
from gemcutter.engine.speculate.confidence import Guess
from gemcutter.engine.speculate.tally import MOST_DRAFTS
from gemcutter.errors import RequestError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import make_decoder
from gemcutter.model.drafter import Drafter, sort_under_centroids
from gemcutter.model.text import Decoder
from gemcutter.ops.registry import select_backend

SEED = 5  # of which drafts are spoilt


def check_acceptance(acceptance: Sequence[float]) -> tuple[float, ...]:
    """Return a pattern: how often a draft is right at each place, given nothing about the places before it.

    Raises RequestError for shares that no drafts can have.
    """
    shares = tuple(acceptance)
    falls = all(now <= before for before, now in zip((1.0, *shares), shares, strict=False))
    if not 1 <= len(shares) <= MOST_DRAFTS or not falls or shares[-1] < 0:
        raise RequestError(
            f"acceptance: expected 1 to {MOST_DRAFTS} shares from 1 to 0, none above the one before it, such as "
            f".80 .65 .50 .40, found {' '.join(map(str, shares)) or 'none'}"
        )
    return shares


class Replay:
    """An assistant whose drafts take their time, and are then replaced by known tokens that are right as often as wanted.

    `replies` must hold the reply to each prompt before it is drafted for.
    """

    def __init__(self, drafter: Drafter, acceptance: Sequence[float]) -> None:
        self.replies: dict[tuple[int, ...], Sequence[int]] = {}
        self._assistant = AssistantProposer(drafter)
        places = [*check_acceptance(acceptance), *[0.0] * (MOST_DRAFTS - len(acceptance))]
        self._given = [now / before if before else 0.0 for before, now in zip([1.0, *places], places, strict=False)]
        self._random = random.Random(SEED)

    needs_states = True

    def can_draft(self, sequence: SequenceState) -> bool:
        """Return whether the assistant could draft."""
        return self._assistant.can_draft(sequence)

    def forget(self, sequence: SequenceState) -> None:
        """Let go of what is kept for a sequence that has ended."""
        self._assistant.forget(sequence)

    def propose(self, wanted: Wanted) -> dict[int, Guess]:
        """Draft, and return what the replay says in place of the drafts."""
        found = self._assistant.propose(wanted)
        return {sequence.number: Guess(self._known(sequence, len(found[sequence.number].tokens))) for sequence, _ in wanted}

    def _known(self, sequence: SequenceState, count: int) -> tuple[int, ...]:
        reply, done = self.replies[sequence.request.prompt], len(sequence.reply)
        coming = reply[done : done + count]
        right = next((place for place in range(len(coming)) if self._random.random() >= self._given[place]), len(coming))
        return tuple(token if place < right else token ^ 1 for place, token in enumerate(coming))


def make_assistant(preset: str, quant: str, target: Decoder, how: LoadOptions) -> Drafter:
    """Make the assistant of a preset's size with synthetic weights, stored as `quant` says. Raises ConfigError."""
    plan = synthetic.assistant_plan_of(preset, target.plan)
    packer = select_backend(target.device.type, how.kernels).packer(target.device, target.dtype)
    params = synthetic.make_params(plan, quant, packer, target.device)
    params = sort_under_centroids(plan, params)
    return Drafter(make_decoder(plan, params, how, target.dtype, target.device), target)
