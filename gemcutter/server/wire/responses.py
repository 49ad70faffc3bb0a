"""POST /v1/responses: what a body may hold, and how its items become a conversation.

Owns the fields of the request with what becomes of each (honoured, echoed, ignored or refused by name), and `to_chat`, the
conversion to the layout of chat completions. Refuses to know HTTP, the store and events. Read `fields.py` for the helpers,
`server/responses_events.py` for the way back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gemcutter.errors import spell_value
from gemcutter.server.wire.fields import (
    ChatInput,
    FieldError,
    Turns,
    as_list,
    as_name,
    as_object,
    as_text,
    check_declared,
    choice_word,
    function,
    joined,
    refuse,
    schema_constraint,
    unseal,
)
from gemcutter.server.wire.media import SPELLINGS, of_request, read_part
from gemcutter.text.grammar import Constraint

# Fields that would change what a client gets: refused by name where they ask for something.
REFUSED = {
    "background": "responses are made while the client waits; leave it out",
    "conversation": "conversations are not kept; send the items as `input`, or use previous_response_id",
    "prompt": "there are no stored prompts; send `instructions` and `input`",
    "context_management": "the conversation is taken as it is; shorten it in the client",
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty")
# What `include` may name. All but the first belong to tools that never run here, or to inputs: nothing is there to include.
ENCRYPTED = "reasoning.encrypted_content"
NOTHING_TO_INCLUDE = (
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
CUSTOM_INPUT = "input"  # the one argument of a custom tool
ROLES = ("user", "system", "developer", "assistant")


class ResponsesRequest(BaseModel):
    """The body of POST /v1/responses.

    Ignored: user, safety_identifier, service_tier, prompt_cache_key, prompt_cache_retention, stream_options, max_tool_calls
    (of built-in tools), text.verbosity, reasoning.summary (the reasoning itself is sent), and names that are not known.
    """

    model_config = ConfigDict(extra="allow")

    model: str = ""
    input: str | list[Any] = Field(description="a text, or items: message, function_call, function_call_output, reasoning, ...")
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    include: list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    truncation: str | None = None
    metadata: dict[str, Any] | None = None
    # as vLLM spells them
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_soft_tokens: int | None = Field(default=None, description="what an image may become: 70, 140, 280, 560 or 1120")
    mm_processor_kwargs: dict[str, Any] | None = Field(default=None, description="the same, as vLLM has it")

    @property
    def custom_tools(self) -> frozenset[str]:
        """Return the names of the tools whose calls have one free text."""
        return frozenset(tool["name"] for tool in self.tools or () if tool["type"] == "custom")

    @property
    def wants_encrypted(self) -> bool:
        """Return whether reasoning items carry a copy that the client need not read."""
        return ENCRYPTED in (self.include or ())


def to_chat(request: ResponsesRequest, earlier: Sequence[Mapping[str, Any]] = ()) -> ChatInput:
    """Return a request as a conversation; `earlier` are the items of the response that it continues.

    Raises FieldError, naming the field, for what can't be served.
    """
    _refuse_fields(request)
    tools, warnings = _tools(request.tools or ())
    effort = (request.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        refuse("reasoning.effort", f"expected a string, found {spell_value(effort)}")
    stop = request.stop
    return ChatInput(
        messages=_messages(request, earlier),
        tools=tools,
        tool_choice=_tool_choice(request.tool_choice, tools),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        max_tokens=request.max_output_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        sampling={name: value for name in SAMPLING if (value := getattr(request, name)) is not None},
        thinking=None if effort is None else effort != "none",
        template_options=dict(request.chat_template_kwargs or {}),
        constraint=_constraint(request.text or {}),
        format_field="text.format",
        max_soft_tokens=of_request(request.max_soft_tokens, request.mm_processor_kwargs),
        warnings=tuple(warnings),
    )


def items_of(request: ResponsesRequest) -> list[Mapping[str, Any]]:
    """Return the request's own input as items."""
    if isinstance(request.input, str):
        return [{"type": "message", "role": "user", "content": request.input}]
    return [as_object(item, f"input[{index}]") for index, item in enumerate(request.input)]


