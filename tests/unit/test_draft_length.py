"""How many tokens are guessed follows from what steps cost and what was right, and is never more than pays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.speculate.confidence import Calibration, Guess
from gemcutter.engine.speculate.draft_length import PRIOR, Acceptance, Candidate, StepCosts, count_drafts
from gemcutter.engine.speculate.ngram import NgramProposer
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.speculate.tally import MOST_DRAFTS, NO_DRAFTS


def costs(one: float, more: float, draft: float = 0.0) -> StepCosts:
    """Return costs of a step of one row, and of each row more."""
    found = StepCosts()
    for rows in range(1, 40):
        found.observe(rows, one + more * (rows - 1))
    found.draft_s = draft
    return found


def rates(*values: float) -> Acceptance:
    return Acceptance([*values, *[values[-1]] * (MOST_DRAFTS - len(values))])


def test_rows_that_cost_nothing_are_all_taken() -> None:
    assert count_drafts([Candidate(3, rates(0.5).survivals(9))], 0, 99, costs(1, 0)) == {3: MOST_DRAFTS}
    assert count_drafts([Candidate(3, rates(0.5).survivals(2))], 0, 99, costs(1, 0)) == {3: 2}
    assert count_drafts([Candidate(3, rates(0.5).survivals(9))], 0, 4, costs(1, 0)) == {3: 4}


def test_rows_that_cost_as_much_as_steps_are_not() -> None:
    assert count_drafts([Candidate(3, rates(0.9).survivals(9))], 0, 99, costs(1, 1)) == {3: 0}
    assert count_drafts([Candidate(3, rates(0.9).survivals(9))], 0, 99, costs(1, 0.1, draft=2.0)) == {3: 0}
    assert count_drafts([Candidate(3, rates(0.9).survivals(9), is_free=True)], 0, 99, costs(1, 0.1, draft=2.0))[3] > 0


def test_nothing_is_guessed_before_a_step_was_measured() -> None:
    assert count_drafts([Candidate(3, rates(0.9).survivals(9))], 0, 99, StepCosts()) == {3: 0}


@given(
    st.lists(st.lists(st.floats(0.05, 0.99), min_size=MOST_DRAFTS, max_size=MOST_DRAFTS), min_size=1, max_size=3),
    st.floats(0.01, 1.5),
    st.floats(0, 0.5),
    st.integers(0, 4),
)
def test_the_choice_is_the_best_there_is(many: list[list[float]], more: float, draft: float, others: int) -> None:
    """Beside every other number for each sequence: none gives clearly more tokens a second."""
    table, acceptances = costs(1, more, draft), [Acceptance(each) for each in many]
    chosen = count_drafts(
        [Candidate(number, each.survivals(MOST_DRAFTS)) for number, each in enumerate(acceptances)], others, 99, table
    )

    def speed(counts: list[int]) -> float:
        expected = sum(1 + sum(each.survivals(n)) for each, n in zip(acceptances, counts, strict=True))
        seconds = table(others + len(counts) + sum(counts))
        assert seconds is not None
        return expected / (seconds + draft * max(counts))

    mine = [chosen[number] for number in range(len(many))]
    plain = speed([0] * len(many))
    assert speed(mine) >= plain
    equal = [[n] * len(many) for n in range(MOST_DRAFTS + 1)]
    assert all(speed(other) <= max(speed(mine), plain * 1.02) * 1.15 for other in equal)


def test_acceptance_is_learnt_where_it_was_seen() -> None:
    found = Acceptance()
    for _ in range(100):
        found.observe(4, 2)
    assert found.rates[0] > 0.95
    assert found.rates[1] > 0.95
    assert found.rates[2] < 0.05
    assert found.rates[3] == PRIOR  # never reached


def test_other_work_on_the_machine_does_not_raise_costs_for_long() -> None:
    found = StepCosts()
    for seconds in (1.0, 1.0, 50.0, 1.0, 1.0, 1.0):
        found.observe(1, seconds)
    assert found(1) == pytest.approx(1.0, rel=0.05)
    assert found(3) == pytest.approx(1.2, rel=0.1)  # nobody knows yet


def test_longer_contexts_have_times_of_their_own() -> None:
    found = StepCosts()
    for rows, seconds in ((1, 1.0), (3, 1.3), (5, 1.5)):
        found.observe(rows, seconds, keys=100)
    found.observe(1, 4.0, keys=20_000)
    assert found(1, 4000) == 1.0
    assert found(1, 20_001) == 4.0
    assert found(5, 20_001) == pytest.approx(4.0 * 1.5)  # as much more as where it was measured
    found.observe(5, 4.4, keys=20_000)
    assert found(5, 20_001) == pytest.approx(4.4)
    assert found(5, 100) == 1.5
    assert found(3, 20_001) == pytest.approx(4.4 * 1.3 / 1.5)


def test_a_models_probabilities_are_taken_for_what_they_prove_to_be() -> None:
    found = Calibration()
    assert found.rate(0.97) > found.rate(0.55) > found.rate(0.02)
    for _ in range(200):
        found.observe((0.97, 0.55, 0.97), 1)  # the second is always wrong, and the third never reached
    assert found.rate(0.97) > 0.95
    assert found.rate(0.55) < 0.05
    assert found.rate(0.85) == pytest.approx(0.85)
    first, second = found.survivals((0.97, 0.85))
    assert second == pytest.approx(first * 0.85)
    assert found.survivals((1.0, 0.0))[0] > 0.9


class Sure:
    """A model whose second draft is as unlikely as can be."""

    needs_states = False

    def __init__(self) -> None:
        self.asked = list[int]()

    def can_draft(self, sequence: SequenceState) -> bool:
        return True

    def forget(self, sequence: SequenceState) -> None: ...

    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> dict[int, Guess]:
        self.asked += [limit for _, limit in wanted]
        return {one.number: Guess((7,) * limit, (0.999, 0.001, *[0.999] * 6)[:limit]) for one, limit in wanted}


def test_what_the_model_is_not_sure_of_is_not_verified() -> None:
    model = Sure()
    guesses = Speculator(assistant=model)
    guesses.costs = costs(1, 0.1)
    assert guesses.propose([(sequence((1, 2, 3)), 5)], 0, 50) == {0: (7,)}
    assert model.asked[0] > 1
    assert Speculator(assistant=model, draft_tokens=3).propose([(sequence((1, 2, 3)), 5)], 0, 50) == {0: (7, 7, 7)}


def test_a_lookup_that_is_wrong_leaves_the_word_to_the_model() -> None:
    model = Sure()
    guesses = Speculator(NgramProposer(3), model)
    guesses.costs = costs(1, 0.02)
    one = sequence((1, 2, 3, 4, 5, 6) * 5)
    assert guesses.propose([(one, 5)], 0, 50)[0][:2] == (1, 2)
    assert not model.asked
    for _ in range(20):
        made = guesses.propose([(one, 5)], 0, 50)[0]
        guesses.verified(one, len(made), len(made), 0 if made[0] == 1 else len(made))
    assert guesses.propose([(one, 5)], 0, 50)[0] == (7,)


def sequence(ids: tuple[int, ...]) -> SequenceState:
    return SequenceState(0, Request(ids, max_tokens=100))


def test_lookups_go_on_as_the_last_place_did() -> None:
    found = NgramProposer(3)
    one = sequence((1, 2, 3, 4, 9, 9, 1, 2, 3, 5, 6, 7, 1, 2, 3))
    assert found.propose(one, 4) == (5, 6, 7, 1)
    for token in (5, 6):
        one.append(token)
    assert found.propose(one, 8) == (7, 1, 2, 3, 5, 6)
    one.append(99)
    assert found.propose(one, 8) == ()
    assert found.propose(sequence((1, 2, 3)), 8) == ()


def test_a_draft_that_never_pays_is_tried_now_and_then() -> None:
    guesses = Speculator(NgramProposer(3))
    one = sequence((1, 2, 3) * 20)
    for rows in range(1, 10):
        guesses.timed(rows, 60, float(rows))
    counts = [len(guesses.propose([(one, 50)], 0, 50).get(0, ())) for _ in range(200)]
    assert max(counts) == 1
    assert 1 < sum(counts) < 5
    guesses.verified(one, 0, 0, 0)
    assert guesses.tally == NO_DRAFTS
