"""Adapters loaded and unloaded over HTTP: from one folder only, by names that are no paths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gemcutter.api import Model
from gemcutter.server.options import ServerOptions
from tests.adapters import draw, places, tensors_of, write_adapter
from tests.server.conftest import Running, running


@pytest.fixture(scope="module")
def adapting(demo: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    top = tmp_path_factory.mktemp("adapters")
    plan = demo.plan.whole or demo.plan  # of a model on several ranks, what its adapters are for
    changes = draw(plan, places(plan)[:4])
    write_adapter(top / "root" / "poet", tensors_of(changes))
    write_adapter(top / "outside", tensors_of(changes))
    (top / "root" / "link").symlink_to(top / "outside")
    (top / "root" / "empty").mkdir()
    with running(demo, ServerOptions(names=("demo",), lora_root=str(top / "root"))) as found:
        yield found


def test_an_adapter_comes_serves_and_goes(adapting: Running) -> None:
    loaded = adapting.post("/v1/load_lora_adapter", {"lora_name": "verse", "lora_path": "poet"})
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["parent"] == "demo"
    assert "verse" in [each["id"] for each in adapting.get("/v1/models").json()["data"]]
    answer = adapting.post("/v1/chat/completions", {**adapting.chat("Hi", max_tokens=4), "model": "verse"})
    assert answer.json()["model"] == "verse"
    again = adapting.post("/v1/load_lora_adapter", {"lora_name": "verse", "lora_path": "poet"})
    assert again.status_code == 400
    assert adapting.post("/v1/unload_lora_adapter", {"lora_name": "verse"}).json()["deleted"] is True
    assert adapting.model.adapters == ()
    assert adapting.post("/v1/unload_lora_adapter", {"lora_name": "verse"}).status_code == 404
    assert adapting.post("/v1/chat/completions", {**adapting.chat("Hi"), "model": "verse"}).status_code == 404


@pytest.mark.parametrize(
    ("name", "path", "param"),
    [
        ("a", "../outside", "lora_path"),
        ("a", "..", "lora_path"),
        ("a", "/etc", "lora_path"),
        ("a", "link", "lora_path"),
        ("a", "missing", "lora_path"),
        ("a", "empty", "lora_path"),
        ("../a", "poet", "lora_name"),
        ("", "poet", "lora_name"),
        ("demo", "poet", "lora_name"),
    ],
)
def test_paths_and_taken_names_are_refused(adapting: Running, name: str, path: str, param: str) -> None:
    answer = adapting.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    assert adapting.model.adapters == ()


def test_without_a_root_there_is_no_such_route(server: Running) -> None:
    assert server.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a"}).status_code == 404
