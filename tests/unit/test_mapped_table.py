"""The mapped table of per-layer embeddings: its pages are given back now and then, and come again."""

from __future__ import annotations

import pytest

from gemcutter.engine.request import Request
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_model
from gemcutter.model import text
from tests.trained import GOLDENS


def test_pages_of_the_table_are_given_back_every_few_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "GATHERED_ROWS", 100)
    opened = open_model(LoadOptions(model="demo", dtype="float32", context=256, prefix_cache_bytes=0))
    engine, decoder = opened.engine(), opened.decoder
    release, given = decoder.release_table, [0]
    assert release is not None

    def count() -> None:
        given[0] += 1
        release()

    def reply() -> list[int | None]:
        engine.submit(Request(tuple(range(5, 65)), max_tokens=8))
        found = list[int | None]()
        while engine.has_work:
            found += [event.token for event in engine.step()]
        return found

    decoder.release_table = None
    wanted = reply()
    decoder.release_table = count
    assert [reply() for _ in range(6)] == [wanted] * 6
    assert 3 <= given[0] <= 4  # of 6 times 67 rows


def test_a_model_without_such_a_table_has_nothing_to_give_back() -> None:
    opened = open_model(LoadOptions(model=str(GOLDENS / "tiny-a"), dtype="float32", context=64))
    assert opened.decoder.release_table is None
