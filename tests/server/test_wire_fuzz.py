"""Whatever JSON a client sends, the converters give a conversation or an error that names a field: never anything else."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gemcutter.server.wire import messages, responses
from gemcutter.server.wire.fields import FieldError
from gemcutter.server.wire.media import MediaUrl

WORDS = [
    *("message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"),
    *("text", "input_text", "output_text", "input_image", "refusal", "image", "document", "thinking", "redacted_thinking"),
    *("tool_use", "tool_result", "search_result", "user", "assistant", "system", "developer", "function", "custom"),
    *("allowed_tools", "json_schema", "auto", "any", "tool", "none", "required", "f", "g", "base64", "url", "content", ""),
    *("data:;base64,AAAA", "http://x", "low", "file"),
]
KEYS = [
    *("type", "role", "content", "text", "name", "call_id", "id", "arguments", "output", "input", "summary", "source", "data"),
    *("encrypted_content", "thinking", "signature", "tool_use_id", "is_error", "format", "schema", "strict", "mode", "tools"),
    *("parameters", "input_schema", "description", "function", "title", "budget_tokens", "effort", "refusal", "image_url"),
    *("detail", "url", "max_soft_tokens", "file_id", "media_type"),
]
scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(WORDS) | st.text(max_size=4)
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5), max_leaves=14
)
items = st.lists(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=6), max_size=3)
tools = st.none() | items
objects = st.none() | st.dictionaries(st.sampled_from(KEYS), values, max_size=4)


def spell(source: object) -> str:
    """Return an image's address, the one thing in a conversation that is no JSON."""
    assert isinstance(source, MediaUrl)
    return source.url


def check(chat: Any) -> None:
    """Fail unless a conversation is one that any later stage can read."""
    json.dumps([chat.messages, chat.tools, chat.tool_choice], default=spell)
    assert chat.constraint is None or isinstance(chat.constraint.value, str | tuple)
    assert chat.messages
    for message in chat.messages:
        assert message["role"] in ("system", "developer", "user", "assistant", "tool")
        assert isinstance(message["content"], str | list | None)
        assert message["content"] is not None or message["role"] == "assistant"
        assert all(isinstance(call["function"]["name"], str) for call in message.get("tool_calls", ()))


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=3) | items,
    tools,
    st.sampled_from(WORDS) | objects,
    objects,
    objects,
    st.none() | st.lists(scalars, max_size=2),
)
def test_responses(input: Any, tools: Any, choice: Any, text: Any, reasoning: Any, include: Any) -> None:
    body = {"input": input, "tools": tools, "tool_choice": choice, "text": text, "reasoning": reasoning, "include": include}
    try:
        request = responses.ResponsesRequest(**body)
        check(responses.to_chat(request))
    except (FieldError, ValidationError):
        return
    assert isinstance(request.custom_tools, frozenset)


@settings(max_examples=150, deadline=None)
@given(items, st.none() | st.text(max_size=3) | items, tools, objects, objects, objects)
def test_messages(given: Any, system: Any, tools: Any, choice: Any, thinking: Any, output: Any) -> None:
    fields = {"system": system, "tools": tools, "tool_choice": choice, "thinking": thinking, "output_config": output}
    try:
        check(messages.to_chat(messages.MessagesRequest(model="m", messages=given, max_tokens=1, **fields)))
    except (FieldError, ValidationError):
        return
