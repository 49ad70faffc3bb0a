"""The ingress over replicas that are played: what it tells Ray's handle, what it tries again, and how it ends a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="replicas need Ray: pip install 'gemcutter[ray]'")

from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError

from gemcutter.ray import ingress as module
from gemcutter.ray.calls import Call, Head
from gemcutter.ray.ingress import Dispatch, create_ingress, last_event
from gemcutter.ray.options import ReplicaOptions

JSON = ((b"content-type", b"application/json"), (b"x-should-retry", b"false"), (b"x-request-id", b"theirs"))
EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"),)
WHOLE = [b"", Head(200, JSON), b'{"a":', b"1}"]
FULL, ENDING = [b"", Head(429, JSON), b"{}"], [b"", Head(503, JSON), b"{}"]
DIED = ActorDiedError()
NOBODY = ["no replica takes it"]
BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}


class Source:
    """What a call's parts come from: those of a list, where an exception is raised."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[Any]:
        if self._parts == NOBODY:
            await asyncio.sleep(60)
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part


class Handle:
    """A deployment's handle, whose answers are known; it notes how it was called."""

    def __init__(self, *answers: Sequence[Any]) -> None:
        self.sources = [Source(each) for each in answers]
        self.calls: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = []
        self._options: dict[str, Any] = {}

    def options(self, **options: Any) -> Handle:
        self._options = options
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Source:
        self.calls.append((self._options, args, kwargs))
        return self.sources[len(self.calls) - 1]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


def client(handle: Handle, **options: Any) -> TestClient:
    read = ReplicaOptions.read({"load": {"model": "demo"}, **options})
    return TestClient(create_ingress(Dispatch(handle, read), read.server), raise_server_exceptions=False)


@pytest.mark.parametrize("failed", [[DIED], [b"", DIED], [b"", Head(200, JSON), b"{", DIED], FULL, []])
def test_what_has_not_been_sent_is_asked_again(failed: list[Any]) -> None:
    handle = Handle(failed, WHOLE)
    found = client(handle).post("/v1/chat/completions", json=BODY)
    assert (found.status_code, found.json()) == (200, {"a": 1})
    first, second = handle.calls
    assert isinstance(first[1][0], Call)
    assert "Hi" in first[1][0].prompt
    assert second[1] == ()  # named, so that the router does not send it to the same replica again
    assert (bool(first[0]["session_id"]), second[0]["session_id"]) == (True, "")
    assert handle.sources[0].is_cancelled


def test_it_gives_up_with_the_last_answer_or_with_an_error() -> None:
    full = client(Handle(*[FULL] * module.ATTEMPTS)).post("/v1/chat/completions", json=BODY)
    assert full.status_code == 429
    lost = client(Handle(*[[DIED]] * module.ATTEMPTS), accept_timeout_s=0).post("/v1/messages", json=BODY)
    assert (lost.status_code, lost.json()["error"]["type"]) == (529, "overloaded_error")


@pytest.mark.parametrize("gone", [[DIED], [], ENDING])
def test_replicas_that_are_replaced_are_asked_until_the_time_is_over(gone: list[Any]) -> None:
    handle = Handle(*[gone] * (module.ATTEMPTS + 3), WHOLE)
    assert client(handle).post("/v1/chat/completions", json=BODY).status_code == 200


def test_a_request_that_replicas_die_of_is_not_passed_on_for_ever() -> None:
    handle = Handle(*[[b"", DIED]] * module.ATTEMPTS)
    assert client(handle).post("/v1/chat/completions", json=BODY).status_code == 503
    assert len(handle.calls) == module.ATTEMPTS


def test_a_request_that_no_replica_takes_is_refused_in_time() -> None:
    handle = Handle(*[NOBODY] * module.ATTEMPTS)
    refused = client(handle, accept_timeout_s=0.05).post("/v1/chat/completions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert all(source.is_cancelled for source in handle.sources)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_stream_that_has_begun_ends_with_an_error(path: str) -> None:
    handle = Handle([b"", Head(200, EVENTS), b"data: {}\n\n", DIED])
    text = client(handle).post(path, json={**BODY, "stream": True}).text
    assert text.startswith("data: {}\n\n")
    frames = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "gone" in json.dumps(frames[-1])
    assert len(handle.calls) == 1


def test_events_for_errors_are_those_of_each_api() -> None:
    assert last_event("/v1/chat/completions", 3).endswith(b"data: [DONE]\n\n")
    assert last_event("/v1/messages", 3).startswith(b"event: error\n")
    assert json.loads(last_event("/v1/responses", 3).partition(b"data: ")[2])["sequence_number"] == 3


def test_an_error_of_our_own_is_not_asked_again() -> None:
    from ray.exceptions import RayTaskError

    handle = Handle([b"", RayTaskError("answer", "", ValueError())])
    assert client(handle).post("/v1/chat/completions", json=BODY).status_code == 500
    assert len(handle.calls) == 1


def test_what_has_no_text_goes_to_any_replica_under_no_name() -> None:
    handle = Handle(WHOLE, WHOLE)
    assert client(handle).get("/v1/models").json() == {"a": 1}
    assert handle.calls[0][1] == ()
    assert handle.calls[0][0]["multiplexed_model_id"] == ""


@pytest.mark.parametrize(("name", "adapter"), [("demo", ""), ("poet", "poet"), (5, "")])
def test_a_model_that_is_no_name_of_its_own_is_an_adapter(name: object, adapter: str) -> None:
    handle = Handle(WHOLE)
    client(handle, lora_root="/adapters").post("/v1/chat/completions", json={**BODY, "model": name})
    assert handle.calls[0][0]["multiplexed_model_id"] == adapter


def test_keys_and_sizes_are_checked_before_a_replica_is_asked() -> None:
    handle = Handle(WHOLE, WHOLE)
    guarded = client(handle, server={"api_keys": ["secret"], "max_body_bytes": 100})
    assert guarded.post("/v1/chat/completions", json=BODY).status_code == 401
    key = {"authorization": "Bearer secret"}
    assert guarded.post("/v1/chat/completions", json={**BODY, "user": "a" * 200}, headers=key).status_code == 413
    assert handle.calls == []
    found = guarded.post("/v1/chat/completions", json=BODY, headers=key)
    assert found.status_code == 200
    assert "x-request-id" not in found.headers  # Ray's proxy adds it
