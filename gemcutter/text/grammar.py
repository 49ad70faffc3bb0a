"""What a reply is held to, as a grammar: JSON by schema, a regex, a choice, Lark, and tool calls by their declarations.

Owns `Constraint` and the Lark text that constraints, tools and the tool choice make together; markers are single special tokens
in it. Thoughts are no part of it. Refuses to know how a grammar is compiled and applied. Read `grammar_values.py` for the
arguments of calls, `grammar_compiler.py` for what comes next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemcutter.errors import RequestError, spell_value
from gemcutter.text.grammar_values import Rules, in_slashes, spell
from gemcutter.text.reply import CALL_CLOSE, CALL_OPEN

KINDS = ("json_schema", "json_object", "regex", "choice", "lark")
MOST_CHARACTERS = 1 << 19  # of a constraint's value, and of a grammar
WHITE_SPACE = "[ \\n]{1,8}"  # bounded, as models write white space without end; not forbidden, which makes them write worse


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer of a reply must be; thoughts before it stay free.

    `value` is a JSON text for "json_schema", a pattern for "regex", a tuple of texts for "choice", a grammar for "lark"; it is
    not read for "json_object". `strict` refuses schemas with keywords that can't be held to, which are else left out with a
    warning.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    value: str | tuple[str, ...] = ""
    strict: bool = True


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in Lark. With `is_triggered` it holds from the first tool call on, and leaves what comes before free.

    `name` says in errors what it was made of, `warnings` what of it can't be held to.
    """

    lark: str
    name: str
    is_triggered: bool = False
    warnings: tuple[str, ...] = ()


def build_grammar(
    constraint: Constraint | None, tools: Sequence[Mapping[str, Any]], choice: object = "auto", *, parallel: bool = True
) -> Grammar | None:
    """Return the grammar of a reply, None where it is free but for the calls that `may_call` rules out.

    `choice` is "auto", "none", "required", {"name": N} or {"names": [...], "mode": "auto" | "required"}. Where a call must come
    there is no answer for the constraint to hold. Raises RequestError for constraints and choices that can't be used.
    """
    names, must_call = read_choice(choice, tools)
    body = "" if constraint is None else _body(constraint)
    rules = Rules()
    is_single = isinstance(choice, Mapping) and "name" in choice
    calls = _calls(rules, [tool for tool in tools if function_of(tool)["name"] in names], parallel=parallel and not is_single)
    warnings = tuple(rules.warnings)
    if calls and (must_call or constraint is None):
        lark = "\n".join(["start: calls", *calls, *rules.lines])
        return _checked(Grammar(lark, "tools", is_triggered=not must_call, warnings=warnings))
    if constraint is None:
        return None
    name = f"constraint ({constraint.kind})"
    if calls:
        return _checked(
            Grammar("\n".join(["start: answer | calls", f"answer: {body}", *calls, *rules.lines]), name, False, warnings)
        )
    is_whole = constraint.kind == "lark" and isinstance(constraint.value, str)
    return _checked(Grammar(str(constraint.value) if is_whole else f"start: {body}", name))


def may_call(choice: object, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a reply may call a tool. Raises RequestError for choices that can't be used."""
    return bool(read_choice(choice, tools)[0])


def read_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> tuple[frozenset[str], bool]:
    """Return the names of the tools that may be called, and whether one must be. Raises RequestError for no tool choice."""
    declared = [str(function_of(tool)["name"]) for tool in tools]
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
        raise RequestError(f"tool_choice: {spell_value(unknown[0])} is not declared; tools are: {', '.join(declared) or 'none'}")
    if mode == "required" and not wanted:
        raise RequestError("tool_choice: a call is required, and there are no tools; declare one in `tools`")
    return frozenset(wanted if mode != "none" else ()), mode == "required"


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the function of a declaration in OpenAI's layout. Raises RequestError for other layouts."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError('tools: expected declarations {"type": "function", "function": {"name": ..., "parameters": ...}}')
    return function


def _calls(rules: Rules, tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> list[str]:
    """Return the rules of calls, none without tools; those of their arguments are added to `rules`."""
    calls = list[str]()
    for tool in tools:
        function = function_of(tool)
        name, schema = str(function["name"]), function.get("parameters")
        arguments = rules.arguments(schema, f"tools: {name}", is_strict=function.get("strict") is True)
        calls.append(f"{spell('call:' + name)} {arguments}")
    if not calls:
        return []
    return [f"call: {CALL_OPEN} ({' | '.join(calls)}) {CALL_CLOSE}", "calls: call+" if parallel else "calls: call"]


def _body(constraint: Constraint) -> str:
    """Return the right side of the rule of an answer. Raises RequestError for constraints that can't be read."""
    kind, value = constraint.kind, constraint.value
    if kind not in KINDS:
        raise RequestError(f"constraint: expected one of {', '.join(KINDS)}, found {spell_value(kind)}")
    if kind == "choice":
        if not isinstance(value, tuple) or not value or not all(isinstance(each, str) and each for each in value):
            raise RequestError(f"constraint: a choice is of a tuple of texts that are not empty, found {spell_value(value)}")
        return f"%lark {{\nstart: TEXT\nTEXT: {' | '.join(map(spell, value))}\n}}"  # one terminal: rules are limited to 2000
    if kind == "json_object":
        return _json({"type": "object"}, strict=True)
    if not isinstance(value, str) or not value:
        raise RequestError(f"constraint: expected the text of a {kind}, found {spell_value(value)}")
    if kind == "regex":
        return f"/{in_slashes(value)}/"
    if kind == "lark":
        return f"%lark {{\n{value}\n}}"
    return _json(_schema(value), strict=constraint.strict)


def _schema(text: str) -> dict[str, Any]:
    if len(text) > MOST_CHARACTERS:
        raise RequestError(f"constraint: a JSON schema of {len(text):,} characters, {MOST_CHARACTERS:,} are the most; shorten it")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"constraint: the JSON schema is not valid JSON ({error})") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise RequestError(f"constraint: a JSON schema is an object, found {spell_value(schema)}")
    return schema


def _json(schema: Mapping[str, Any], *, strict: bool) -> str:
    """Return the expression of JSON that a schema allows. Raises RequestError for one that is nested too deeply."""
    options = {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": True, "lenient": not strict}
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': options})}"
    except RecursionError:
        raise RequestError("constraint: the JSON schema is nested too deeply; flatten it, or use $ref") from None


def _checked(grammar: Grammar) -> Grammar:
    if len(grammar.lark) > MOST_CHARACTERS:
        much = f"{len(grammar.lark):,} characters of grammar, {MOST_CHARACTERS:,} are the most"
        raise RequestError(f"{grammar.name}: {much}; use a smaller schema or fewer tools")
    return grammar
