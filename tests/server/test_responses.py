"""/v1/responses on the demo model, through OpenAI's client as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

import gemcutter
from gemcutter.server import chat_task
from gemcutter.server.options import ServerOptions
from tests.server.conftest import running
from tests.server.serving import failing, left, until


@pytest.fixture(scope="module")
def model() -> Iterator[gemcutter.Model]:
    with gemcutter.load("demo") as found:
        yield found


@pytest.fixture(scope="module")
def url(model: gemcutter.Model) -> Iterator[str]:
    with running(model, ServerOptions(names=("demo",))) as found:
        yield found.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="k", base_url=f"{url}/v1", max_retries=0) as found:
        yield found


@pytest.fixture
def keeping(model: gemcutter.Model) -> Iterator[openai.OpenAI]:
    """A client of a server that keeps responses."""
    options = ServerOptions(names=("demo",), store_bytes=1_000_000)
    with running(model, options) as server, openai.OpenAI(api_key="k", base_url=f"{server.url}/v1", max_retries=0) as found:
        yield found


def test_the_reply_is_the_models(client: openai.OpenAI, model: gemcutter.Model) -> None:
    wanted = model.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], max_tokens=16)
    found = client.responses.create(model="demo", input="Hi", instructions="Be brief.", max_output_tokens=16, metadata={"a": "b"})
    assert found.output_text == wanted.text
    assert (found.model, found.metadata, found.instructions) == ("demo", {"a": "b"}, "Be brief.")
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == (len(wanted.prompt_tokens), len(wanted.tokens))


@pytest.mark.parametrize("effort", ["none", "high"])
def test_streaming_gives_the_same_response(client: openai.OpenAI, effort: Any) -> None:
    asked: Any = {
        "model": "demo",
        "input": "Hi",
        "max_output_tokens": 40,
        "reasoning": {"effort": effort},
        "text": {"verbosity": "low"},
    }
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events: list[Any] = list(stream)
    streamed = events[-1].response  # completed or, for a thinker, incomplete
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert streamed.status == whole.status
    assert streamed.output_text == whole.output_text
    assert [item.type for item in streamed.output] == [item.type for item in whole.output]
    assert ([item.type for item in whole.output] == ["message"]) == (effort == "none")


def test_the_asynchronous_client_reads_it_too(url: str) -> None:
    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1")
        async with client, client.responses.stream(model="demo", input="Hi") as stream:
            return [event.type async for event in stream]

    types = asyncio.run(ask())
    assert (types[0], types[-1]) == ("response.created", "response.completed")


def test_a_conversation_goes_on_with_its_own_items(client: openai.OpenAI, model: gemcutter.Model) -> None:
    """As agents do that keep nothing on the server: sealed reasoning comes back with the items."""
    include: Any = ["reasoning.encrypted_content"]
    asked: Any = {"model": "demo", "max_output_tokens": 64, "store": False, "include": include, "reasoning": {"effort": "low"}}
    first = client.responses.create(input="Hi", **asked)
    assert first.output[0].encrypted_content  # type: ignore[union-attr]
    items: Any = [
        {"role": "user", "content": "Hi"},
        *(item.to_dict() for item in first.output),
        {"role": "user", "content": "And?"},
    ]
    second = client.responses.create(input=items, **asked)
    assert second.usage is not None
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
    ]
    assert second.usage.input_tokens == len(model.encode(turns, enable_thinking=True))


def test_a_limit_is_named(client: openai.OpenAI) -> None:
    found = client.responses.create(model="demo", input="Hi", max_output_tokens=2)
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_nothing_is_continued_without_a_store(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.responses.create(model="demo", input="Hi", previous_response_id="resp_1")
    assert found.value.body["param"] == "previous_response_id"  # type: ignore[index]
    assert client.responses.create(model="demo", input="Hi", max_output_tokens=1).store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_store_continues_what_it_keeps(keeping: openai.OpenAI, model: gemcutter.Model, is_stream: bool) -> None:
    if is_stream:
        with keeping.responses.stream(model="demo", input="Hi") as stream:
            first: Any = stream.get_final_response()
    else:
        first = keeping.responses.create(model="demo", input="Hi")
    second = keeping.responses.create(model="demo", input="And?", previous_response_id=first.id, instructions="Be brief.")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
    ]
    assert second.usage is not None
    assert second.usage.input_tokens == len(model.encode(turns))
    third = keeping.responses.create(model="demo", input="Why?", previous_response_id=second.id)
    turns = [*turns[1:], {"role": "assistant", "content": second.output_text}, {"role": "user", "content": "Why?"}]
    assert third.usage is not None
    assert third.usage.input_tokens == len(model.encode(turns))


def test_what_is_kept_may_be_read_and_forgotten(keeping: openai.OpenAI) -> None:
    found = keeping.responses.create(model="demo", input="Hi")
    assert keeping.responses.retrieve(found.id).output_text == found.output_text
    keeping.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError):
        keeping.responses.retrieve(found.id)
    with pytest.raises(openai.BadRequestError) as refused:
        keeping.responses.create(model="demo", input="And?", previous_response_id=found.id)
    assert refused.value.code == "previous_response_not_found"
    unkept = keeping.responses.create(model="demo", input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        keeping.responses.delete(unkept.id)


BAD: list[tuple[dict[str, Any], int, str | None]] = [
    ({}, 400, "input"),
    ({"input": 5}, 400, "input"),
    ({"input": "Hi", "max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"input": "Hi", "background": True}, 400, "background"),
    ({"input": [{"type": "teleport"}]}, 400, "input[0].type"),
    ({"input": "Hi", "tool_choice": "required"}, 400, "tool_choice"),
    ({"input": "Hi", "temperature": -1}, 400, "temperature"),
    ({"input": "Hi", "model": "gpt"}, 404, "model"),
    ({"input": "Hi " * 20_000}, 400, "prompt"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD, ids=[f"{i}-{bad[2]}" for i, bad in enumerate(BAD)])
@pytest.mark.parametrize("is_stream", [True, False])
def test_errors_have_the_apis_own_shape(url: str, body: dict[str, Any], status: int, param: str | None, is_stream: bool) -> None:
    found = httpx2.post(f"{url}/v1/responses", json={"model": "demo", "stream": is_stream, **body})
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert found.json()["error"]["param"] == param
    assert found.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000])
def test_what_is_no_body_is_refused(url: str, text: str) -> None:
    found = httpx2.post(f"{url}/v1/responses", content=text)
    assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_prompt_that_is_too_long_has_its_code(url: str) -> None:
    found = httpx2.post(f"{url}/v1/responses", json={"model": "demo", "input": "Hi " * 20_000})
    assert found.json()["error"]["code"] == "context_length_exceeded"


def test_silence_is_broken_by_comments_that_the_client_passes_over(model: gemcutter.Model) -> None:
    with running(model, ServerOptions(names=("demo",), ping_s=0.0001)) as server:
        url = server.url
        raw = httpx2.post(
            f"{url}/v1/responses", json={"model": "demo", "input": "Hi", "max_output_tokens": 3, "stream": True}
        ).text
        assert "\n: ping\n" in raw
        with (
            openai.OpenAI(api_key="k", base_url=f"{url}/v1") as client,
            client.responses.stream(model="demo", input="Hi") as stream,
        ):
            assert stream.get_final_response().status == "completed"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(url: str, model: gemcutter.Model, is_stream: bool) -> None:
    at_work = model.engine.scheduler.running
    body = {"model": "demo", "input": "Hi", "reasoning": {"effort": "high"}, "max_output_tokens": 30_000, "stream": is_stream}
    left(url, "/v1/responses", body, lambda: bool(at_work))
    until(lambda: not at_work)


def test_an_error_in_the_middle_is_a_failed_response(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes from the engine: a processor that fails after some tokens."""
    monkeypatch.setattr(chat_task, "_thinking_budget", lambda *_: failing)
    client = openai.OpenAI(api_key="k", base_url=f"{url}/v1")
    with client, client.responses.stream(model="demo", input="Hi") as stream:
        *_, last = stream
    assert last.type == "response.failed"
    assert "the third token is too much" in last.response.error.message
    assert last.response.output[0].content[0].text
