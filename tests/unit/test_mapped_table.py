"""The mapped table of per-layer embeddings: its pages are given back now and then, and come again."""

from __future__ import annotations

import pytest
import torch

from gemcutter.engine.request import Request
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_model
from gemcutter.ops import types
from tests.trained import GOLDENS, trained


def test_pages_of_the_table_are_given_back_every_few_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "TABLE_ROWS", 100)
    opened = open_model(LoadOptions(model="demo", dtype="float32", context=256, prefix_cache_bytes=0))
    engine, pages = opened.engine(), opened.decoder.op_context.table_pages
    release, given = pages.release, [0]
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

    pages.release = None
    wanted = reply()
    pages.release = count
    assert [reply() for _ in range(6)] == [wanted] * 6
    assert 3 <= given[0] <= 4  # of 6 times 67 rows


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", ["demo", "tiny-e-mlx-4bit", "tiny-e-Q4_0.gguf"])
def test_a_step_of_many_rows_gives_pages_back_on_its_way(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "TABLE_ROWS", 16)
    opened = open_model(LoadOptions(model=name if name == "demo" else str(trained(name)), dtype="float32", kernels=kernels))
    decoder, given = opened.decoder, list[int]()
    assert decoder.ple_embed is not None
    x_ND, ids_N = torch.randn(60, decoder.plan.hidden), torch.arange(7, 67)
    decoder.op_context.table_pages.release = None
    wanted = decoder.ple_embed(x_ND, ids_N, 0, 2)
    decoder.op_context.table_pages.release = lambda: given.append(1)
    assert torch.equal(decoder.ple_embed(x_ND, ids_N, 0, 2), wanted)
    assert len(given) == 3  # behind 16 rows each
    assert decoder.ple_embed(x_ND[:0], ids_N[:0], 0, 2).shape == wanted[:0].shape


def test_a_model_without_such_a_table_has_nothing_to_give_back() -> None:
    opened = open_model(LoadOptions(model=str(GOLDENS / "tiny-a"), dtype="float32", context=64))
    assert opened.decoder.op_context.table_pages.release is None
