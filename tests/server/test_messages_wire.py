"""Bodies of /v1/messages become conversations; chunks become the events that the official client demands."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import pytest

from gemcutter.completion import Chunk, Completion, RequestMetrics
from gemcutter.server.messages_events import MessageEvents
from gemcutter.server.wire.fields import FieldError, seal, unseal
from gemcutter.server.wire.messages import MessagesRequest, to_chat
from gemcutter.text.grammar import Constraint
from gemcutter.text.tool_calls import ToolCall

WEATHER = {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object", "properties": {"city": {}}}}
CALLING = [
    Chunk("Let me", "reasoning"),
    Chunk(" see.", "reasoning"),
    Chunk("I look.", "content"),
    Chunk("", "tool_call", index=0, name="get_weather"),
    Chunk('{"city": "O', "tool_call", index=0),
    Chunk('slo"}', "tool_call", index=0),
    Chunk("{}", "tool_call", index=1, name="now"),
]
CALLS = (ToolCall("get_weather", '{"city": "Oslo"}'), ToolCall("now", "{}"))


def asked(messages: list[Any], **fields: Any) -> MessagesRequest:
    return MessagesRequest(model="demo", max_tokens=9, messages=messages, **fields)


def completion(finish: Any = "stop", calls: tuple[ToolCall, ...] = (), stopped: str | None = None) -> Completion:
    metrics = RequestMetrics(cached_tokens=4)
    return Completion("", (5, 6, 7), finish, tuple(range(10)), metrics=metrics, tool_calls=calls, stopped=stopped)


def played(chunks: list[Chunk], end: Completion, **options: Any) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    events = MessageEvents("demo", 10, **options)
    found = [*events.start(), *(event for chunk in chunks for event in events.push(chunk)), *events.finish(end)]
    return found, events.message


def streamed(events: list[tuple[str, dict[str, Any]]]) -> tuple[list[Any], anthropic.types.Message]:
    """Return what the client's own stream helper makes of events on the wire."""
    wire = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, text=wire)

    client = anthropic.Anthropic(
        api_key="k", base_url="http://test", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))
    )
    with client.messages.stream(model="demo", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]) as stream:
        return list(stream), stream.get_final_message()


def blocks_of(message: anthropic.types.Message) -> list[dict[str, Any]]:
    return [block.to_dict() for block in message.content]


def test_a_conversation_keeps_its_order_and_results_come_first() -> None:
    chat = to_chat(
        asked(
            [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                        {"type": "redacted_thinking", "data": "y"},
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}},
                    ],
                },
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
                        {
                            "type": "tool_result",
                            "tool_use_id": "toolu_1",
                            "content": [{"type": "text", "text": "down"}],
                            "is_error": True,
                        },
                    ],
                },
            ],
            system=[{"type": "text", "text": "x-anthropic-billing-header: cch=1;\nYou are Claude."}],
            tools=[WEATHER],
        )
    )
    call = {"id": "toolu_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    assert chat.messages == [
        {"role": "system", "content": "You are Claude."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I look.", "tool_calls": [call]},
        {"role": "system", "content": "Be brief."},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: down"},
        {"role": "user", "content": "And?"},
    ]
    assert chat.tools == [
        {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER["input_schema"]}}
    ]
    assert not chat.continues


def test_nothing_of_the_user_remains_after_results_alone() -> None:
    chat = to_chat(asked([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "1"}]}]))
    assert [message["role"] for message in chat.messages] == ["tool"]


def test_a_system_prompt_of_billing_alone_is_none() -> None:
    chat = to_chat(asked([{"role": "user", "content": "Hi"}], system="x-anthropic-billing-header: cch=2;"))
    assert [message["role"] for message in chat.messages] == ["user"]


def test_parts_out_of_order_begin_a_new_message() -> None:
    content = [
        {"type": "tool_use", "id": "a", "name": "f", "input": {}},
        {"type": "text", "text": "one "},
        {"type": "text", "text": "two"},
        {"type": "thinking", "thinking": "later"},
    ]
    chat = to_chat(asked([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]))
    texts = [(message["content"], message.get("reasoning_content")) for message in chat.messages[1:]]
    assert texts == [(None, None), ("one two", None), (None, "later")]


