"""POST /v1/messages and /v1/messages/count_tokens: what a body may hold, and how its blocks become a conversation.

Owns the fields of the requests with what becomes of each (honoured, ignored or refused by name), and `to_chat`, the conversion to
the layout of chat completions. Refuses to know HTTP and events. Read `fields.py` for the helpers, `server/messages_events.py` for
the way back.
"""

from __future__ import annotations

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
    function,
    joined,
    refuse,
    schema_constraint,
    unseal,
)
from gemcutter.server.wire.media import SOFT_TOKENS, image_part, of_request
from gemcutter.text.grammar import Constraint

# Fields that would change what a client gets: refused by name where they ask for something.
REFUSED = {
    "container": "nothing is run here; leave it out",
    "mcp_servers": "the server calls no other servers; connect them in the client and declare their tools",
}
SAMPLING = ("temperature", "top_p", "top_k")
BILLING_HEADER = "x-anthropic-billing-header:"  # a line with a hash that differs in each request: no prefix would ever be reused


class MessagesRequest(BaseModel):
    """The body of POST /v1/messages, and of count_tokens, which needs no `max_tokens`.

    Ignored: metadata, service_tier, speed, inference_geo, cache_control, context_management, diagnostics, output_config.effort,
    and names that are not known.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Any] = Field(description="messages of the roles user, assistant and system")
    max_tokens: int | None = Field(default=None, ge=1)
    system: str | list[Any] | None = None
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    max_soft_tokens: int | None = Field(default=None, description="what an image may become: 70, 140, 280, 560 or 1120")
    mm_processor_kwargs: dict[str, Any] | None = Field(default=None, description="the same, as vLLM has it")

    @property
    def shows_thinking(self) -> bool:
        """Return whether the client wants to see thoughts, not just to carry them."""
        return (self.thinking or {}).get("display") != "omitted"


def to_chat(request: MessagesRequest) -> ChatInput:
    """Return a request as a conversation. Raises FieldError, naming the field, for what can't be served."""
    for name, remedy in REFUSED.items():
        if (request.model_extra or {}).get(name):
            refuse(name, f"not supported: {remedy}")
    if not request.messages:
        refuse("messages", "expected at least one message, found none")
    tools, warnings = _tools(request.tools or ())
    choice, is_parallel = _tool_choice(request.tool_choice, tools)
    messages = _messages(request)
    return ChatInput(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=is_parallel,
        max_tokens=request.max_tokens,
        stop=tuple(request.stop_sequences or ()),
        sampling={name: value for name in SAMPLING if (value := getattr(request, name)) is not None},
        thinking=_thinking(request.thinking),
        constraint=_constraint(request),
        format_field="output_config.format",
        stop_field="stop_sequences",
        continues=messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1],
        thinking_budget=_budget(request.thinking),
        max_soft_tokens=of_request(request.max_soft_tokens, request.mm_processor_kwargs),
        warnings=tuple(warnings),
    )


# ---- messages ----


def _messages(request: MessagesRequest) -> list[dict[str, Any]]:
    turns = Turns()
    system = _system_text(request.system, "system")
    if system:
        turns.add({"role": "system", "content": system})
    for index, each in enumerate(request.messages):
        where = f"messages[{index}]"
        message = as_object(each, where)
        role = message.get("role")
        if role == "user":
            _add_user(turns, message.get("content"), f"{where}.content")
        elif role == "assistant":
            turns.end()
            _add_assistant(turns, message.get("content"), f"{where}.content")
        elif role == "system":  # where it stands: moved to the front, it would change the prefix in every turn
            if text := _system_text(message.get("content"), f"{where}.content"):
                turns.add({"role": "system", "content": text})
        else:
            refuse(f"{where}.role", f"expected user, assistant or system, found {spell_value(role)}")
    messages = turns.finish()
    if all(message["role"] == "system" for message in messages):
        refuse("messages", "expected a message of the user or the assistant that is not empty")
    return messages


def _system_text(system: object, where: str) -> str:
    """Return a system prompt as one text, without the lines that clients add for their billing."""
    text = "\n".join(part["text"] for part in _texts(system, where))
    return "\n".join(line for line in text.split("\n") if not line.lower().startswith(BILLING_HEADER))


def _texts(content: object, where: str) -> list[dict[str, Any]]:
    """Return content that may only be text as parts."""
    blocks = _blocks(content, where)
    for index, block in enumerate(blocks):
        if block.get("type") != "text":
            refuse(f"{where}[{index}].type", f"expected text, found {spell_value(block.get('type'))}")
    return [{"type": "text", "text": as_text(block.get("text"), f"{where}[{i}].text")} for i, block in enumerate(blocks)]


def _blocks(content: object, where: str) -> list[Mapping[str, Any]]:
    """Return content as a list of blocks."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [as_object(block, f"{where}[{index}]") for index, block in enumerate(as_list(content, where))]


def _add_user(turns: Turns, content: object, where: str) -> None:
    """Add a user's message: first the results of tools, then what else it says, if anything."""
    rest = list[dict[str, Any]]()
    for index, block in enumerate(_blocks(content, where)):
        place = f"{where}[{index}]"
        if block.get("type") == "tool_result":
            id = as_name(block.get("tool_use_id"), f"{place}.tool_use_id")
            turns.add({"role": "tool", "tool_call_id": id, "content": _tool_result(block, place)})
        else:
            rest.append(_user_part(block, place))
    if rest:
        turns.add({"role": "user", "content": joined(rest, "\n")})


