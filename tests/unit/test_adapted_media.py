"""Images and sounds of requests with adapters that change the towers: whose rows a request gets, and what is shared.

The oracle is the same adapter merged. What rows are is `tests/parity/test_tower_adapters.py`'s, the rest of adapters at run time
`test_adapters_at_runtime.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import gemcutter
from gemcutter import CheckpointError, Model, RequestError
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.media_reader import MediaReader
from gemcutter.tower_plan import TowerPlans, derive_towers
from tests.adapters import draw, places, tensors_of, tower_tensors, write_adapter
from tests.images import drawing
from tests.sounds import RATE, tones
from tests.trained import release_folder

OPTIONS: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "max_soft_tokens": 70}
PICTURE, TUNE = drawing(60, 90), (tones(16_000), RATE)
PARTS = ({"type": "image", "image": PICTURE}, {"type": "audio", "audio": TUNE}, {"type": "text", "text": "What?"})
ASKED = [{"role": "user", "content": list(PARTS)}]


def load(**options: Any) -> Model:
    return gemcutter.load(release_folder(), media="image,audio", dtype="float32", context=1024, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write adapters that change: both towers; those otherwise; the eyes alone; the decoder alone; everything."""
    root, checkpoint = tmp_path_factory.mktemp("adapters"), open_checkpoint(Path(release_folder()))
    towers, plan = derive_towers(checkpoint.config), checkpoint.plan
    text = tensors_of(draw(plan, places(plan), seed=4))
    tensors = {
        "towers": tower_tensors(towers, 1),
        "others": tower_tensors(towers, 2),
        "eyes": tower_tensors(TowerPlans(vision=towers.vision), 3),
        "text": text,
        "all": text | tower_tensors(towers, 5),
    }
    return {name: write_adapter(root / name, each) for name, each in tensors.items()}


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> Iterator[Model]:
    with load(adapters={name: str(folder) for name, folder in folders.items()}) as found:
        yield found


def digests(model: Model, adapter: str | None = None) -> list[str]:
    return [span.digest for span in model.prepare(ASKED, adapter=adapter, **OPTIONS).request.media]


def text(model: Model, adapter: str | None = None) -> tuple[int, ...]:
    return tuple(model.chat(ASKED, adapter=adapter, **OPTIONS).tokens)


def logits(model: Model, adapter: str | None = None) -> list[float]:
    asked = OPTIONS | {"max_tokens": 0, "top_logits": 20}
    (found,) = model.generate([ASKED], adapter=adapter, **asked)
    return [value for _, value in sorted(found.prompt.top_logits)]


def test_a_request_gets_the_rows_of_its_own_adapter(model: Model, folders: dict[str, Path]) -> None:
    assert model.adapters == tuple(sorted(folders))
    plain = logits(model)
    for name, folder in folders.items():
        with load(adapter=str(folder)) as merged:
            assert logits(model, name) == pytest.approx(logits(merged), rel=1e-3, abs=1e-3), name
        assert logits(model, name) != pytest.approx(plain, rel=1e-2, abs=1e-2), name


def test_rows_are_shared_where_nothing_of_a_tower_is_changed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    vision, audio = model._towers
    monkeypatch.setattr(model, "media", MediaReader(model.tokenizer, vision, audio))  # type: ignore[arg-type]
    assert model.media is not None
    found = {name: digests(model, name) for name in (None, *model.adapters)}
    assert found["text"] == found[None]
    assert found["eyes"][0] != found[None][0]
    assert found["eyes"][1] == found[None][1]
    assert len({images for images, _ in found.values()}) == 5  # all but "text" make others of their own
    assert len({sounds for _, sounds in found.values()}) == 4  # and "eyes" none of sounds
    assert (model.media.queries, model.media.hits) == (12, 3)
    assert digests(model, "towers") == found["towers"]
    assert (model.media.queries, model.media.hits) == (14, 5)


def test_no_prefix_is_shared_between_adapters(folders: dict[str, Path]) -> None:
    with load(adapters={name: str(folders[name]) for name in ("towers", "others")}) as model:
        for name in (None, "towers", "others"):
            assert model.chat(ASKED, adapter=name, **OPTIONS).prompt.cached_tokens == 0
        for name in (None, "towers", "others"):
            assert model.chat(ASKED, adapter=name, **OPTIONS).prompt.cached_tokens > 0


def test_requests_of_several_threads_do_not_mix(model: Model) -> None:
    names = [None, *model.adapters]
    wanted = {name: text(model, name) for name in names}
    with ThreadPoolExecutor(6) as pool:
        assert dict(zip(names * 2, pool.map(lambda name: text(model, name), names * 2), strict=True)) == wanted


def test_adapters_of_towers_come_and_go(model: Model, folders: dict[str, Path]) -> None:
    with load() as late:
        before, plain = text(late), digests(late)
        for name in ("towers", "others"):
            late.load_adapter("a", folders[name])
            assert late.adapters == ("a",)
            assert digests(late, "a") == digests(model, name)
            assert text(late, "a") == text(model, name)
            with pytest.raises(RequestError, match="loaded already"):
                late.load_adapter("a", folders["eyes"])
            assert digests(late, "a") == digests(model, name)
            late.unload_adapter("a")
            assert all(tower.bodies.of("a") is tower.bodies.of() for tower in late._towers)
            with pytest.raises(RequestError, match="'a' is not loaded"):
                late.prepare(ASKED, adapter="a", **OPTIONS)
        assert (text(late), digests(late)) == (before, plain)
        with pytest.raises(RequestError, match="expected the name of one adapter"):
            late.prepare(ASKED, adapter=["a"], **OPTIONS)


def test_a_failure_leaves_towers_as_before(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with load() as model:

        def without_memory(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(model.decoder, "with_adapter", without_memory)
        with pytest.raises(gemcutter.CapacityError, match="no memory is left"):
            model.load_adapter("a", folders["towers"])
        assert all(tower.bodies.of("a") is tower.bodies.of() for tower in model._towers)
        monkeypatch.undo()
        plan = derive_towers(model.checkpoint.config).vision
        wrong = {name: each[:, :-1].contiguous() for name, each in tower_tensors(TowerPlans(plan)).items()}
        with pytest.raises(CheckpointError, match="does not fit the model"):
            model.load_adapter("a", write_adapter(tmp_path, wrong))
        model.load_adapter("a", folders["towers"])
        assert model.adapters == ("a",)