def test_the_last_message_of_the_assistant_is_continued() -> None:
    assert to_chat(asked([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}])).continues


@pytest.mark.parametrize(
    ("thinking", "is_on", "budget"),
    [
        (None, None, None),
        ({"type": "disabled"}, False, None),
        ({"type": "enabled", "budget_tokens": 7}, True, 7),
        ({"type": "adaptive"}, True, None),
        ({"type": "between_tools"}, True, None),
        ({"type": "something_new"}, True, None),
    ],
)
def test_thinking(thinking: dict[str, Any] | None, is_on: bool | None, budget: int | None) -> None:
    chat = to_chat(asked([{"role": "user", "content": "Hi"}], thinking=thinking))
    assert (chat.thinking, chat.thinking_budget) == (is_on, budget)


@pytest.mark.parametrize(
    ("choice", "means", "is_parallel"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "get_weather"}, {"name": "get_weather"}, True),
    ],
)
def test_tool_choice(choice: dict[str, Any], means: object, is_parallel: bool) -> None:
    chat = to_chat(asked([{"role": "user", "content": "Hi"}], tools=[WEATHER], tool_choice=choice))
    assert (chat.tool_choice, chat.parallel_tool_calls) == (means, is_parallel)


def test_tools_of_the_provider_are_left_out_with_a_warning() -> None:
    chat = to_chat(asked([{"role": "user", "content": "Hi"}], tools=[{"type": "bash_20250124", "name": "bash"}, WEATHER]))
    assert [tool["function"]["name"] for tool in chat.tools] == ["get_weather"]
    assert len(chat.warnings) == 1
    assert "tools[0]" in chat.warnings[0]
    assert "bash_20250124" in chat.warnings[0]


@pytest.mark.parametrize("fields", [{"output_config": {"format": 1}}, {"output_format": 1}])
def test_a_schema_for_the_reply(fields: dict[str, Any]) -> None:
    format = {"type": "json_schema", "schema": {"type": "object"}}
    given = json.loads(json.dumps(fields).replace("1", json.dumps(format)))
    chat = to_chat(asked([{"role": "user", "content": "Hi"}], **given))
    assert chat.constraint == Constraint("json_schema", '{"type": "object"}', True)


def test_documents_of_text_are_read() -> None:
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "body"}}
    chat = to_chat(asked([{"role": "user", "content": [document, {"type": "text", "text": "Sum up."}]}]))
    assert chat.messages == [{"role": "user", "content": "T\nbody\nSum up."}]


