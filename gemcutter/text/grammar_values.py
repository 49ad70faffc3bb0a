"""The values in a tool call's arguments as rules of Lark, by their JSON schema.

Owns the layout of arguments, which is not JSON: keys without quotes in the order in which a declaration shows them, strings
between `<|"|>` without escapes. Refuses to know calls and replies. Read `grammar.py` for who asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gemcutter.errors import RequestError

TEXT = r"/(.|\n)+/"
MOST_LEVELS, MOST_PROPERTIES, LONGEST_BOUND = 32, 1000, 4096
SCALARS = ("integer", "number", "boolean", "null")
NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
IGNORED = {
    "title",
    "description",
    "default",
    "examples",
    "$defs",
    "definitions",
    "nullable",
    "$schema",
    "$id",
    "$comment",
    "strict",
}
READ = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "integer": set(NUMERIC),
    "number": set(NUMERIC),
}
QUOTE = '<|"|>'


def spell(text: str) -> str:
    """Return a text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


class Rules:
    """Collects the rules of values. `warnings` say which keywords of schemas are not held to."""

    def __init__(self) -> None:
        self.lines = [
            'string: <|"|> TEXT? <|"|>',
            "KEY: /[A-Za-z_][A-Za-z0-9_.\\-]{0,63}/",
            "atom: %json " + json.dumps({"type": list(SCALARS)}),
            "any: string | atom | any_list | any_object",
            'any_list: "[" (any ("," any)*)? "]"',
            'any_object: "{" (KEY ":" any ("," KEY ":" any)*)? "}"',
        ]
        self.warnings: list[str] = []
        self._num_rules = self._num_properties = 0

    def arguments(self, schema: Mapping[str, Any], place: str, *, is_strict: bool) -> str:
        """Return the rule of a call's arguments. Raises RequestError for schemas beyond the limits or, if strict, the grammar."""
        return _Reader(self, schema, place, is_strict).object(schema, 0)

    def add(self, body: str) -> str:
        """Add a rule and return its name."""
        self._num_rules += 1
        self.lines.append(f"v{self._num_rules}: {body}")
        return f"v{self._num_rules}"

    def count(self, properties: int, place: str) -> None:
        """Count properties. Raises RequestError beyond the limit."""
        self._num_properties += properties
        if self._num_properties > MOST_PROPERTIES:
            raise RequestError(f"{place}: more than {MOST_PROPERTIES} properties in all tools; declare fewer or smaller ones")