def _tool_result(block: Mapping[str, Any], where: str) -> str | list[dict[str, Any]]:
    """Return a result: its text, and its images, if any, after it, as templates print them."""
    found = _blocks(block.get("content"), f"{where}.content")
    parts = [_user_part(each, f"{where}.content[{index}]") for index, each in enumerate(found)]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    if block.get("is_error") and not text.lower().startswith("error"):
        text = f"Error: {text}" if text else "Error"
    images = [part for part in parts if part["type"] != "text"]
    return [*([{"type": "text", "text": text}] if text else []), *images] if images else text


def _user_part(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "text": as_text(block.get("text"), f"{where}.text")}
    if kind == "image":
        return _image(as_object(block.get("source"), f"{where}.source"), f"{where}.source", block.get(SOFT_TOKENS))
    if kind == "document":
        return {"type": "text", "text": _document(block, where)}
    if kind == "search_result":
        body = "\n".join(part["text"] for part in _texts(block.get("content"), f"{where}.content"))
        return {"type": "text", "text": f"{block.get('title', '')}\n{block.get('source', '')}\n{body}"}
    raise FieldError(f"{where}.type", f"blocks of type {spell_value(kind)} can't be read here; send text")


def _image(source: Mapping[str, Any], where: str, soft_tokens: object) -> dict[str, Any]:
    kind = source.get("type")
    if kind == "base64":  # whatever it says it is: the bytes tell
        data = as_text(source.get("data"), f"{where}.data")
        return image_part(f"data:;base64,{data}", f"{where}.data", None, soft_tokens)
    if kind == "url":
        return image_part(source.get("url"), f"{where}.url", None, soft_tokens)
    raise FieldError(f"{where}.type", f"expected base64 or url, found {spell_value(kind)}: files are not kept here")


def _document(block: Mapping[str, Any], where: str) -> str:
    """Return a document of plain text with its title."""
    source = as_object(block.get("source"), f"{where}.source")
    kind = source.get("type")
    if kind == "text":
        body = as_text(source.get("data"), f"{where}.source.data")
    elif kind == "content":
        body = "\n".join(part["text"] for part in _texts(source.get("content"), f"{where}.source.content"))
    else:
        refuse(f"{where}.source.type", f"documents of type {spell_value(kind)} can't be read here; send their text")
    above = [as_text(block[name], f"{where}.{name}") for name in ("title", "context") if block.get(name)]
    return "\n".join([*above, body])


def _add_assistant(turns: Turns, content: object, where: str) -> None:
    for index, block in enumerate(_blocks(content, where)):
        place, kind = f"{where}[{index}]", block.get("type")
        if kind == "text":
            turns.say(as_text(block.get("text"), f"{place}.text"))
        elif kind == "thinking":
            shown = as_text(block.get("thinking") or "", f"{place}.thinking")
            if thought := shown or unseal(block.get("signature")):
                turns.reason(thought)
        elif kind == "tool_use":
            id, name = as_name(block.get("id"), f"{place}.id"), as_name(block.get("name"), f"{place}.name")
            given = block.get("input")
            turns.call(id, name, given if isinstance(given, str) else dict(as_object(given or {}, f"{place}.input")))
        elif kind != "redacted_thinking":  # nobody but its writer can read it
            refuse(f"{place}.type", f"expected text, thinking or tool_use, found {spell_value(kind)}")


# ---- tools, thinking, formats ----


def _tools(given: Sequence[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return declarations, and warnings for tools that only Anthropic's servers run."""
    tools, warnings, names = list[dict[str, Any]](), list[str](), set[str]()
    for index, each in enumerate(given):
        where = f"tools[{index}]"
        tool = as_object(each, where)
        kind = tool.get("type")
        if kind not in (None, "custom"):
            warnings.append(f"{where}: tools of type {spell_value(kind)} are not run here and were left out")
            continue
        name = as_name(tool.get("name"), f"{where}.name")
        if name in names:
            refuse(f"{where}.name", f"{name!r} is declared twice")
        names.add(name)
        as_object(tool.get("input_schema"), f"{where}.input_schema")
        tools.append(function(name, tool.get("description"), tool["input_schema"], tool.get("strict"), where))
    return tools, warnings


def _tool_choice(choice: Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]) -> tuple[str | dict[str, Any], bool]:
    """Return the choice, and whether several calls may be made."""
    if choice is None:
        return "auto", True
    is_parallel, kind = choice.get("disable_parallel_tool_use") is not True, choice.get("type")
    if kind in ("auto", "none"):
        return kind, is_parallel
    if kind == "any":
        if not tools:
            refuse("tool_choice.type", "'any' without a tool in tools")
        return "required", is_parallel
    if kind == "tool":
        name = as_name(choice.get("name"), "tool_choice.name")
        return {"name": check_declared(name, tools, "tool_choice.name")}, is_parallel
    raise FieldError("tool_choice.type", f"expected auto, any, tool or none, found {spell_value(kind)}")


def _thinking(thinking: Mapping[str, Any] | None) -> bool | None:
    """Return whether to think: what is not `disabled` is on, adaptive and names still to come among them."""
    if thinking is None:
        return None
    return as_name(thinking.get("type"), "thinking.type") != "disabled"


def _budget(thinking: Mapping[str, Any] | None) -> int | None:
    budget = (thinking or {}).get("budget_tokens")
    if budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        refuse("thinking.budget_tokens", f"expected a number of tokens above 0, found {spell_value(budget)}")
    return budget


def _constraint(request: MessagesRequest) -> Constraint | None:
    """Return the schema that the answer must follow. Raises FieldError."""
    where, format = "output_config.format", (request.output_config or {}).get("format")
    if format is None:  # as it was called while it was in beta
        where, format = "output_format", (request.model_extra or {}).get("output_format")
    if format is None:
        return None
    kind = as_object(format, where).get("type")
    if kind != "json_schema":
        refuse(f"{where}.type", f"expected json_schema, found {spell_value(kind)}")
    return schema_constraint(format.get("schema"), f"{where}.schema", strict=True)