HI = [{"role": "user", "content": "Hi"}]
BAD: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("messages", [], {}),
    ("messages", [{"role": "user", "content": ""}], {}),
    ("messages[0]", ["Hi"], {}),
    ("messages[0].role", [{"role": "tool", "content": "Hi"}], {}),
    ("messages[0].content", [{"role": "user", "content": 5}], {}),
    ("messages[0].content[0].type", [{"role": "user", "content": [{"type": "hologram"}]}], {}),
    (
        "messages[0].content[0].source.url",
        [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x.png"}}]}],
        {},
    ),
    (
        "messages[0].content[0].source.type",
        [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}],
        {},
    ),
    ("messages[0].content[0].source.type", [{"role": "user", "content": [{"type": "document", "source": {"type": "url"}}]}], {}),
    ("messages[0].content[0].tool_use_id", [{"role": "user", "content": [{"type": "tool_result"}]}], {}),
    ("messages[1].content[0].name", [*HI, {"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}], {}),
    ("tools[0].name", HI, {"tools": [{"input_schema": {}}]}),
    ("tools[0].input_schema", HI, {"tools": [{"name": "f"}]}),
    ("tools[1].name", HI, {"tools": [WEATHER, WEATHER]}),
    ("tool_choice.name", HI, {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}),
    ("tool_choice.type", HI, {"tool_choice": {"type": "any"}}),
    ("thinking.type", HI, {"thinking": {}}),
    ("thinking.budget_tokens", HI, {"thinking": {"type": "enabled", "budget_tokens": "7"}}),
    ("output_config.format.type", HI, {"output_config": {"format": {"type": "xml"}}}),
    ("container", HI, {"container": "c"}),
    ("mcp_servers", HI, {"mcp_servers": [{"url": "http://x"}]}),
]


@pytest.mark.parametrize(("param", "messages", "fields"), BAD, ids=[f"{i}-{bad[0]}" for i, bad in enumerate(BAD)])
def test_what_cannot_be_served_is_named(param: str, messages: list[Any], fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as found:
        to_chat(asked(messages, **fields))
    assert found.value.param == param


def test_the_client_reads_thoughts_text_and_calls() -> None:
    events, message = played(CALLING, completion(calls=CALLS))
    fired, final = streamed(events)
    assert [block["type"] for block in blocks_of(final)] == ["thinking", "text", "tool_use", "tool_use"]
    assert final.content[0].thinking == "Let me see."  # type: ignore[union-attr]
    assert final.content[0].signature  # type: ignore[union-attr]
    assert [block.input for block in final.content if block.type == "tool_use"] == [{"city": "Oslo"}, {}]
    assert final.stop_reason == "tool_use"
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens, final.usage.output_tokens) == (6, 4, 3)
    assert blocks_of(final) == message["content"]
    assert final.id == message["id"]
    assert fired[-1].type == "message_stop"


def test_one_block_is_open_at_a_time() -> None:
    events, _ = played([*CALLING, Chunk("Done.", "content")], completion(calls=CALLS))
    is_open, places = False, []
    for name, data in events:
        assert data["type"] == name
        if name == "content_block_start":
            assert not is_open
            is_open, place = True, data["index"]
            places.append(place)
        elif name.startswith("content_block"):
            assert is_open
            assert data["index"] == places[-1]
            is_open = name != "content_block_stop"
    assert not is_open
    assert places == [0, 1, 2, 3, 4]
    assert [name for name, _ in events[-2:]] == ["message_delta", "message_stop"]


def test_hidden_thoughts_come_back_with_their_signature() -> None:
    events, message = played(CALLING[:3], completion(), shows_thinking=False)
    assert not [data for _, data in events if data.get("delta", {}).get("type") == "thinking_delta"]
    _, final = streamed(events)
    assert final.content[0].thinking == ""  # type: ignore[union-attr]
    chat = to_chat(asked([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": message["content"]}]))
    assert chat.messages[1]["reasoning_content"] == "Let me see."


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (completion(), "end_turn", None),
        (completion("length"), "max_tokens", None),
        (completion(stopped="END"), "stop_sequence", "END"),
        (completion(calls=CALLS), "tool_use", None),
        (completion("repetition"), "max_tokens", None),
    ],
)
def test_stop_reasons(end: Completion, reason: str, sequence: str | None) -> None:
    _, final = streamed(played([Chunk("Hi")], end)[0])
    assert (final.stop_reason, final.stop_sequence) == (reason, sequence)


def test_a_call_that_a_limit_cut_is_no_block_of_the_message() -> None:
    events, message = played(CALLING[2:5], completion("length"))
    streamed(events)
    assert [block["type"] for block in message["content"]] == ["text"]
    assert message["stop_reason"] == "max_tokens"


def test_a_reply_of_nothing_is_a_message_all_the_same() -> None:
    _, final = streamed(played([Chunk("", "content")], completion())[0])
    assert final.content == []
    assert final.stop_reason == "end_turn"


@pytest.mark.parametrize("text", ["", "plain", "lines\n<|channel>\N{PILE OF POO}"])
def test_sealed_reasoning_comes_back(text: str) -> None:
    assert unseal(seal(text)) == text


@pytest.mark.parametrize("foreign", [None, 5, "", "EqQBCkgIARAB", "not base64!", "\u00e9"])
def test_what_others_sealed_is_nothing(foreign: object) -> None:
    assert unseal(foreign) == ""