class _Reader:
    """Reads one schema; its local references are resolved in `root`."""

    def __init__(self, rules: Rules, root: Mapping[str, Any], place: str, is_strict: bool) -> None:
        self._rules, self._root, self._place, self._is_strict = rules, root, place, is_strict

    def value(self, schema: object, level: int) -> str:
        """Return an expression for a value."""
        if level > MOST_LEVELS:
            raise RequestError(f"{self._place}: a schema nested more than {MOST_LEVELS} deep, or one that refers to itself")
        if not isinstance(schema, Mapping):
            return "any"
        if "$ref" in schema:
            return self.value(self._resolve(schema["$ref"]), level + 1)
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return "(" + " | ".join(self._literal(each) for each in values) + ")" if values else self._unread("enum")
        options = schema.get("anyOf") or schema.get("oneOf")
        if options:
            nulls = [spell("null")] if schema.get("nullable") is True else []
            return "(" + " | ".join([self.value(each, level + 1) for each in options] + nulls) + ")"
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else list(kinds or ())
        if schema.get("nullable") is True and kinds:
            kinds.append("null")
        if not kinds:
            kinds = ["object"] if "properties" in schema else ["array"] if "items" in schema else []
        self._check_keywords(schema, kinds)
        return "(" + " | ".join(self._of_kind(kind, schema, level) for kind in dict.fromkeys(kinds)) + ")" if kinds else "any"

    def _of_kind(self, kind: str, schema: Mapping[str, Any], level: int) -> str:
        if kind in SCALARS:
            bounds = {name: schema[name] for name in NUMERIC if name in schema and kind in ("integer", "number")}
            return self._rules.add(f"%json {json.dumps({'type': kind, **bounds})}")
        if kind == "string":
            return self._string(schema)
        if kind == "array":
            return self._array(schema, level)
        return self.object(schema, level) if kind == "object" else self._unread(f"type {kind!r}")

    def _string(self, schema: Mapping[str, Any]) -> str:
        low, high = schema.get("minLength") or 0, schema.get("maxLength")
        if not low and (high is None or high > LONGEST_BOUND):
            return "string"
        if high is not None and low > high:
            raise RequestError(f"{self._place}: minLength {low} is greater than maxLength {high}")
        low = min(low, LONGEST_BOUND)
        bound = f"{{{low},{'' if high is None or high > LONGEST_BOUND else high}}}"
        return f"{QUOTE} {QUOTE}" if high == 0 else self._rules.add(f"{QUOTE} /(.|\\n){bound}/ {QUOTE}")

    def _array(self, schema: Mapping[str, Any], level: int) -> str:
        low, high = schema.get("minItems") or 0, schema.get("maxItems")
        item = self.value(schema.get("items"), level + 1)
        if high == 0:
            return '"[" "]"'
        more = f"{{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
        items = f'{item} ("," {item}){more}'
        return self._rules.add(f'"[" {items} "]"' if low else f'"[" ({items})? "]"')

    def object(self, schema: Mapping[str, Any], level: int) -> str:
        """Return an expression for an object: its properties in the order of their names, each once."""
        schema = self._resolve(schema["$ref"]) if "$ref" in schema else schema
        properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
        if not properties and level:
            extra = schema.get("additionalProperties")
            value = self.value(extra, level + 1)
            return '"{" "}"' if extra is False else f'"{{" (KEY ":" {value} ("," KEY ":" {value})*)? "}}"'
        if unknown := required - set(properties):
            raise RequestError(f"{self._place}: {sorted(unknown)[0]!r} is required, and not among the properties")
        self._rules.count(len(properties), self._place)
        first = following = self._rules.add('""')
        for name in sorted(properties, key=str.lower, reverse=True):
            pair = f"{spell(name + ':')} {self.value(properties[name], level + 1)}"
            optional = name not in required
            before = f" | {first}" if optional else ""
            after = f" | {following}" if optional else ""
            first, following = (
                self._rules.add(f"{pair} {following}{before}"),
                self._rules.add(f'"," {pair} {following}{after}'),
            )
        return f'"{{" {first} "}}"'

    def _literal(self, value: object) -> str:
        if isinstance(value, str):
            return f"({QUOTE} {spell(value)} {QUOTE})" if value else f"({QUOTE} {QUOTE})"
        return spell(json.dumps(value)) if not isinstance(value, dict | list) else self._unread("enum of objects or lists")

    def _resolve(self, reference: object) -> Mapping[str, Any]:
        found: Any = self._root
        parts = str(reference).split("/")
        for part in parts[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        if parts[0] != "#" or not isinstance(found, Mapping):
            raise RequestError(f"{self._place}: $ref {reference!r} names nothing in the schema; only its own parts can be named")
        return found

    def _check_keywords(self, schema: Mapping[str, Any], kinds: list[str]) -> None:
        read = IGNORED.union({"type"}, *(READ.get(kind, set()) for kind in kinds))
        for keyword in sorted(set(map(str, schema)) - read):
            self._unread(keyword)

    def _unread(self, keyword: str) -> str:
        """Return the rule of any value in place of what a keyword asks. Raises RequestError if the tool is strict."""
        if self._is_strict:
            raise RequestError(f"{self._place}: {keyword} can't be held to by a grammar; leave it out, or strict")
        self._rules.warnings.append(f"{self._place}: {keyword} is not held to")
        return "any"
