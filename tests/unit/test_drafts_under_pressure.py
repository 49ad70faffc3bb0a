"""Drafts that are right, wrong, or right for a while, in engines that run out of pages: nothing of them stays.

Owns a proposer that guesses at random around the known answer, over the scenes of `test_scheduler.py`: random arrivals and
cancellations, preemption, cached prefixes, windows that wrap. Free pages hold NaN, so what a rejected row wrote, or a window that
was let go too early, would show. Read there for the laws of every step.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.engine.engine import Engine
from gemcutter.engine.request import FinishReason, SequenceState
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.speculate.tally import MOST_DRAFTS
from tests.unit.test_scheduler import REQUESTS, SCENES, Job, Watched, assert_same, drive, make_engine, wanted


class Guesser:
    """Guesses the next tokens of a known answer, the first `right` of them right, at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def propose(self, sequence: SequenceState, limit: int) -> tuple[int, ...]:
        known = wanted(REQUESTS.index(sequence.request)).tokens[len(sequence.reply) :]
        count, right = self._random.randint(0, limit), self._random.randint(0, MOST_DRAFTS)
        drafts = [*known, *[7] * limit][:count]
        return tuple(token if place < right else (token + 1) % 60 for place, token in enumerate(drafts))


def windows_are_whole(engine: Engine) -> bool:
    """Return whether every running sequence holds what its next row sees, and pages for nothing else."""
    for sequence in engine.scheduler.running:
        table = sequence.table
        assert table is not None
        for group, window in engine.pool.windows.items():
            first, pages = table.pages(group)
            size = engine.pool.allocators[group].tokens
            oldest = 0 if window is None else max(0, table.length - window + 1)
            if first * size > oldest or (first + len(pages)) * size < table.length:
                return False
            if window is not None and (first + 1) * size <= oldest:
                return False
    return True


@settings(derandomize=True, deadline=None, max_examples=20)
@given(**SCENES, seed=st.integers(0, 99))
def test_every_request_ends_with_what_it_gets_alone(
    jobs: list[Job], max_rows: int, max_sequences: int, checkpoints: int, spare: int, seed: int
) -> None:
    engine = make_engine(max_rows, max_sequences, checkpoints, spare)
    engine.speculator = engine.scheduler.proposer = speculator = Speculator(Guesser(seed), draft_tokens=MOST_DRAFTS)
    watched = Watched(engine)
    step = watched.step

    def checked() -> object:
        found = step()
        assert windows_are_whole(engine)
        return found

    watched.step = checked  # type: ignore[assignment, method-assign]
    for job, answer in zip(jobs, drive(watched, jobs), strict=True):
        assert_same(answer, wanted(REQUESTS.index(job.request)))
        assert (answer.finish is FinishReason.CANCELLED) <= (job.cancel_at is not None)
    assert speculator.tally.accepted <= speculator.tally.drafted
    assert not speculator._own, "what is known of a sequence outlives it"