def _refuse_fields(request: ResponsesRequest) -> None:
    extra = request.model_extra or {}
    for name, remedy in REFUSED.items():
        if extra.get(name):
            refuse(name, f"not supported: {remedy}")
    if request.top_logprobs:
        refuse("top_logprobs", "log-probabilities are not part of responses here; /v1/chat/completions gives them")
    if request.truncation not in (None, "disabled"):
        refuse("truncation", f"only 'disabled' is supported, found {spell_value(request.truncation)}: shorten the input instead")
    for index, name in enumerate(request.include or ()):
        if name != ENCRYPTED and name not in NOTHING_TO_INCLUDE:
            refuse(f"include[{index}]", f"{spell_value(name)} can't be included; there is {ENCRYPTED}")


# ---- input items ----


def _messages(request: ResponsesRequest, earlier: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    turns = Turns()
    if request.instructions:
        turns.add({"role": "system", "content": request.instructions})
    for index, item in enumerate(earlier):
        _add_item(turns, item, f"previous_response_id: item {index}")
    turns.end()
    own = items_of(request)
    if not own and not earlier:
        refuse("input", "expected a text or at least one item, found none")
    for index, item in enumerate(own):
        _add_item(turns, item, f"input[{index}]")
    return turns.finish()


def _add_item(turns: Turns, item: Mapping[str, Any], where: str) -> None:
    """Add an item of any type to the conversation. Raises FieldError for a type that is not known."""
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        _add_message(turns, item, where)
    elif kind == "reasoning":
        if text := _reasoning_of(item, where):
            turns.reason(text)
    elif kind in ("function_call", "custom_tool_call"):
        name = as_name(item.get("name"), f"{where}.name")
        call_id = as_name(item.get("call_id") or item.get("id"), f"{where}.call_id")
        is_custom = kind == "custom_tool_call"
        given = {CUSTOM_INPUT: as_text(item.get("input", ""), f"{where}.input")} if is_custom else item.get("arguments")
        turns.call(call_id, name, given if given is not None else "")
    elif kind in ("function_call_output", "custom_tool_call_output"):
        call_id = as_name(item.get("call_id"), f"{where}.call_id")
        turns.add({"role": "tool", "tool_call_id": call_id, "content": _output_text(item.get("output"), f"{where}.output")})
    elif kind == "item_reference":
        refuse(f"{where}.type", "items are not kept by id: send the item itself, or use previous_response_id")
    else:
        refuse(f"{where}.type", f"unknown type of item: {spell_value(kind)}")


def _add_message(turns: Turns, item: Mapping[str, Any], where: str) -> None:
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        refuse(f"{where}.role", f"expected one of {', '.join(ROLES)}, found {spell_value(role)}")
    parts = _parts(content, f"{where}.content")
    if role == "assistant":
        turns.say("".join(as_text(part.get("text"), f"{where}.content") for part in parts))
    else:
        turns.add({"role": role, "content": joined(parts, "\n")})


def _parts(content: object, where: str) -> list[dict[str, Any]]:
    """Return a message's content as parts in the chat API's layout."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content or ""}]
    return [_part(part, f"{where}[{index}]") for index, part in enumerate(as_list(content, where))]


def _part(given: object, where: str) -> dict[str, Any]:
    part = as_object(given, where)
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text", "reasoning_text", "summary_text"):
        return {"type": "text", "text": as_text(part.get("text"), f"{where}.text")}
    if kind == "refusal":
        return {"type": "text", "text": as_text(part.get("refusal"), f"{where}.refusal")}
    if isinstance(kind, str) and kind in SPELLINGS:
        return dict(read_part(part, where))
    raise FieldError(f"{where}.type", f"parts of type {spell_value(kind)} can't be read; send the text as input_text")


def _reasoning_of(item: Mapping[str, Any], where: str) -> str:
    """Return the text of a reasoning item: its content, or the copy that the client carried, or its summary."""
    text = "".join(part["text"] for part in _parts(item.get("content") or (), f"{where}.content"))
    text = text or unseal(item.get("encrypted_content"))
    return text or "\n".join(part["text"] for part in _parts(item.get("summary") or (), f"{where}.summary"))


def _output_text(output: object, where: str) -> str | list[Mapping[str, Any]]:
    """Return a tool's result; an object, which some clients send, as its JSON text."""
    if isinstance(output, Mapping):
        return json.dumps(output, ensure_ascii=False)
    return joined(_parts(output, where), "\n")


# ---- tools and formats ----


def _tools(given: Sequence[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return declarations, and warnings for built-in tools, which nobody runs here."""
    tools, warnings, names = list[dict[str, Any]](), list[str](), set[str]()
    for index, each in enumerate(given):
        where = f"tools[{index}]"
        tool = as_object(each, where)
        kind = as_name(tool.get("type"), f"{where}.type")
        if kind not in ("function", "custom"):
            warnings.append(f"{where}: tools of type {kind} are not run here and were left out")
            continue
        name = as_name(tool.get("name"), f"{where}.name")
        if name in names:
            refuse(f"{where}.name", f"{name!r} is declared twice")
        names.add(name)
        if kind == "function":
            tools.append(function(name, tool.get("description"), tool.get("parameters"), tool.get("strict"), where))
        else:
            tools.append(_custom(name, tool, where))
    return tools, warnings


def _custom(name: str, tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a custom tool as a function of one text; a grammar for it is told to the model, not enforced."""
    format = as_object(tool.get("format") or {}, f"{where}.format")
    says = "The text that the tool gets, as it is."
    if format.get("type") == "grammar":
        says += f" It must match this {format.get('syntax', 'lark')} grammar:\n{format.get('definition', '')}"
    schema = {"type": "object", "properties": {CUSTOM_INPUT: {"type": "string", "description": says}}, "required": [CUSTOM_INPUT]}
    return function(name, tool.get("description"), schema, None, where)


def _tool_choice(choice: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]) -> str | dict[str, Any]:
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        return choice_word(choice, tools)
    kind = choice.get("type")
    if kind in ("function", "custom"):
        named = choice.get("name") or as_object(choice.get("function") or {}, "tool_choice.function").get("name")
        return {"name": check_declared(as_name(named, "tool_choice.name"), tools, "tool_choice.name")}
    if kind == "allowed_tools":
        mode = choice.get("mode", "auto")
        if mode not in ("auto", "required"):
            refuse("tool_choice.mode", f"expected auto or required, found {spell_value(mode)}")
        return {"names": _allowed(choice, tools), "mode": mode}
    raise FieldError("tool_choice.type", f"expected function, custom or allowed_tools, found {spell_value(kind)}")


def _allowed(choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the functions that may be called; built-in tools among them are passed over."""
    found = list[str]()
    for index, each in enumerate(as_list(choice.get("tools"), "tool_choice.tools")):
        where = f"tool_choice.tools[{index}]"
        tool = as_object(each, where)
        if tool.get("type", "function") in ("function", "custom"):
            found.append(check_declared(as_name(tool.get("name"), f"{where}.name"), tools, f"{where}.name"))
    if not found:
        refuse("tool_choice.tools", "expected at least one function")
    return found


def _constraint(text: Mapping[str, Any]) -> Constraint | None:
    """Return what `text.format` asks of the answer, None for plain text. Raises FieldError."""
    format = as_object(text.get("format") or {"type": "text"}, "text.format")
    kind = format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json_object")
    if kind == "json_schema":
        return schema_constraint(format.get("schema"), "text.format.schema", strict=format.get("strict") is True)
    raise FieldError("text.format.type", f"expected text, json_object or json_schema, found {spell_value(kind)}")
