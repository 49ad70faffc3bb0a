"""Steps sized in time, on machines made up of two numbers.

Owns the claims that steps stay within the limit once it is known what rows cost, that single outliers change nothing, and that a
change of the machine is noticed. No clock is read. Read `tests/unit/test_fair_scheduling.py` for engines.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from gemcutter.engine.step_sizer import FIRST_ROWS, FORGOTTEN, LEAST_ROWS, StepSizer

STALL_S = 0.2
Machine = Callable[[int, int], float]  # decode rows and prompt rows to seconds


def linear(base_s: float, row_s: float, decode_s: float = 0.0) -> Machine:
    return lambda decode, prompt: base_s + prompt * row_s + decode * decode_s


def run(sizer: StepSizer, machine: Machine, steps: int, decode: int = 2, most: int = 512) -> list[tuple[int, float]]:
    """Return the prompt rows and the seconds of steps with as many prompt rows as the sizer lets in."""
    found = list[tuple[int, float]]()
    for _ in range(steps):
        prompt = sizer.prompt_rows(decode, most)
        seconds = machine(decode, prompt)
        sizer.observe(decode, prompt, seconds)
        found.append((prompt, seconds))
    return found


@pytest.mark.parametrize("base_s", [0.0, 0.01, 0.08])
@pytest.mark.parametrize("row_s", [0.01, 0.002, 0.0005, 0.0001])
def test_steps_fill_the_limit_and_keep_it(base_s: float, row_s: float) -> None:
    sizer, machine = StepSizer(STALL_S), linear(base_s, row_s, 0.001)
    for _ in range(5):
        sizer.observe(2, 0, machine(2, 0))
    rows, seconds = zip(*run(sizer, machine, 40), strict=True)
    best = min(512, int((STALL_S - base_s - 0.002) / row_s))
    assert rows[0] == FIRST_ROWS
    assert max(seconds[5:]) <= STALL_S * 1.001
    assert rows[-1] >= min(best, 512) * 0.45  # a size is a factor of two


def test_sizes_grow_step_by_step() -> None:
    rows = [rows for rows, _ in run(StepSizer(STALL_S), linear(0.0, 1e-7), 8)]
    assert rows[0] == FIRST_ROWS
    assert all(after <= 4 * before for before, after in pairwise(rows))
    assert rows[-1] == 512


def test_without_anyone_to_stall_the_limit_holds_for_those_to_come() -> None:
    assert run(StepSizer(STALL_S), linear(0.0, 0.002), 20, decode=0)[-1] == (100, pytest.approx(0.2))


def test_prompts_go_on_where_decoding_takes_all_the_time() -> None:
    sizer = StepSizer(STALL_S)
    sizer.observe(8, 0, 3.0)
    assert run(sizer, linear(3.0, 0.1), 9, decode=8)[-1][0] == LEAST_ROWS
    assert sizer.prompt_rows(8, 3) == 3


def test_an_outlier_changes_nothing_and_a_change_is_noticed() -> None:
    sizer, machine = StepSizer(STALL_S), linear(0.0, 0.001)
    before = run(sizer, machine, 20)[-1][0]
    sizer.observe(2, before, 9.0)
    sizer.observe(2, before, 9.0)
    assert sizer.prompt_rows(2, 512) == before
    slower = run(sizer, linear(0.0, 0.01), 12)
    assert slower[-1][1] <= STALL_S
    faster = run(sizer, machine, 6)
    assert faster[-1][0] > slower[-1][0]


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    sizer, machine = StepSizer(STALL_S), linear(0.0, 0.0005)
    run(sizer, machine, 9)
    for _ in range(5):
        sizer.observe(2, 300, 5.0)
    assert sizer.prompt_rows(2, 512) < 256
    assert run(sizer, machine, FORGOTTEN + 4)[-1][0] >= 256
