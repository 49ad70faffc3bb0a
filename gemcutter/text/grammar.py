"""What a reply is held to, as a grammar: JSON by schema, a regex, a choice, Lark, and tool calls by their declarations.

Owns `Constraint` and the Lark text that constraints, tools and the tool choice make together; markers are single special tokens in
it. Refuses to know how a grammar is compiled and applied. Read `grammar_compiler.py` next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemcutter.errors import RequestError, spell_value
from gemcutter.text.grammar_values import TEXT, Rules, spell

CALL, CALL_END = "<|tool_call>", "<tool_call|>"
CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
KINDS = ("json_schema", "json_object", "regex", "choice", "lark")
MOST_CHARACTERS = 1 << 18  # of a constraint's value, and of a grammar
WHITE_SPACE = "[ \\n]{1,8}"  # bounded, as models write white space without end; not forbidden, which makes them write worse


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer of a reply must be; thoughts before it stay free.

    `value` is a JSON text for "json_schema", a pattern for "regex", a tuple of texts for "choice", a grammar for "lark"; it is not
    read for "json_object". `strict` refuses schemas with keywords that can't be held to, which are else left out with a warning.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    value: str | tuple[str, ...] = ""
    strict: bool = True


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in Lark. With `is_triggered` it holds from the first tool call on, and leaves what comes before free.

    `name` says in errors what it was made of.
    """

    lark: str
    name: str
    is_triggered: bool = False
    warnings: tuple[str, ...] = ()


def build_grammar(
    constraint: Constraint | None,
    tools: Sequence[Mapping[str, Any]],
    choice: object,
    *,
    parallel: bool,
    thought: Literal["none", "free", "open"],
) -> Grammar | None:
    """Return the grammar of a reply, None where it is free; `thought` says whether one may come first, or the prompt has
    opened it.

    `choice` is "auto", "none", "required", {"name": N} or {"names": [...], "mode": "auto" | "required"}. Raises RequestError for
    constraints and choices that can't be used.
    """
    names, must_call = read_choice(choice, tools)
    if must_call and constraint is not None:
        raise RequestError("constraint: a reply that must be a tool call can't be held to it; leave one of the two out")
    rules, body = Rules(), ""
    calls = _calls(
        rules, [tool for tool in tools if _function(tool)["name"] in names], parallel=parallel and not is_named(choice)
    )
    if constraint is not None:
        body = _body(constraint)
    elif not calls:
        return None
    lines = [*rules.lines, f"TEXT: {TEXT}"]
    if calls and not must_call and not body:
        return _checked(Grammar("\n".join(["start: calls", "think: <|channel> TEXT? <channel|>", *lines]), "tools", True))
    alternatives = " | ".join([*(["answer"] if body else []), *(["calls"] if calls else [])])
    opening = {"none": "", "free": "think?", "open": "TEXT? <channel|>"}[thought]
    head = [f"start: {opening} ({alternatives})", "think: <|channel> TEXT? <channel|>"]
    found = Grammar("\n".join([*head, *([f"answer: {body}"] if body else []), *lines]), _name(constraint), False, ())
    return _checked(Grammar(found.lark, found.name, False, tuple(rules.warnings)))


def is_named(choice: object) -> bool:
    """Return whether a choice names the one function to call."""
    return isinstance(choice, Mapping) and "name" in choice


def read_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> tuple[frozenset[str], bool]:
    """Return the names of the tools that may be called, and whether one must be. Raises RequestError for no tool choice."""
    declared = [str(_function(tool)["name"]) for tool in tools]
    mode: object = choice
    wanted: object = declared
    if isinstance(choice, Mapping) and set(choice) == {"name"}:
        mode, wanted = "required", [choice["name"]]
    elif isinstance(choice, Mapping) and set(choice) <= {"names", "mode"} and "names" in choice:
        mode, wanted = choice.get("mode", "auto"), choice["names"]
    if mode not in ("auto", "none", "required") or not isinstance(wanted, list | tuple):
        layouts = '"auto", "none", "required", {"name": N} or {"names": [...], "mode": "auto" or "required"}'
        raise RequestError(f"tool_choice: expected {layouts}, found {spell_value(choice)}")
    if unknown := [name for name in wanted if name not in declared]:
        raise RequestError(f"tool_choice: {unknown[0]!r} is not declared; tools are: {', '.join(declared) or 'none'}")
    if mode == "required" and not wanted:
        raise RequestError("tool_choice: a call is required, and there are no tools; declare one in `tools`")
    return frozenset(wanted if mode != "none" else ()), mode == "required"


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError('tools: expected declarations {"type": "function", "function": {"name": ..., "parameters": ...}}')
    return function


def _calls(rules: Rules, tools: Iterable[Mapping[str, Any]], *, parallel: bool) -> bool:
    """Add the rules of calls; return whether there are any."""
    calls = list[str]()
    for tool in tools:
        function = _function(tool)
        name, schema = str(function["name"]), function.get("parameters") or {}
        arguments = rules.arguments(schema, f"tools: {name}", is_strict=function.get("strict") is True)
        calls.append(f"{spell('call:' + name)} {arguments}")
    if calls:
        rules.lines.append(f"call: <|tool_call> ({' | '.join(calls)}) <tool_call|>")
        rules.lines.append("calls: call (think? call)*" if parallel else "calls: call")
    return bool(calls)


def _body(constraint: Constraint) -> str:
    """Return the right side of the rule of an answer. Raises RequestError for constraints that can't be read."""
    kind, value = constraint.kind, constraint.value
    if kind not in KINDS:
        raise RequestError(f"constraint: expected one of {', '.join(KINDS)}, found {spell_value(kind)}")
    if kind == "choice":
        if not isinstance(value, tuple) or not value or not all(isinstance(each, str) and each for each in value):
            raise RequestError(f"constraint: a choice is of a tuple of texts that are not empty, found {spell_value(value)}")
        return " | ".join(spell(each) for each in value)
    if kind == "json_object":
        return f"%json {json.dumps({'type': 'object', 'x-guidance': {'whitespace_pattern': WHITE_SPACE}})}"
    if not isinstance(value, str) or not value:
        raise RequestError(f"constraint: expected the text of a {kind}, found {spell_value(value)}")
    if kind == "regex":
        return f"%lark {{\nstart: /{_in_slashes(value)}/\n}}"
    if kind == "lark":
        return f"%lark {{\n{value}\n}}"
    return f"%json {json.dumps(_schema(value) | {'x-guidance': _json_options(constraint)})}"


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"constraint: the JSON schema is not valid JSON ({error})") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise RequestError(f"constraint: a JSON schema is an object, found {spell_value(schema)}")
    return schema


def _json_options(constraint: Constraint) -> dict[str, object]:
    return {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": True, "lenient": not constraint.strict}


def _in_slashes(pattern: str) -> str:
    """Return a pattern as it is written between slashes: they and line breaks are escaped."""
    escaped, after_backslash = list[str](), False
    for character in pattern:
        if character == "/" and not after_backslash:
            escaped.append("\\/")
        else:
            escaped.append("\\n" if character == "\n" else character)
        after_backslash = character == "\\" and not after_backslash
    return "".join(escaped)


def _name(constraint: Constraint | None) -> str:
    return "tools" if constraint is None else f"constraint ({constraint.kind})"


def _checked(grammar: Grammar) -> Grammar:
    if len(grammar.lark) > MOST_CHARACTERS:
        much = f"{len(grammar.lark):,} characters of grammar, {MOST_CHARACTERS:,} are the most"
        raise RequestError(f"{grammar.name}: {much}; use a smaller schema or fewer tools")
    return grammar
