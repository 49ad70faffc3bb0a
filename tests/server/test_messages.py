"""/v1/messages on the demo model, through Anthropic's client as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest

import gemcutter
from gemcutter.server import chat_task
from gemcutter.server.options import ServerOptions
from tests.server.conftest import running
from tests.server.serving import failing, left, until

HI: list[Any] = [{"role": "user", "content": "Hi"}]
LONG = {"max_tokens": 30_000, "messages": HI, "model": "demo", "thinking": {"type": "enabled"}}


@pytest.fixture(scope="module")
def model() -> Iterator[gemcutter.Model]:
    with gemcutter.load("demo") as found:
        yield found


@pytest.fixture(scope="module")
def url(model: gemcutter.Model) -> Iterator[str]:
    with running(model, ServerOptions(names=("demo", "haiku"))) as found:
        yield found.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="k", base_url=url, max_retries=0) as found:
        yield found


def test_the_reply_is_the_models(client: anthropic.Anthropic, model: gemcutter.Model) -> None:
    wanted = model.chat(HI, max_tokens=16)
    found = client.messages.create(model="haiku", max_tokens=16, messages=HI)
    assert [block.to_dict() for block in found.content] == [{"type": "text", "text": wanted.text}]
    assert (found.model, found.stop_reason) == ("haiku", "end_turn")
    assert found.usage.output_tokens == len(wanted.tokens)
    assert found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0) == len(wanted.prompt_tokens)


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}])
def test_streaming_gives_the_same_message(client: anthropic.Anthropic, thinking: Any) -> None:
    asked: Any = {"model": "demo", "max_tokens": 32, "messages": HI, "thinking": thinking}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert (events[0], events[-1]) == ("message_start", "message_stop")
    assert (whole.content[0].type == "thinking") == (thinking["type"] != "disabled")


def test_a_budget_ends_the_thought(client: anthropic.Anthropic, model: gemcutter.Model) -> None:
    asked: Any = {"model": "demo", "max_tokens": 32, "messages": HI}
    free = client.messages.create(**asked, thinking={"type": "adaptive"})
    held = client.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 6})
    long, short = free.content[0].thinking, held.content[0].thinking  # type: ignore[union-attr]
    assert long.startswith(short)
    assert 0 < len(short) < len(long)
    assert len(model.tokenizer.encode(short, bos=False)) <= 6
    assert held.content[1].type == "text"


def test_thoughts_may_stay_hidden(client: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    found = client.messages.create(model="demo", max_tokens=32, messages=HI, thinking=thinking)
    block = found.content[0]
    assert block.type == "thinking"
    assert block.thinking == ""
    assert block.signature
    again: list[Any] = [*HI, {"role": "assistant", "content": found.content}, {"role": "user", "content": "And?"}]
    assert client.messages.create(model="demo", max_tokens=4, messages=again).content


def test_stop_sequences(client: anthropic.Anthropic, model: gemcutter.Model) -> None:
    text = model.chat(HI, max_tokens=16).text
    found = client.messages.create(model="demo", max_tokens=16, messages=HI, stop_sequences=[text[4:7]])
    assert found.content[0].text == text[: text.index(text[4:7])]  # type: ignore[union-attr]
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", text[4:7])


def test_a_limit_is_named(client: anthropic.Anthropic) -> None:
    found = client.messages.create(model="demo", max_tokens=2, messages=HI)
    assert (found.stop_reason, found.usage.output_tokens) == ("max_tokens", 2)


def test_count_tokens_agrees_with_what_is_computed(client: anthropic.Anthropic) -> None:
    asked: Any = {
        "messages": [*HI, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "And?"}],
        "system": "Be brief.",
    }
    counted = client.messages.count_tokens(model="demo", **asked)
    used = client.messages.create(model="demo", max_tokens=1, **asked).usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_the_billing_line_changes_nothing(client: anthropic.Anthropic) -> None:
    counts = {
        client.messages.count_tokens(model="demo", messages=HI, system=[{"type": "text", "text": text}]).input_tokens
        for text in (
            "Be brief.",
            "x-anthropic-billing-header: cc_version=2; cch=ab12;\nBe brief.",
            "x-anthropic-billing-header: c\nBe brief.",
        )
    }
    assert len(counts) == 1


def test_a_system_message_in_the_middle_leaves_what_is_before_it(client: anthropic.Anthropic, model: gemcutter.Model) -> None:
    before: list[Any] = [*HI, {"role": "assistant", "content": "Yes"}]
    whole = [*before, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}]
    assert client.messages.create(model="demo", max_tokens=2, messages=whole).content
    counted = client.messages.count_tokens(model="demo", messages=whole).input_tokens
    assert counted == len(model.encode(whole))


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "demo", "messages": HI}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": 5, "messages": HI}, 400, "invalid_request_error", "model"),
    ({"model": "demo", "max_tokens": 0, "messages": HI}, 400, "invalid_request_error", "max_tokens"),
    ({"model": "demo", "max_tokens": 5}, 400, "invalid_request_error", "messages"),
    ({"model": "demo", "max_tokens": 5, "messages": [{"role": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
    ({"model": "demo", "max_tokens": 5, "messages": HI, "stop_sequences": [""]}, 400, "invalid_request_error", "stop[0]"),
    ({"model": "demo", "max_tokens": 5, "messages": HI, "temperature": -1}, 400, "invalid_request_error", "temperature"),
    ({"model": "gpt", "max_tokens": 5, "messages": HI}, 404, "not_found_error", "gpt"),
    (
        {"model": "demo", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi " * 20_000}]},
        400,
        "invalid_request_error",
        "prompt is too long",
    ),
]


@pytest.mark.parametrize(("body", "status", "kind", "names"), BAD, ids=[f"{i}-{bad[3]}" for i, bad in enumerate(BAD)])
def test_errors_have_the_apis_own_shape(url: str, body: dict[str, Any], status: int, kind: str, names: str) -> None:
    found = httpx2.post(
        f"{url}/v1/messages?beta=true", json=body, headers={"x-request-id": "r1", "anthropic-beta": "unknown-2030"}
    )
    error = found.json()
    assert (found.status_code, error["type"], error["error"]["type"], error["request_id"]) == (status, "error", kind, "r1")
    assert names in error["error"]["message"]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"model": "demo"'])
def test_what_is_no_body_is_refused(url: str, text: str) -> None:
    found = httpx2.post(f"{url}/v1/messages", content=text)
    assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")


def test_tools_that_are_not_run_are_named_in_a_header(url: str) -> None:
    body = {"model": "demo", "max_tokens": 1, "messages": HI, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}
    found = httpx2.post(f"{url}/v1/messages", json=body)
    assert found.status_code == 200
    assert "web_search_20250305" in found.headers["x-gemcutter-warning"]


def test_silence_is_broken_by_pings_that_the_client_passes_over(model: gemcutter.Model) -> None:
    with running(model, ServerOptions(names=("demo",), ping_s=0.0001)) as server:
        url = server.url
        body = {"model": "demo", "max_tokens": 3, "messages": HI, "stream": True}
        raw = httpx2.post(f"{url}/v1/messages", json=body).text
        assert 'event: ping\ndata: {"type":"ping"}\n\n' in raw
        client = anthropic.Anthropic(api_key="k", base_url=url)
        with client, client.messages.stream(model="demo", max_tokens=3, messages=HI) as stream:
            assert stream.get_final_message().usage.output_tokens == 3


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(url: str, model: gemcutter.Model, is_stream: bool) -> None:
    at_work = model.engine.scheduler.running
    left(url, "/v1/messages", {**LONG, "stream": is_stream}, lambda: bool(at_work))
    until(lambda: not at_work)


def test_an_error_in_the_middle_ends_the_stream(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes from the engine: a processor that fails after some tokens."""
    monkeypatch.setattr(chat_task, "_thinking_budget", lambda *_: failing)
    raw = httpx2.post(f"{url}/v1/messages", json={"model": "demo", "max_tokens": 9, "messages": HI, "stream": True}).text
    *_, last = raw.strip().split("\n\n")
    name, _, data = last.partition("\ndata: ")
    assert name == "event: error"
    assert "the third token is too much" in json.loads(data)["error"]["message"]
    assert "event: message_stop" not in raw
