"""Bodies of /v1/responses become conversations; chunks become the events that the official client demands."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response

from gemcutter.completion import Chunk, Completion, RequestMetrics
from gemcutter.server.responses_events import FreeText, ResponseEvents
from gemcutter.server.wire.fields import FieldError, seal
from gemcutter.server.wire.responses import ResponsesRequest, to_chat
from gemcutter.text.grammar import Constraint
from gemcutter.text.tool_calls import ToolCall

Events = list[tuple[str, dict[str, Any]]]
WEATHER = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}
PATCH = {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}}
CALLING = [
    Chunk("Let me", "reasoning"),
    Chunk(" see.", "reasoning"),
    Chunk("I look.", "content"),
    Chunk("", "tool_call", index=0, name="get_weather"),
    Chunk('{"city": "O', "tool_call", index=0),
    Chunk('slo"}', "tool_call", index=0),
    Chunk('{"input": "a\\', "tool_call", index=1, name="apply_patch"),
    Chunk('nb"}', "tool_call", index=1),
]
CALLS = (ToolCall("get_weather", '{"city": "Oslo"}'), ToolCall("apply_patch", '{"input": "a\\nb"}'))


def asked(input: object = "Hi", **fields: Any) -> ResponsesRequest:
    return ResponsesRequest(model="demo", input=input, **fields)  # type: ignore[arg-type]


def completion(finish: Any = "stop", calls: tuple[ToolCall, ...] = ()) -> Completion:
    metrics = RequestMetrics(cached_tokens=4)
    return Completion("", (5, 6, 7), finish, tuple(range(10)), metrics=metrics, tool_calls=calls, reasoning_tokens=2)


def played(chunks: list[Chunk], end: Completion, **fields: Any) -> tuple[Events, dict[str, Any]]:
    events = ResponseEvents(asked(tools=[WEATHER, PATCH], **fields), "demo")
    found = [*events.start(), *(event for chunk in chunks for event in events.push(chunk)), *events.finish(end)]
    return found, events.response


def streamed(events: Events) -> tuple[list[Any], Response]:
    """Return what the client's own stream helper makes of events on the wire."""
    wire = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, text=wire)

    client = openai.OpenAI(api_key="k", base_url="http://test", http_client=httpx2.Client(transport=httpx2.MockTransport(answer)))
    with client.responses.stream(model="demo", input="Hi") as stream:
        return list(stream), stream.get_final_response()


def spelled(events: Events) -> list[str]:
    return [name.removeprefix("response.") for name, _ in events]


# ---- requests ----


def test_a_conversation_keeps_its_order() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}, {"type": "input_text", "text": "Now."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "get_weather", "arguments": '{"city":"Oslo"}'},
        {"type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch", "input": "a\nb"},
        {"type": "function_call_output", "call_id": "call_1", "output": "4 C"},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "done"}]},
        {"type": "message", "role": "developer", "content": "Be brief."},
    ]
    chat = to_chat(asked(items, instructions="You help."))
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "apply_patch", "arguments": {"input": "a\nb"}}},
    ]
    assert chat.messages == [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": "Weather?\nNow."},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "4 C"},
        {"role": "tool", "tool_call_id": "call_2", "content": "done"},
        {"role": "developer", "content": "Be brief."},
    ]


@pytest.mark.parametrize(
    ("item", "thought"),
    [
        ({"summary": [], "encrypted_content": seal("Hm.")}, "Hm."),
        ({"summary": [{"type": "summary_text", "text": "Short."}], "encrypted_content": "of somebody else"}, "Short."),
        ({"summary": [], "content": None, "encrypted_content": None}, None),
    ],
)
def test_reasoning_comes_back(item: dict[str, Any], thought: str | None) -> None:
    chat = to_chat(
        asked([{"role": "user", "content": "Hi"}, {"type": "reasoning", **item}, {"role": "assistant", "content": "Yes"}])
    )
    assert chat.messages[1].get("reasoning_content") == thought
    assert chat.messages[1]["content"] == "Yes"


def test_what_was_streamed_may_be_sent_back() -> None:
    _, response = played(CALLING, completion(calls=CALLS))
    chat = to_chat(asked([{"role": "user", "content": "Hi"}, *response["output"]]))
    assert [call["function"]["name"] for call in chat.messages[1]["tool_calls"]] == ["get_weather", "apply_patch"]
    assert chat.messages[1]["reasoning_content"] == "Let me see."
    assert chat.messages[1]["content"] == "I look."


