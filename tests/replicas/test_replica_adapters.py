"""Adapters that requests name as their model: loaded by the replica that gets the request, the last used ones kept."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gemcutter
from tests.adapters import draw, places, tensors_of, write_adapter
from tests.replicas.conftest import MODEL, Deployed, deployed, until

NAMES = ("poet", "clerk", "sailor")
PROMPT = {"prompt": "In the beginning", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write adapters that each turn the model's choices in a way of its own."""
    folder = tmp_path_factory.mktemp("adapters") / "root"
    with gemcutter.load(**MODEL) as model:
        for seed, name in enumerate(NAMES):
            write_adapter(folder / name, tensors_of(draw(model.plan, places(model.plan)[:6], seed=seed)))
        (folder / "broken").mkdir()
        write_adapter(folder.parent / "outside", tensors_of(draw(model.plan, places(model.plan)[:2])))
    (folder / "link").symlink_to(folder.parent / "outside")
    return folder


@pytest.fixture(scope="module")
def texts(root: Path) -> dict[str, str]:
    """Return what each adapter says, loaded for itself."""
    adapters = {name: str(root / name) for name in NAMES}
    with gemcutter.load(**MODEL, adapters=adapters) as model:
        return {
            name: model.generate(PROMPT["prompt"], max_tokens=12, temperature=0, adapter=None if name == "demo" else name).text
            for name in ("demo", *NAMES)
        }


@pytest.fixture(scope="module")
def adapting(cluster: str, root: Path) -> Iterator[Deployed]:
    with deployed(cluster, "adapting", replicas=2, lora_root=str(root), max_adapters=2) as found:
        yield found


def say(found: Deployed, name: str) -> str:
    answer = found.post("/v1/completions", {**PROMPT, "model": name})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_requests_get_the_adapter_that_they_name(adapting: Deployed, texts: dict[str, str]) -> None:
    assert len(set(texts.values())) == len(texts)
    for name in (*texts, *texts):
        assert say(adapting, name) == texts[name], name


def test_more_adapters_than_a_replica_keeps_take_turns(adapting: Deployed, texts: dict[str, str]) -> None:
    order = [NAMES[(number * 7) % 3] for number in range(30)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda name: say(adapting, name), order)) == [texts[name] for name in order]

    def are_few() -> bool:
        listed = [adapting.get("/v1/models").json()["data"] for _ in range(8)]  # of either replica
        return all(len(each) <= 1 + 2 for each in listed)

    until(are_few)


@pytest.mark.parametrize(("name", "status"), [("nobody", 404), ("../outside", 404), ("link", 404), ("broken", 400)])
def test_other_names_are_refused(adapting: Deployed, name: str, status: int) -> None:
    answer = adapting.post("/v1/completions", {**PROMPT, "model": name})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
