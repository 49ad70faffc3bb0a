"""The values in a tool call's arguments as rules of Lark, by their JSON schema.

Owns the layout of arguments, which is not JSON: keys without quotes in the order in which a declaration shows them, strings
between `<|"|>` without escapes. A property that a schema does not name is not written, though the schema may allow it. Refuses to
know calls and replies. Read `grammar.py` for who asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemcutter.errors import RequestError, spell_value
from gemcutter.text.reply import DELIMITER
from gemcutter.text.schema_reference import find_part

TEXT, ANYTHING = r"/(.|\n)+/", r"(.|\n)*"
MOST_LEVELS, MOST_PROPERTIES, LONGEST_BOUND = 32, 4000, 4096
INTEGER = "-?(0|[1-9][0-9]{0,18})"  # bounded, as are all numbers without a schema's own bounds: models write digits without end
LITERALS = {
    "integer": f"/{INTEGER}/",
    "number": f"/{INTEGER}(\\.[0-9]{{1,17}})?([eE][+-]?[0-9]{{1,2}})?/",
    "boolean": '("true" | "false")',
    "null": '"null"',
}
NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
SAYS_NOTHING = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$defs", "definitions", "$schema", "$id", "$comment", "nullable", "strict"),
}
READ: Mapping[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset(NUMERIC),
    "number": frozenset(NUMERIC),
}
DAY, CLOCK = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
ZONE = r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {
    "date": DAY,
    "time": CLOCK + ZONE,
    "date-time": f"{DAY}T{CLOCK}{ZONE}",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "email": r"[A-Za-z0-9_.+\-]{1,64}@[A-Za-z0-9\-]{1,63}(\.[A-Za-z0-9\-]{1,63}){1,4}",
}
# Patterns that mean the same to every engine of regular expressions: no look-around, no anchors but at the ends.
PLAIN_PATTERN = re.compile(r"\^?(?:[^\\^$(]|\\[dws.\-/+*?()\[\]{}|$^]|\((?!\?)|\(\?:|(?<=\[)\^)*\$?")
PLAIN_KEY = re.compile(r"[\w.\-]+")


def spell(text: str) -> str:
    """Return a text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def in_slashes(pattern: str) -> str:
    """Return a pattern as it is written between slashes: they and line breaks are escaped."""
    escaped, after_backslash = list[str](), False
    for character in pattern:
        if character == "/" and not after_backslash:
            escaped.append("\\/")
        else:
            escaped.append("\\n" if character == "\n" else character)
        after_backslash = character == "\\" and not after_backslash
    return "".join(escaped)


class Rules:
    """Collects the rules of values. `warnings` say which keywords of schemas are not held to."""

    def __init__(self) -> None:
        self.lines = [
            f"TEXT: {TEXT}",
            f"string: {DELIMITER} TEXT? {DELIMITER}",
            r"KEY: /[\p{L}_][\p{L}\p{N}_.\-]{0,63}/",
            f"any: string | {' | '.join(LITERALS[kind] for kind in ('number', 'boolean', 'null'))} | any_list | any_object",
            'any_list: "[" (any ("," any)*)? "]"',
            'any_object: "{" (KEY ":" any ("," KEY ":" any)*)? "}"',
        ]
        self.warnings: list[str] = []
        self._num_rules = self._num_properties = 0

    def arguments(self, schema: object, place: str, *, is_strict: bool) -> str:
        """Return the rule of a call's arguments. Raises RequestError for schemas beyond the limits or, if strict, the grammar."""
        return _Reader(self, schema if isinstance(schema, Mapping) else {}, place, is_strict).arguments()

    def add(self, body: str, name: str = "") -> str:
        """Add a rule and return its name."""
        name = name or self.reserve()
        self.lines.append(f"{name}: {body}")
        return name

    def reserve(self) -> str:
        """Return the name of a rule that is still to be added."""
        self._num_rules += 1
        return f"v{self._num_rules}"

    def count(self, properties: int, place: str) -> None:
        """Count properties. Raises RequestError beyond the limit."""
        self._num_properties += properties
        if self._num_properties > MOST_PROPERTIES:
            raise RequestError(f"{place}: more than {MOST_PROPERTIES} properties in all tools; declare fewer or smaller ones")