def test_earlier_items_come_between_instructions_and_input() -> None:
    chat = to_chat(
        asked("And?", instructions="You help."), [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    )
    assert [message["content"] for message in chat.messages] == ["You help.", "Hi", "Yes", "And?"]


def test_custom_tools_are_functions_of_one_text_and_built_in_ones_are_left_out() -> None:
    chat = to_chat(asked(tools=[{"type": "web_search"}, WEATHER, PATCH]))
    assert [tool["function"]["name"] for tool in chat.tools] == ["get_weather", "apply_patch"]
    schema = chat.tools[1]["function"]["parameters"]
    assert schema["required"] == ["input"]
    assert "start: /x/" in schema["properties"]["input"]["description"]
    assert len(chat.warnings) == 1
    assert "web_search" in chat.warnings[0]


@pytest.mark.parametrize(
    ("choice", "means"),
    [
        (None, "auto"),
        ("required", "required"),
        ({"type": "function", "name": "get_weather"}, {"name": "get_weather"}),
        ({"type": "custom", "name": "apply_patch"}, {"name": "apply_patch"}),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "get_weather"}, {"type": "web_search"}],
            },
            {"names": ["get_weather"], "mode": "required"},
        ),
    ],
)
def test_tool_choice(choice: object, means: object) -> None:
    assert to_chat(asked(tools=[WEATHER, PATCH], tool_choice=choice)).tool_choice == means


@pytest.mark.parametrize(("effort", "is_on"), [(None, None), ("none", False), ("minimal", True), ("xhigh", True)])
def test_effort_switches_thinking(effort: str | None, is_on: bool | None) -> None:
    assert to_chat(asked(reasoning={"effort": effort, "summary": "auto"})).thinking is is_on


def test_formats_are_constraints() -> None:
    format = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    for strict in (True, False):
        chat = to_chat(asked(text={"format": {**format, "strict": strict}, "verbosity": "low"}))
        assert chat.constraint == Constraint("json_schema", '{"type": "object"}', strict)
    assert to_chat(asked(text={"format": {"type": "json_object"}})).constraint == Constraint("json_object")
    assert to_chat(asked(text={"format": {"type": "text"}})).constraint is None


BAD: list[tuple[str, object, dict[str, Any]]] = [
    ("input", [], {}),
    ("input[0]", ["Hi"], {}),
    ("input[0].type", [{"type": "teleport"}], {}),
    ("input[0].type", [{"type": "item_reference", "id": "x"}], {}),
    ("input[0].role", [{"role": "pope", "content": "Hi"}], {}),
    ("input[0].content", [{"role": "user", "content": 3}], {}),
    ("input[0].content[0].type", [{"role": "user", "content": [{"type": "input_file"}]}], {}),
    ("input[0].content[0].image_url", [{"role": "user", "content": [{"type": "input_image", "image_url": "x.png"}]}], {}),
    ("input[0].content[0].file_id", [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}], {}),
    ("input[0].name", [{"type": "function_call", "call_id": "a"}], {}),
    ("input[0].call_id", [{"type": "function_call_output", "output": "a"}], {}),
    ("tools[0].name", "Hi", {"tools": [{"type": "function"}]}),
    ("tools[0].type", "Hi", {"tools": [{"name": "f"}]}),
    ("tools[0].parameters", "Hi", {"tools": [{"type": "function", "name": "f", "parameters": 1}]}),
    ("tool_choice", "Hi", {"tool_choice": "required"}),
    ("tool_choice", "Hi", {"tool_choice": "sometimes"}),
    ("tool_choice.name", "Hi", {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}),
    ("tool_choice.type", "Hi", {"tools": [WEATHER], "tool_choice": {"type": "mcp"}}),
    ("text.format.type", "Hi", {"text": {"format": {"type": "xml"}}}),
    ("text.format.schema", "Hi", {"text": {"format": {"type": "json_schema"}}}),
    ("reasoning.effort", "Hi", {"reasoning": {"effort": 5}}),
    ("include[0]", "Hi", {"include": ["message.output_text.logprobs"]}),
    ("truncation", "Hi", {"truncation": "auto"}),
    ("top_logprobs", "Hi", {"top_logprobs": 2}),
    ("background", "Hi", {"background": True}),
    ("conversation", "Hi", {"conversation": "conv_1"}),
    ("prompt", "Hi", {"prompt": {"id": "p"}}),
]


