"""Answers of a demanded form and calls that must be made, through all APIs, at a temperature at which the demo writes noise."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.server.conftest import Running

ASK: list[Any] = [{"role": "user", "content": "What is a lantern?"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["lamp", "ship"]}, "count": {"type": "integer", "minimum": 1, "maximum": 20}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Oslo", "Lima"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
    },
}
TIME = {"name": "get_time", "description": "The time", "parameters": {"type": "object", "properties": {}}}
TOOLS: list[Any] = [{"type": "function", "function": each} for each in (WEATHER, TIME)]
NOISE: dict[str, Any] = {"temperature": 2.0, "seed": 7, "max_tokens": 200}


def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def holds(text: str | None) -> bool:
    found = json.loads(text or "")
    return set(found) == {"kind", "count"} and found["kind"] in ("lamp", "ship") and 1 <= found["count"] <= 20


def choice(server: Running, **more: Any) -> Any:
    answer = server.post("/v1/chat/completions", {**server.chat("What is a lantern?"), **NOISE, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_chat_follows_a_schema(server: Running, strict: bool, seed: int) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": strict}}
    found = choice(server, response_format=format, seed=seed)
    assert found["finish_reason"] == "stop"
    assert holds(found["message"]["content"])


class Thing(BaseModel):
    kind: str
    count: int


def test_openais_parse_and_its_stream_helper_read_it(server: Running) -> None:
    with client(server) as asking:
        asked: dict[str, Any] = {"model": "demo", "messages": ASK, "response_format": Thing, "temperature": 1.0, "seed": 3}
        asked["max_tokens"] = 400
        parsed = asking.chat.completions.parse(**asked)
        if parsed.choices[0].finish_reason == "stop":
            assert isinstance(parsed.choices[0].message.parsed, Thing)
        with asking.chat.completions.stream(**asked) as stream:
            last = stream.get_final_completion()
        assert last.choices[0].message.content == parsed.choices[0].message.content


@pytest.mark.parametrize("thinking", [False, True])
def test_json_objects_and_what_vllm_calls_its_forms(server: Running, thinking: bool) -> None:
    short = {str(server.model.tokenizer.id_of(piece)): 50 for piece in ("<|channel>", "<channel|>")}  # a thought, and its end
    told = {"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": short} if thinking else {}
    assert choice(server, structured_outputs={"choice": ["yes", "no"]}, **told)["message"]["content"] in ("yes", "no")
    found = choice(server, structured_outputs={"regex": r"[a-f]{3}-\d{2}"}, **told)["message"]["content"]
    assert re.fullmatch(r"[a-f]{3}-\d{2}", found)
    assert holds(choice(server, structured_outputs={"json": SCHEMA}, **told)["message"]["content"])
    assert holds(choice(server, guided_json=json.dumps(SCHEMA), **told)["message"]["content"])
    lark = 'start: "a" ("b" | "c")+ "d"'
    assert re.fullmatch("a[bc]+d?", choice(server, structured_outputs={"grammar": lark}, max_tokens=30)["message"]["content"])
    whole = choice(server, response_format={"type": "json_object"})
    assert whole["finish_reason"] == "length" or isinstance(json.loads(whole["message"]["content"]), dict)
    assert whole["message"]["content"].startswith("{")


def test_raw_completions_follow_forms_too(server: Running) -> None:
    body = {"model": "demo", "prompt": "A lantern is", "structured_outputs": {"choice": [" a lamp", " a ship"]}, **NOISE}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] in (" a lamp", " a ship")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wanted", ["required", "get_time", "get_weather", "allowed"])
def test_calls_that_must_be_made_are_made(server: Running, wanted: str, stream: bool) -> None:
    named: Any = {"type": "function", "function": {"name": wanted}}
    if wanted == "allowed":
        listed = [{"type": "function", "function": {"name": "get_weather"}}]
        named = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": listed}}
    asked: dict[str, Any] = {"tool_choice": "required" if wanted == "required" else named, "tools": TOOLS}
    with client(server) as asking:
        more: dict[str, Any] = {"model": "demo", "messages": ASK, **asked, **NOISE, "parallel_tool_calls": False}
        if stream:
            with asking.chat.completions.stream(**more) as events:
                message = events.get_final_completion().choices[0]
        else:
            message = asking.chat.completions.create(**more).choices[0]
    (call,) = message.message.tool_calls or ()
    assert message.finish_reason == "tool_calls"
    assert call.function.name in {"required": ("get_time", "get_weather"), "allowed": ("get_weather",)}.get(wanted, (wanted,))
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert arguments["city"] in ("Oslo", "Lima")
        assert 1 <= arguments["days"] <= 9
    else:
        assert arguments == {}


def test_tools_and_a_schema_together_give_one_or_the_other(server: Running) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    seen = set()
    for seed in range(6):
        found = choice(server, response_format=format, tools=TOOLS, seed=seed, parallel_tool_calls=False)
        message = found["message"]
        if message.get("tool_calls"):
            seen.add("call")
            assert message["tool_calls"][0]["function"]["name"] in ("get_time", "get_weather")
        else:
            seen.add("answer")
            assert holds(message["content"])
    assert seen
    must = choice(server, response_format=format, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert must["message"]["tool_calls"]


def test_without_tools_no_call_is_written(server: Running) -> None:
    """Not even where a client makes the call's marker the likeliest token."""
    call = server.model.tokenizer.id_of("<|tool_call>")
    found = choice(server, logit_bias={str(call): 100}, max_tokens=8)
    assert "tool_calls" not in found["message"]
    assert "<|tool_call>" not in found["message"]["content"]


def test_responses_and_messages_follow_schemas_and_choices(server: Running) -> None:
    flat = [{"type": "function", **each} for each in (WEATHER, TIME)]
    with client(server) as asking:
        format: Any = {"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}}
        more: Any = {"model": "demo", "input": "What is a lantern?", "temperature": 2.0, "max_output_tokens": 200}
        assert holds(asking.responses.create(**more, text=format).output_text)
        called = asking.responses.create(**more, tools=flat, tool_choice={"type": "function", "name": "get_weather"})
        assert [item.name for item in called.output if item.type == "function_call"][:1] == ["get_weather"]
    with anthropic.Anthropic(api_key="k", base_url=server.url, max_retries=0) as other:
        tools: Any = [{"name": each["name"], "input_schema": each["parameters"]} for each in (WEATHER, TIME)]
        asked: Any = {"model": "demo", "max_tokens": 200, "messages": ASK, "extra_body": {"temperature": 1.0}}
        made = other.messages.create(**asked, tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})
        assert (made.stop_reason, made.content[-1].type) == ("tool_use", "tool_use")
        told = other.messages.create(**asked, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
        assert holds(told.content[-1].text)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": "abc"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
    ],
)
def test_forms_that_can_t_be_followed_are_refused(server: Running, change: dict[str, Any], param: str | None) -> None:
    answer = server.post("/v1/chat/completions", {**server.chat("Hi"), **change})
    assert answer.status_code == 400, answer.text
    assert param is None or answer.json()["error"]["param"] == param, answer.text


def test_a_strict_schema_with_a_keyword_that_can_t_be_held_to_is_refused(server: Running) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    refused = server.post("/v1/chat/completions", {**server.chat("Hi"), "response_format": format})
    assert refused.status_code == 400
    assert "uniqueItems" in refused.json()["error"]["message"]
    format["json_schema"]["strict"] = False  # type: ignore[index]
    assert choice(server, response_format=format, max_tokens=64)["message"]["content"].lstrip()[:1] == "["
