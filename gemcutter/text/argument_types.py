"""What the schema of a tool's parameters says about a value: its kind, and how text without a clear kind is read.

Owns the types that a JSON schema allows (through `$ref`, `anyOf`, `oneOf`, `allOf`, `enum`, `const`) and the reading of scalars
by them. Refuses to validate: a value that does not fit is passed on as it was written, and a schema that makes no sense allows
everything. Read `call_reader.py` for who asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gemcutter.text.schema_reference import find_part

MOST_ALTERNATIVES = 32  # of a schema, counted through `anyOf` and references; more of them allow everything
MOST_REFERENCES = 8  # followed one after the other: a schema may refer to itself
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
LITERAL = re.compile(rf"true|false|null|{NUMBER}")
LOOSE_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?([eE][+-]?[0-9]+)?")
PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}
KINDS = {"t": "boolean", "f": "boolean", "n": "null"}  # of a literal, by its first letter


class ArgumentSchema:
    """The schema of one value, as its alternatives without references; none of them allows everything."""

    def __init__(self, schema: object, root: object = None) -> None:
        """Read a part of the schema `root`, by default all of it."""
        self._root = schema if root is None else root
        found = list[Mapping[str, Any]]()
        is_known = _add_alternatives(schema, self._root, found, MOST_REFERENCES)
        self._alternatives = found if is_known and len(found) <= MOST_ALTERNATIVES else []
        self.types = self._types()

    def of_key(self, key: str) -> ArgumentSchema:
        """Return the schema of an object's value under `key`."""
        return self._part([_of_property(each, key) for each in self._alternatives])

    def of_item(self) -> ArgumentSchema:
        """Return the schema of a list's items."""
        return self._part([each.get("items") for each in self._alternatives])

    @property
    def takes_strings(self) -> bool:
        """Return whether a string is allowed."""
        return self.types is None or "string" in self.types

    def literal(self, text: str) -> str:
        """Return the JSON text of a complete literal (`true`, `None`, `-1.5e3`): a string where only strings are allowed."""
        literal = PYTHON_LITERALS.get(text, text)
        only_strings = self.types is not None and "string" in self.types and self.types <= {"string", "null"}
        is_allowed_null = literal == "null" and self.types is not None and "null" in self.types
        return quote(text) if only_strings and not is_allowed_null else literal

    def string(self, text: str) -> str:
        """Return the JSON text of a string or an undelimited word: another kind only where strings are not allowed."""
        if self.types is None or "string" in self.types:
            return quote(text)
        found = _coerce(text.strip(), self.types)
        return quote(text) if found is None else found

    def absent(self) -> str:
        """Return the JSON text for a key without a value."""
        return '""' if self.types == frozenset({"string"}) else "null"

    def _part(self, schemas: list[object]) -> ArgumentSchema:
        known = [each for each in schemas if isinstance(each, Mapping)]
        if len(known) == 1:
            return ArgumentSchema(known[0], self._root)
        return ArgumentSchema({"anyOf": known} if known else None, self._root)

    def _types(self) -> frozenset[str] | None:
        types = [_types_of(each) for each in self._alternatives]
        known = [each for each in types if each is not None]
        return frozenset().union(*known) if known and len(known) == len(types) else None


def is_literal(text: str) -> bool:
    """Return whether a text is a complete literal of JSON or Python."""
    return text in PYTHON_LITERALS or LITERAL.fullmatch(text) is not None


def quote(text: str) -> str:
    """Return a text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _add_alternatives(schema: object, root: object, found: list[Mapping[str, Any]], depth: int) -> bool:
    """Collect the alternatives of a schema without references; return False where one of them can't be told."""
    if not isinstance(schema, Mapping) or not depth or len(found) > MOST_ALTERNATIVES:
        return False
    if isinstance(schema.get("$ref"), str):
        return _add_alternatives(find_part(root, schema["$ref"]), root, found, depth - 1)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            return all(_add_alternatives(each, root, found, depth - 1) for each in schema[name][: MOST_ALTERNATIVES + 1])
    if isinstance(schema.get("allOf"), list):
        parts = list[Mapping[str, Any]]()
        for each in schema["allOf"][:MOST_ALTERNATIVES]:
            _add_alternatives(each, root, parts, depth - 1)
        schema = _merged([schema, *parts])
    found.append(schema)
    return True


def _merged(schemas: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return schemas that hold together as one: the first one that says something of a kind is believed."""
    merged, properties = dict[str, Any](), dict[str, Any]()
    for each in schemas:
        own = each.get("properties")
        properties = {**(own if isinstance(own, Mapping) else {}), **properties}
        merged = {**{name: value for name, value in each.items() if name != "allOf"}, **merged}
    return merged | ({"properties": properties} if properties else {})


def _of_property(schema: Mapping[str, Any], key: str) -> object:
    properties = schema.get("properties")
    own = properties.get(key) if isinstance(properties, Mapping) else None
    return schema.get("additionalProperties") if own is None else own


def _types_of(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the types that a schema without alternatives allows; None where it does not say."""
    named = schema.get("type")
    found = {each.lower() for each in (named if isinstance(named, list) else [named]) if isinstance(each, str)}
    if not found:
        found = set(_types_of_values(schema))
    if not found:
        found = {kind for kind, keyword in (("object", "properties"), ("array", "items")) if keyword in schema}
    return frozenset(found | ({"null"} if schema.get("nullable") is True else set())) if found else None


def _types_of_values(schema: Mapping[str, Any]) -> Iterator[str]:
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array", dict: "object"}
    for value in values:
        yield names.get(type(value), "object")


def _coerce(text: str, types: frozenset[str]) -> str | None:
    """Return a text as JSON of one of `types`, none of which is a string; None where it is none of them."""
    literal = PYTHON_LITERALS.get(text, text.lower() if text.lower() in ("true", "false", "null") else text)
    if LITERAL.fullmatch(literal):
        kind = KINDS.get(literal[0])
        return literal if (kind in types if kind else types & {"number", "integer"}) else None
    if types & {"number", "integer"} and (match := LOOSE_NUMBER.fullmatch(text)) and (match[2] or match[3]):
        sign, whole, fraction, exponent = match.groups()
        return (
            ("-" if sign == "-" else "")
            + (whole.lstrip("0") or "0")
            + ("" if fraction is None else f".{fraction or '0'}")
            + (exponent or "")
        )
    if (text[:1] == "[" and "array" in types) or (text[:1] == "{" and "object" in types):
        try:
            json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        return text
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