@pytest.mark.parametrize(("param", "input", "fields"), BAD, ids=[f"{i}-{bad[0]}" for i, bad in enumerate(BAD)])
def test_what_cannot_be_served_is_named(param: str, input: object, fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as found:
        to_chat(asked(input, **fields))
    assert found.value.param == param


# ---- events ----


def test_the_client_reads_reasoning_text_and_calls() -> None:
    events, response = played(CALLING, completion(calls=CALLS))
    fired, final = streamed(events)
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "custom_tool_call"]
    assert final.output_text == "I look."
    assert final.output[0].content[0].text == "Let me see."  # type: ignore[union-attr, index]
    assert final.output[2].arguments == '{"city": "Oslo"}'  # type: ignore[union-attr]
    assert final.output[3].input == "a\nb"  # type: ignore[union-attr]
    assert {item.status for item in final.output} == {"completed"}  # type: ignore[union-attr]
    assert final.usage is not None
    assert final.usage.input_tokens_details.cached_tokens == 4
    assert final.usage.output_tokens_details.reasoning_tokens == 2
    assert (final.usage.input_tokens, final.usage.output_tokens, final.usage.total_tokens) == (10, 3, 13)
    assert final.status == response["status"] == "completed"
    assert fired[-1].type == "response.completed"


def test_the_final_output_is_what_was_streamed() -> None:
    events, response = played(CALLING, completion(calls=CALLS))
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    assert done == response["output"] == events[-1][1]["response"]["output"]
    added = [data["item"] for name, data in events if name == "response.output_item.added"]
    assert [(item["type"], item["id"], item.get("call_id")) for item in added] == [
        (item["type"], item["id"], item.get("call_id")) for item in done
    ]


def test_events_are_numbered_without_gaps_and_in_order() -> None:
    events, _ = played(CALLING[:4], completion(calls=CALLS[:1]))
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(data["type"] == name for name, data in events)
    assert spelled(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_the_first_events_show_the_response_before_its_output() -> None:
    events, _ = played(CALLING, completion(calls=CALLS))
    assert [(data["response"]["status"], data["response"]["output"]) for _, data in events[:2]] == [("in_progress", [])] * 2


def test_every_event_is_one_that_the_client_knows_with_its_required_fields() -> None:
    """Validate against the client's types, which its own decoder does not."""
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for _, data in played(CALLING, completion(calls=CALLS))[0]:
        adapter.validate_python(data)


@pytest.mark.parametrize(
    ("chunks", "status"), [(CALLING[:3], "incomplete"), (CALLING[:5], "incomplete"), (CALLING[:6], "completed")]
)
def test_a_limit_leaves_the_open_item_incomplete(chunks: list[Chunk], status: str) -> None:
    calls = CALLS[:1] if status == "completed" else ()
    events, response = played(chunks, completion("length", calls))
    assert spelled(events)[-1] == "incomplete"
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]][-1] == status
    assert {item["status"] for item in response["output"][:-1]} <= {"completed"}


def test_an_error_in_the_middle_is_told_by_the_last_event() -> None:
    events = ResponseEvents(asked(), "demo")
    found = [*events.start(), *events.push(Chunk("He")), *events.fail("server_error", "gone")]
    assert spelled(found)[-3:] == ["content_part.done", "output_item.done", "failed"]
    assert found[-1][1]["response"]["error"] == {"code": "server_error", "message": "gone"}


def test_reasoning_is_sealed_if_asked_for() -> None:
    _, response = played(CALLING[:2], completion(), include=["reasoning.encrypted_content"])
    assert response["output"][0]["encrypted_content"] == seal("Let me see.")
    _, response = played(CALLING[:2], completion())
    assert "encrypted_content" not in response["output"][0]


def test_alternating_kinds_open_new_items() -> None:
    chunks = [Chunk("a"), Chunk("b", "reasoning"), Chunk("c"), Chunk("{}", "tool_call", index=0, name="get_weather"), Chunk("d")]
    events, response = played(chunks, completion(calls=CALLS[:1]))
    streamed(events)
    assert [item["type"] for item in response["output"]] == ["message", "reasoning", "message", "function_call", "message"]


# ---- the text of custom tools ----


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.booleans(), st.data())
def test_free_text_is_decoded_at_every_cut(text: str, is_ascii: bool, data: st.DataObject) -> None:
    raw = json.dumps({"input": text}, ensure_ascii=is_ascii)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    found = FreeText()
    pieces = [found.push(raw[start:end]) for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert "".join(pieces) + found.finish() == text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('{"other": "x", "input": "y"}', "y"),
        ('{"input": 5}', '{"input": 5}'),
        ('{"patch": "x"}', '{"patch": "x"}'),
        ("{}", "{}"),
        ('{"pat', '{"pat'),
    ],
)
def test_arguments_of_another_form_are_given_whole(raw: str, text: str) -> None:
    found = FreeText()
    assert "".join(map(found.push, raw)) + found.finish() == text
