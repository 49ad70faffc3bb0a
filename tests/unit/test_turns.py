"""Turns on the cores: in the order in which they were asked for, and never two at once.

Read `gemcutter/ops/turns.py` beside it.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

from gemcutter import Model, load
from gemcutter.ops.turns import Turns
from tests.trained import trained


def test_turns_come_in_order() -> None:
    turns, order, threads = Turns(), list[int](), list[threading.Thread]()

    def take(number: int) -> None:
        with turns.turn():
            order.append(number)

    with turns.turn():
        for number in range(5):
            thread = threading.Thread(target=take, args=(number,))
            thread.start()
            threads.append(thread)
            while turns.waiting <= number:
                pass
    for thread in threads:
        thread.join()
    assert order == list(range(5))
    assert not turns.waiting


def test_a_turn_ends_with_an_error() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn():
        1 / 0  # noqa: B018
    with turns.turn():
        pass


def test_one_thread_that_asks_again_lets_others_in_between() -> None:
    turns, order = Turns(), list[str]()

    def take(name: str) -> None:
        for _ in range(20):
            with turns.turn():
                order.append(name)
                while not turns.waiting and len(set(order)) < 2:
                    pass  # until the other thread has come

    threads = [threading.Thread(target=take, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == ["a"] * 20 + ["b"] * 20


@pytest.fixture(scope="module")
def model() -> Model:
    return load(trained("tiny-e-release"), media="image", dtype="float32")


def test_engine_and_towers_share_their_turns(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, engine = list[str](), model.loop.engine
    original = Turns.turn

    def counted(turns: Turns) -> object:
        taken.append("tower" if threading.current_thread() is threading.main_thread() else "engine")
        assert turns is engine.turns
        return original(turns)

    monkeypatch.setattr(Turns, "turn", counted)
    picture = np.zeros((60, 90, 3), np.uint8)
    model.chat([{"role": "user", "content": [{"type": "image", "image": picture}]}], max_tokens=2)
    assert {"engine", "tower"} <= set(taken)