class _Reader:
    """Reads the schema of one tool; its local references are resolved in `root`, and are rules of their own."""

    def __init__(self, rules: Rules, root: Mapping[str, Any], place: str, is_strict: bool) -> None:
        self._rules, self._root, self._place, self._is_strict = rules, root, place, is_strict
        self._of_reference: dict[str, str] = {}

    def arguments(self) -> str:
        """Return an expression for the whole, which is an object whatever the schema says."""
        schema, kinds = self._root, _kinds(self._root)
        if "$ref" in schema or "anyOf" in schema or "oneOf" in schema or "allOf" in schema:
            return self._value(schema, 0)
        if kinds and "object" not in kinds:
            return self._unread(f"type {kinds[0]!r} of all arguments", "any_object")
        self._check_keywords(schema, ["object"])
        if not schema.get("properties") and not schema.get("required") and not schema.get("additionalProperties"):
            return '"{" "}"'
        return self._object(schema, 0)

    def _value(self, schema: object, level: int) -> str:
        if level > MOST_LEVELS:
            raise RequestError(f"{self._place}: a schema nested more than {MOST_LEVELS} deep; flatten it")
        if not isinstance(schema, Mapping):
            return self._unread("a schema that is false") if schema is False else "any"
        if "$ref" in schema:
            return self._reference(schema["$ref"], level)
        nulls = [LITERALS["null"]] if schema.get("nullable") is True else []
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                return self._unread("an enum without values")
            return _alternatives([*(self._literal(each) for each in values), *nulls])
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in schema:
                return self._combined(keyword, schema, level, nulls)
        kinds = _kinds(schema)
        self._check_keywords(schema, kinds)
        return _alternatives([*(self._of_kind(kind, schema, level) for kind in kinds), *nulls]) if kinds else "any"

    def _combined(self, keyword: str, schema: Mapping[str, Any], level: int, nulls: Sequence[str]) -> str:
        parts = schema[keyword]
        others = set(map(str, schema)) - SAYS_NOTHING - {keyword, "type"}
        if not isinstance(parts, list | tuple) or not parts or (keyword == "allOf" and (len(parts) > 1 or others)):
            return self._unread(keyword)
        for other in sorted(others):
            self._unread(f"{other} beside {keyword}")
        return _alternatives([*(self._value(each, level + 1) for each in parts), *nulls])

    def _of_kind(self, kind: str, schema: Mapping[str, Any], level: int) -> str:
        if kind in ("integer", "number"):
            bounds = {name: schema[name] for name in NUMERIC if _is_number(schema.get(name))}
            self._check_order(schema, "minimum", "maximum")
            return self._rules.add(f"%json {json.dumps({'type': kind, **bounds})}") if bounds else LITERALS[kind]
        if kind in LITERALS:
            return LITERALS[kind]
        if kind == "string":
            return self._string(schema)
        if kind == "array":
            return self._array(schema, level)
        return self._object(schema, level) if kind == "object" else self._unread(f"type {kind!r}")

    def _string(self, schema: Mapping[str, Any]) -> str:
        low, high = self._bounds(schema, "minLength", "maxLength")
        if pattern := self._pattern(schema):
            if low or high is not None:
                self._unread("a length beside a pattern or format")
            return self._rules.add(f"{DELIMITER} /{pattern}/ {DELIMITER}")
        if high is not None and high > LONGEST_BOUND:
            self._unread(f"maxLength {high} (beyond {LONGEST_BOUND})")
            high = None
        if low > LONGEST_BOUND:
            self._unread(f"minLength {low} (beyond {LONGEST_BOUND})")
            low = 0
        if high == 0:
            return f"({DELIMITER} {DELIMITER})"
        if not low and high is None:
            return "string"
        bounded = f"/(.|\\n){{{low or 1},{'' if high is None else high}}}/"
        return self._rules.add(f"{DELIMITER} {bounded if low else f'({bounded})?'} {DELIMITER}")

    def _pattern(self, schema: Mapping[str, Any]) -> str:
        """Return the regular expression of a string's pattern or format as it is written between slashes, "" without one."""
        pattern, name = schema.get("pattern"), schema.get("format")
        if isinstance(pattern, str) and pattern:
            if name is not None:
                self._unread("format beside pattern")
            if not PLAIN_PATTERN.fullmatch(pattern) or not _compiles(pattern):
                self._unread(f"pattern {pattern!r}")
                return ""
            is_closed = pattern.endswith("$") and not pattern.endswith("\\$")
            before, after = "" if pattern.startswith("^") else ANYTHING, "" if is_closed else ANYTHING
            body = pattern.removeprefix("^").removesuffix("$") if is_closed else pattern.removeprefix("^")
            return f"{before}({in_slashes(body)}){after}"
        if name is not None and name not in FORMATS:
            self._unread(f"format {name!r}")
        return FORMATS.get(str(name), "")

    def _array(self, schema: Mapping[str, Any], level: int) -> str:
        low, high = self._bounds(schema, "minItems", "maxItems")
        if high == 0:
            return '("[" "]")'
        item = self._value(schema.get("items"), level + 1)
        most = "" if high is None else high - 1
        more = f' ("," {item}){{{max(low - 1, 0)},{most}}}' if most != 0 else ""
        return self._rules.add(f'"[" {item}{more} "]"' if low else f'"[" ({item}{more})? "]"')

    def _object(self, schema: Mapping[str, Any], level: int) -> str:
        """Return an expression for an object: its properties in the order of their names, each once."""
        given, required = schema.get("properties"), schema.get("required")
        needed = [each for each in required if isinstance(each, str)] if isinstance(required, list | tuple) else []
        properties = {name: {} for name in needed} | (dict(given) if isinstance(given, Mapping) else {})
        if not properties:
            extra = schema.get("additionalProperties")
            value = self._value(extra, level + 1) if extra is not False else ""
            return f'("{{" (KEY ":" {value} ("," KEY ":" {value})*)? "}}")' if value else '("{" "}")'
        self._rules.count(len(properties), self._place)
        first = following = self._rules.add('""')  # what may stand from here on where nothing came before, and after something
        names = sorted(properties, key=lambda each: str(each).lower())
        for name in names[::-1]:
            pair = f"{_key(str(name))} {self._value(properties[name], level + 1)}"
            before, after = ("", "") if name in needed else (f" | {first}", f" | {following}")
            first, following = (
                self._rules.add(f"{pair} {following}{before}"),
                self._rules.add(f'"," {pair} {following}{after}'),
            )
        return f'("{{" {first} "}}")'

    def _literal(self, value: object) -> str:
        if isinstance(value, str):
            return f"({DELIMITER} {spell(value)} {DELIMITER})" if value else f"({DELIMITER} {DELIMITER})"
        return spell(json.dumps(value)) if not isinstance(value, dict | list) else self._unread("enum of objects or lists")

    def _reference(self, pointer: object, level: int) -> str:
        """Return the rule of what a reference names, which may hold itself."""
        pointer = str(pointer)
        if pointer not in self._of_reference:
            target = self._resolve(pointer)
            self._of_reference[pointer] = name = self._rules.reserve()
            if isinstance(target, Mapping) and "$ref" in target and str(target["$ref"]) in self._of_reference:
                raise RequestError(f"{self._place}: $ref {pointer!r} leads back to itself; let it name a schema")
            self._rules.add(self._value(target, level + 1), name)
        return self._of_reference[pointer]

    def _resolve(self, pointer: str) -> object:
        found: object = find_part(self._root, pointer)
        if pointer.partition("/")[0] != "#" or not isinstance(found, Mapping | bool):
            raise RequestError(f"{self._place}: $ref {pointer!r} names nothing in the schema; only its own parts can be named")
        return found

    def _bounds(self, schema: Mapping[str, Any], low_name: str, high_name: str) -> tuple[int, int | None]:
        """Return the least and the most of a count. Raises RequestError for what are no counts, or in the wrong order."""
        self._check_order(schema, low_name, high_name)
        found = list[int | None]()
        for name in (low_name, high_name):
            value = schema.get(name)
            if value is not None and not (_is_number(value) and value == int(value) >= 0):
                raise RequestError(f"{self._place}: {name}: expected a count, found {spell_value(value)}")
            found.append(None if value is None else int(value))
        return found[0] or 0, found[1]

    def _check_order(self, schema: Mapping[str, Any], low_name: str, high_name: str) -> None:
        low, high = schema.get(low_name), schema.get(high_name)
        if low is not None and high is not None and _is_number(low) and _is_number(high) and low > high:
            raise RequestError(f"{self._place}: {low_name} {low} is greater than {high_name} {high}")

    def _check_keywords(self, schema: Mapping[str, Any], kinds: Sequence[str]) -> None:
        read = SAYS_NOTHING.union({"type"}, *(READ.get(kind, frozenset()) for kind in kinds))
        for keyword in sorted(set(map(str, schema)) - read):
            self._unread(keyword)

    def _unread(self, keyword: str, instead: str = "any") -> str:
        """Return the rule in place of what a keyword asks. Raises RequestError if the tool is strict."""
        if self._is_strict:
            raise RequestError(f"{self._place}: {keyword} can't be held to by a grammar; leave it out, or strict")
        self._rules.warnings.append(f"{self._place}: {keyword} is not held to")
        return instead


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """Return the types that a schema names, or that its keywords imply."""
    named = schema.get("type")
    kinds = [named] if isinstance(named, str) else list(named) if isinstance(named, list | tuple) else []
    found = list(dict.fromkeys(str(kind).lower() for kind in kinds))
    return found or (["object"] if "properties" in schema else ["array"] if "items" in schema else [])


def _key(name: str) -> str:
    """Return a key and its colon: as it is, or as a string where it could be taken for something else."""
    return spell(f"{name}:") if PLAIN_KEY.fullmatch(name) else f'{DELIMITER} {spell(name)} {DELIMITER} ":"'


def _alternatives(options: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(options))
    return distinct[0] if len(distinct) == 1 else f"({' | '.join(distinct)})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
