"""Two replicas behind one address: every API's replies are those of a server of its own, and who begins alike meets again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import gemcutter
from bench.conversations import hold_all
from gemcutter.server.options import ServerOptions
from tests.replicas.conftest import MODEL, Deployed, deployed, until
from tests.server.conftest import Running, running
from tests.server.serving import left

QUESTION = [{"role": "user", "content": "What is a lantern?"}]
CHAT = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 16}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "demo", "prompt": "In the beginning", "temperature": 0, "max_tokens": 8},
    "/v1/responses": {"model": "demo", "input": "What is a lantern?", "temperature": 0, "max_output_tokens": 8},
    "/v1/messages": {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 8},
}
CHANGING = ("id", "created", "created_at", "completed_at", "item_id", "response_id")  # by request


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with gemcutter.load(**MODEL) as model, running(model, ServerOptions(names=("demo",))) as found:
        yield found


@pytest.fixture(scope="module")
def two(cluster: str) -> Iterator[Deployed]:
    with deployed(cluster, "two", replicas=2) as found:
        yield found


def constant(value: Any) -> Any:
    """Return a JSON value without what each request has anew: ids, times, and what was cached."""
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if name not in CHANGING and "usage" not in name}
        return {name: constant(part) for name, part in kept.items()}
    return [constant(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", BODIES)
def test_whole_replies_are_those_of_a_server(two: Deployed, plain: Running, path: str) -> None:
    found, wanted = two.post(path, BODIES[path]), plain.post(path, BODIES[path])
    assert found.status_code == wanted.status_code == 200, found.text
    assert constant(found.json()) == constant(wanted.json())


def events(url: str, path: str) -> tuple[httpx.Headers, str]:
    """Return the headers of a stream, and its text without what is cut differently: the deltas of a kind are joined."""
    found = httpx.post(url + path, json={**BODIES[path], "stream": True}, timeout=60)
    text = ""
    for line in found.text.splitlines():
        if line.startswith("data: {"):
            text += _delta(json.loads(line[6:]))
    return found.headers, text


def _delta(data: dict[str, Any]) -> str:
    if "choices" in data:
        first = (data["choices"] or [{}])[0]
        return str(first.get("text") or first.get("delta", {}).get("content") or "")
    delta = data.get("delta", "")
    return str(delta.get("text", "")) if isinstance(delta, dict) else str(delta)


@pytest.mark.parametrize("path", BODIES)
def test_streams_are_those_of_a_server(two: Deployed, plain: Running, path: str) -> None:
    headers, text = events(two.url, path)
    kind = headers["content-type"]
    assert kind.startswith("text/event-stream")
    assert len(headers.get_list("x-request-id")) == 1
    assert text
    assert text == events(plain.url, path)[1]


def test_a_stream_comes_as_it_is_written(two: Deployed) -> None:
    body = {**CHAT, "stream": True, "max_tokens": 300, "ignore_eos": True}
    with httpx.stream("POST", f"{two.url}/v1/chat/completions", json=body, timeout=60) as found:
        lines = [line for line in found.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 50


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "other"}, 404),
        ("/v1/chat/completions", {**CHAT, "temperature": "hot"}, 400),
        ("/v1/messages", {"model": "demo", "messages": []}, 400),
        ("/v1/chat/completions", [], 400),
        ("/v1/nothing", {}, 404),
    ],
)
def test_errors_are_those_of_a_server(two: Deployed, plain: Running, path: str, body: object, status: int) -> None:
    found, wanted = two.post(path, body), plain.post(path, body)
    assert found.status_code == wanted.status_code == status
    assert {**found.json(), "request_id": 0} == {**wanted.json(), "request_id": 0}


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/docs", "/"])
def test_every_route_is_served(two: Deployed, plain: Running, path: str) -> None:
    found, wanted = two.get(path), plain.get(path)
    assert (found.status_code, found.headers.get("content-type")) == (200, wanted.headers.get("content-type"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(two: Deployed, stream: bool) -> None:
    body = {**CHAT, "max_tokens": 2000, "ignore_eos": True, "stream": stream, "n": 4}
    before = counted(two, "abort")
    left(two.url, "/two/v1/chat/completions", body, lambda: requests(two) == 4)
    until(lambda: requests(two) == 0, most_s=2.0)
    assert counted(two, "abort") > before


def requests(found: Deployed) -> int:
    """Return how many requests run or wait at all replicas."""
    lines = [line for line in _lines(found) if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]
    return sum(int(float(line.split()[1])) for line in lines)


def counted(found: Deployed, reason: str) -> int:
    """Return how many requests have ended for a reason."""
    lines = [line for line in _lines(found) if "request_success_total{" in line and f'"{reason}"' in line]
    return sum(int(float(line.split()[1])) for line in lines)


def _lines(found: Deployed) -> list[str]:
    return found.get("/metrics").text.splitlines()


def test_metrics_are_those_of_all_replicas(two: Deployed) -> None:
    lines = [line for line in two.get("/metrics").text.splitlines() if line.startswith("vllm:num_requests_running{")]
    assert [line.partition('engine="')[2][0] for line in lines] == ["0", "1"]


def test_conversations_go_on_where_they_began(two: Deployed, cluster: str) -> None:
    """Without routing by prefix about every second turn meets a replica that does not know it."""
    known = hold_all(two.url, range(12), 3, 4).share
    with deployed(cluster, "balanced", replicas=2, routing="balanced") as other:
        unknown = hold_all(other.url, range(12), 3, 4).share
    with deployed(cluster, "hashed", replicas=2, routing="hash") as other:
        hashed = hold_all(other.url, range(12), 3, 4).share
    assert known > 0.6, (known, unknown, hashed)
    assert hashed > 0.6, (known, unknown, hashed)
    assert min(known, hashed) > unknown + 0.1, (known, unknown, hashed)
