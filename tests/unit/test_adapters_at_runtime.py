"""Adapters that come and go while a model serves: the same text as when loaded at start, and nobody else is disturbed.

The oracle is the same adapter named at load time, and each request alone. Read `tests/parity/test_adapters.py` for the numbers.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import gemcutter
from gemcutter import CheckpointError, Model, RequestError
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.quant.carried import carrying_weights
from tests.adapters import draw, places, tensors_of, write_adapter

OPTIONS: dict[str, Any] = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
ASKED = [2, 5, 6, 7, 30, 31]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    plan, root = open_checkpoint(DEMO_FOLDER).plan, tmp_path_factory.mktemp("adapters")
    return [write_adapter(root / str(seed), tensors_of(draw(plan, places(plan), seed=seed))) for seed in (1, 2)]


def open_model(kernels: str = "reference", **more: Any) -> Model:
    return gemcutter.load("demo", dtype="float32", kernels=kernels, context=256, **more)


def text(model: Model, adapter: str | None = None) -> tuple[int, ...]:
    return tuple(model.generate([ASKED], adapter=adapter, **OPTIONS)[0].tokens)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_a_late_adapter_equals_one_loaded_at_start(kernels: str, folders: list[Path]) -> None:
    asked: dict[str, Any] = {"max_tokens": 0, "top_logits": 50}
    with open_model(kernels, adapters={"a": str(folders[0])}) as early, open_model(kernels) as late:
        before, layers = text(late), late.decoder.layers
        late.load_adapter("a", folders[0])
        assert late.adapters == early.adapters == ("a",)
        assert text(late, "a") == text(early, "a") != before
        found, wanted = (model.generate([ASKED], adapter="a", **asked)[0].prompt.top_logits for model in (late, early))
        assert found == wanted
        assert text(late) == before
        assert late.decoder.layers is layers


def test_running_requests_of_several_threads_go_on(folders: list[Path]) -> None:
    prompts = [[2, 5 + index, 9, 40] for index in range(8)]
    with open_model() as model:
        right = [found.tokens for found in model.generate(prompts, **OPTIONS | {"max_tokens": 40})]
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(lambda ids: model.generate([ids], **OPTIONS | {"max_tokens": 40})[0], ids) for ids in prompts]
            for _ in range(2):
                model.load_adapter("a", folders[0])
                text(model, "a")
                model.unload_adapter("a")
            assert [job.result().tokens for job in jobs] == right


def test_an_adapter_in_use_stays_and_gives_its_memory_back_later(folders: list[Path]) -> None:
    with open_model() as model:
        model.load_adapter("a", folders[0])
        prepared = model.prepare(ASKED, adapter="a", **OPTIONS)
        stream = model.stream(ASKED, adapter="a", **OPTIONS | {"max_tokens": 100})
        next(stream)
        with pytest.raises(RequestError, match="adapter 'a' is used by 1 request that runs or waits; await or cancel"):
            model.unload_adapter("a")
        assert model.adapters == ("a",)
        stream.close()
        factors = [
            weakref.ref(half)
            for _, weight in carrying_weights(model.decoder.adapted.params)
            for delta in weight.deltas
            for half in (delta.down, delta.up)
        ]
        assert factors
        model.unload_adapter("a")
        gc.collect()  # the error above refers to frames that saw the adapter, and they to it
        assert not [each for each in factors if each() is not None]
        assert model.adapters == ()
        with pytest.raises(RequestError, match="'a' is not loaded"):
            model.submit(prepared).finish()
        assert not model.loop.run(lambda engine: engine.has_work)


def test_another_adapter_of_the_same_name_gives_its_own_text(folders: list[Path]) -> None:
    with open_model(adapters={"a": str(folders[0])}) as model, open_model(adapters={"a": str(folders[1])}) as other:
        first, base = text(model, "a"), text(model)
        model.unload_adapter("a")
        model.load_adapter("a", folders[1])
        found = model.generate([ASKED], adapter="a", **OPTIONS)[0]
        assert found.prompt.cached_tokens == 0
        assert tuple(found.tokens) == text(other, "a") != first
        assert text(model) == base


def test_failures_leave_everything_as_before(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = open_checkpoint(DEMO_FOLDER).plan
    wrong = tensors_of(draw(plan, places(plan)[:1]))
    bad = write_adapter(tmp_path / "bad", {name: tensor[:, :-1] for name, tensor in wrong.items()})
    with open_model(adapters={"a": str(folders[0])}) as model:
        first, adapted, notes = text(model, "a"), model.decoder.adapted, list(model.notes)

        def without_memory(*_: object) -> None:
            raise MemoryError

        calls: list[tuple[Callable[[], None], type[Exception], str]] = [
            (lambda: model.load_adapter("a", folders[1]), RequestError, "loaded already; unload it first"),
            (lambda: model.load_adapter("", folders[1]), RequestError, "adapter name"),
            (lambda: model.load_adapter("b", bad), CheckpointError, "does not fit the model"),
            (lambda: model.load_adapter("b", tmp_path / "none"), CheckpointError, "does not exist"),
            (lambda: model.unload_adapter("b"), RequestError, "adapter 'b' is not loaded.*loaded are: a"),
        ]
        for call, error, words in calls:
            with pytest.raises(error, match=words):
                call()
        monkeypatch.setattr(model.decoder, "with_adapter", without_memory)
        with pytest.raises(gemcutter.CapacityError, match="no memory is left for its factors"):
            model.load_adapter("b", folders[1])
        assert model.decoder.adapted is adapted
        assert (text(model, "a"), model.notes, model.adapters) == (first, notes, ("a",))
    with pytest.raises(RequestError, match="the model is closed"):
        model.load_adapter("b", folders[1])
