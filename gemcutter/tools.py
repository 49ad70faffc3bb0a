"""Functions as tools: what a model is told about them, and the loop in which it calls them.

Owns declarations (from a Python function's signature and docstring, or from JSON of other layouts) and the running of calls.
Refuses to know how calls are spelled and parsed: completions bring them. Read `text/tool_calls.py` for a call, `api.py` for
models.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, cast

from gemcutter.errors import RequestError, spell_value
from gemcutter.text.tool_calls import ToolCall

if TYPE_CHECKING:
    from gemcutter.completion import Completion

Function = Callable[..., object]
Tool = Mapping[str, object] | Function
SCALARS: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
LISTS, OBJECTS = (list, tuple, set, frozenset, Sequence, Iterable), (dict, Mapping)
SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$", re.MULTILINE)
ENTRY = re.compile(r"^\s*(?::param\s+)?\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s+(.*)$")
SCHEMA_NAMES = ("parameters", "inputSchema", "input_schema")  # OpenAI's, MCP's and Anthropic's


class Answers(Protocol):
    """What `run_tools` needs of a model."""

    def chat(self, messages: Sequence[Mapping[str, object]], **options: Any) -> Completion:
        """Answer a conversation."""


def run_tools(
    model: Answers,
    messages: str | Sequence[Mapping[str, object]],
    tools: Sequence[Function],
    max_rounds: int = 8,
    **options: Any,
) -> Completion:
    """Answer a conversation, run the functions that the model calls, and go on with their results until it calls none.

    `options` are those of a request. After `max_rounds` rounds of calls the last reply is returned with its calls, which were not
    run. What a function raises becomes its result, for the model to read. Raises RequestError for what can't be declared.
    """
    declared, functions = declarations(tools), {each.__name__: each for each in tools}
    history: list[Mapping[str, object]] = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
    for _ in range(max_rounds):
        reply = model.chat(history, tools=declared, **options)
        if not reply.tool_calls:
            return reply
        history += turn_of(reply, [run_call(call, functions) for call in reply.tool_calls])
    return model.chat(history, tools=declared, **options)


def turn_of(reply: Completion, results: Sequence[str]) -> list[dict[str, object]]:
    """Return a reply with calls, and the calls' results, as messages in OpenAI's layout."""
    numbers = [f"call_{len(reply.prompt_tokens)}_{place}" for place in range(len(reply.tool_calls))]  # alike in no two turns
    calls = [
        {"id": number, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for number, call in zip(numbers, reply.tool_calls, strict=True)
    ]
    message: dict[str, object] = {"role": "assistant", "content": reply.text, "tool_calls": calls}
    if reply.reasoning:
        message["reasoning"] = reply.reasoning
    answers: list[dict[str, object]] = [
        {"role": "tool", "tool_call_id": number, "name": call.name, "content": result}
        for number, call, result in zip(numbers, reply.tool_calls, results, strict=True)
    ]
    return [message, *answers]


def run_call(call: ToolCall, functions: Mapping[str, Function]) -> str:
    """Return what a function gives for a call: a text as it is, all else as JSON; an error as JSON, too."""
    function = functions.get(call.name)
    if function is None:
        return json.dumps({"error": f"there is no tool {call.name}; tools are: {', '.join(functions) or 'none'}"})
    try:
        found = function(**call.parsed)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
    except Exception as error:  # whatever goes wrong is for the model to read
        return json.dumps({"error": f"{type(error).__name__}: {error}"}, ensure_ascii=False)


def declarations(tools: Iterable[Tool]) -> list[dict[str, object]]:
    """Return tools in OpenAI's layout: functions are declared, and declarations as MCP and Anthropic write them are rewritten.

    What is neither is passed on, for the check of the conversation to name. Raises RequestError for a function that can't be
    declared.
    """
    return [declare(tool) if callable(tool) else _in_openai_layout(tool) for tool in tools]


def check_tools(tools: object) -> list[dict[str, object]] | None:
    """Return the tools of a request as declarations, None without any. Raises RequestError for what is no list of tools."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise RequestError(f"tools: expected a list of declarations or functions, found {spell_value(tools)}")
    return declarations(tools)


def _in_openai_layout(tool: Mapping[str, object]) -> dict[str, object]:
    if not isinstance(tool, Mapping) or "function" in tool or not isinstance(tool.get("name"), str):
        return cast("dict[str, object]", tool)
    schema = next((tool[name] for name in SCHEMA_NAMES if tool.get(name) is not None), {"type": "object", "properties": {}})
    function = {"name": tool["name"], "description": tool.get("description") or "", "parameters": schema}
    return {"type": "function", "function": function}


def declare(function: Function) -> dict[str, object]:
    """Return the declaration of a function in OpenAI's layout, from its signature and docstring.

    Types may be str, int, float, bool, None, lists, dicts, Literal and unions of them. The docstring's text describes the
    function, lines such as `name: text` under `Args:` and `:param name: text` its parameters. Raises RequestError, naming the
    parameters that can't be declared.
    """
    name = getattr(function, "__name__", "")
    if not inspect.isroutine(function) or not name.isidentifier():
        raise RequestError(f"tool {spell_value(function)}: expected a function that has a name, or a declaration in JSON")
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # a name that can't be resolved, or what a foreign annotation raises
        raise RequestError(f"tool {name}: its annotations can't be read: {error}") from error
    text, described = _read_docstring(inspect.getdoc(function) or "")
    properties, required, problems = dict[str, object](), list[str](), list[str]()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            problems.append(f"{name}({parameter.name}): expected a parameter that is passed by name")
            continue
        schema = _schema_of(hints.get(parameter.name, Any))
        if schema is None:
            problems.append(
                f"{name}({parameter.name}): no JSON schema for {spell_value(hints[parameter.name])}; declare it in JSON"
            )
            continue
        properties[parameter.name] = schema | ({"description": about} if (about := described.get(parameter.name)) else {})
        required += [parameter.name] if parameter.default is parameter.empty else []
    if problems:
        raise RequestError(f"tool {name} can't be declared", problems)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return a docstring's text before its sections, and what it says about single parameters."""
    described, name = dict[str, str](), ""
    for line in text.splitlines():
        found = ENTRY.match(line)
        if found and (line.startswith((" ", "\t")) or ":param" in line):
            name = found[1]
            described[name] = found[2].strip()
        elif name and line.startswith((" ", "\t")) and line.strip():
            described[name] += f" {line.strip()}"
        else:
            name = ""
    section = SECTION.search(text)
    body = text[: section.start()] if section else text
    return body.partition(":param ")[0].strip(), described


def _schema_of(kind: Any) -> dict[str, object] | None:
    """Return the JSON schema of an annotation, None where there is none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, inspect.Parameter.empty):
        return {}
    if kind in SCALARS:
        return {"type": SCALARS[kind]}
    if origin is typing.Annotated:
        return _schema_of(inner[0])
    if origin is Literal:
        kinds = {SCALARS.get(type(value)) for value in inner}
        named = kinds.pop() if len(kinds) == 1 else None
        return ({"type": named} if named else {}) | {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return _schema_of_union(inner)
    if kind in LISTS or origin in LISTS:
        items = _schema_of(inner[0]) if inner else {}
        return None if items is None else {"type": "array", "items": items}
    if kind in OBJECTS or origin in OBJECTS:
        values = _schema_of(inner[1]) if len(inner) == 2 else {}
        return None if values is None else {"type": "object"} | ({"additionalProperties": values} if values else {})
    return None


def _schema_of_union(kinds: Sequence[Any]) -> dict[str, object] | None:
    schemas = [_schema_of(kind) for kind in kinds if kind is not type(None)]
    known = [schema for schema in schemas if schema is not None]
    if len(known) < len(schemas):
        return None
    found: dict[str, object] = known[0] if len(known) == 1 else {"anyOf": known}
    return found | ({"nullable": True} if type(None) in kinds else {})
