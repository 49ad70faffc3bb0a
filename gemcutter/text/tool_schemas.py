"""Declared tools as chat templates can print them.

Templates print little of a JSON schema: type, description, enums of strings, nullable, items, properties, required. Owns the
rewriting of everything else into these: references are resolved, alternatives are flattened, and what has no place of its own
(bounds, defaults, other enums, patterns) is said in the description. The declarations themselves stay as they are: grammars and
coercion need the whole schema. Refuses to know templates and tokens. Read `history.py` for the messages, `chat.py` for who asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemcutter.text.schema_reference import find_part

MAX_DEPTH = 20  # of objects and arrays in each other; deeper ones are printed without what they hold
MAX_REFERENCES = 8  # that are resolved within each other, so that a schema which holds itself ends
MAX_SCHEMAS = 5000  # of one tool: references can make a small declaration a huge one
MAX_FACT = 2000  # characters of one fact in a description
TYPES = ("string", "integer", "number", "boolean", "object", "array")
OF_OBJECTS = ("properties", "required", "additionalProperties", "patternProperties")
OF_ARRAYS = ("items", "prefixItems", "minItems", "maxItems")
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}
TEXT_FACTS = ("pattern", "format")


def printable_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of checked tools (each a `function` with a name) that every generation of template prints in full."""
    return [{"type": "function", "function": _printable_function(tool["function"])} for tool in tools]


def _printable_function(function: Mapping[str, Any]) -> dict[str, Any]:
    description = function.get("description")
    found: dict[str, Any] = {
        "name": function["name"],
        "description": description if isinstance(description, str) else "",
    }
    parameters = function.get("parameters")
    if isinstance(parameters, Mapping) and parameters:
        found["parameters"] = _Reader(parameters).read_parameters()
    response = function.get("response")
    if isinstance(response, Mapping):
        said = response.get("description")
        found["response"] = {"description": said if isinstance(said, str) else "", "type": "object"}
    return found


class _Reader:
    """Reads the schema of one tool, whose references point into `root`."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root, self._left = root, MAX_SCHEMAS

    def read_parameters(self) -> dict[str, Any]:
        """Return the parameters of a function, which are an object whatever the schema says."""
        found = self._read(self._root, MAX_DEPTH, MAX_REFERENCES)
        found.setdefault("properties", {})
        return {name: value for name, value in found.items() if name in ("properties", "required")} | {"type": "object"}

    def _read(self, raw: Any, depth: int, references: int) -> dict[str, Any]:
        """Return a schema in the few words of templates; one of any value for what is no schema."""
        schema, references = self._merged(raw, references)
        found: dict[str, Any] = {}
        facts = list[str]()
        kind, is_nullable = _read_type(schema, facts)
        if kind == "object" and depth > 0 and self._left > 0:
            found |= self._read_object(schema, depth, references, facts)
        elif kind == "object":
            found["properties"] = {}
        if kind == "array" and depth > 0 and self._left > 0:
            found |= self._read_items(schema, depth, references, facts)
        if kind == "string" and (choices := _string_choices(schema)):
            found["enum"] = choices
        facts += _facts(schema, has_enum="enum" in found)
        if description := _described(schema.get("description"), facts):
            found["description"] = description
        if is_nullable:
            found["nullable"] = True
        return found | {"type": kind}

    def _read_object(self, schema: Mapping[str, Any], depth: int, references: int, facts: list[str]) -> dict[str, Any]:
        properties, required = schema.get("properties"), _texts(schema.get("required"))
        own = properties if isinstance(properties, Mapping) else {}
        found: dict[str, Any] = {"properties": {str(name): self._read(each, depth - 1, references) for name, each in own.items()}}
        if required:
            found["required"] = required
        others = schema.get("additionalProperties")
        if isinstance(others, Mapping) and others:
            value = self._read(others, 0, references)
            told = f": {value['description']}" if "description" in value else ""
            facts.append(f"{'other keys' if own else 'keys of your choice'} with values of type {value['type']}{told}")
        return found

    def _read_items(self, schema: Mapping[str, Any], depth: int, references: int, facts: list[str]) -> dict[str, Any]:
        items, first = schema.get("items"), schema.get("prefixItems")
        tuples = first if isinstance(first, list | tuple) else items if isinstance(items, list | tuple) else None
        if tuples is not None:
            kinds = [self._read(each, 0, references)["type"] for each in tuples]
            facts.append(f"in this order: {', '.join(kinds)}" if kinds else "an empty list")
            return {"items": {"type": kinds[0]}} if len(set(kinds)) == 1 else {}
        return {"items": self._read(items, depth - 1, references)} if isinstance(items, Mapping) and items else {}

    def _merged(self, raw: Any, references: int) -> tuple[dict[str, Any], int]:
        """Return a schema without references and combinations, and how many references may still be resolved in it."""
        self._left -= 1
        if self._left < 0 or not isinstance(raw, Mapping):
            return {}, 0
        schema = {str(name): value for name, value in raw.items()}
        while isinstance(pointer := schema.pop("$ref", None), str):
            target = find_part(self._root, pointer) if references > 0 else None
            references -= 1
            if not isinstance(target, Mapping):
                schema.setdefault("type", "object")
                break
            schema = {str(name): value for name, value in target.items()} | schema
        for part in _schemas(schema.pop("allOf", None)):
            merged, references = self._merged(part, references - 1) if references > 0 else ({}, references)
            schema = _both(schema, merged)
        for name in ("anyOf", "oneOf"):
            if name in schema and references > 0:
                alternatives = [self._merged(each, references - 1)[0] for each in _schemas(schema.pop(name))]
                schema = _either(schema, alternatives)
        return schema, references


def _both(left: dict[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Return one schema for what must fit two."""
    joint = {**right, **left}
    if isinstance(left.get("properties"), Mapping) and isinstance(right.get("properties"), Mapping):
        joint["properties"] = {**right["properties"], **left["properties"]}
    if required := list(dict.fromkeys([*_texts(left.get("required")), *_texts(right.get("required"))])):
        joint["required"] = required
    return joint


def _either(base: dict[str, Any], alternatives: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one schema for what may fit any of several, on top of what all have in common."""
    real = [each for each in alternatives if not _is_null(each)]
    if len(real) < len(alternatives):
        base = {**base, "nullable": True}
    if not real:
        return {**base, "type": "null"} if alternatives else base
    if len(real) == 1:
        return _both(base, real[0])
    kinds = list(dict.fromkeys(_read_type(each, [])[0] for each in real))
    if kinds == ["object"]:
        return _both(base, _any_object(real))
    if len(kinds) == 1 and all("enum" in each or "const" in each for each in real):
        return _both(base, {"type": kinds[0], "enum": [value for each in real for value in _choices(each)]})
    described = "; or ".join(map(_spelled, real))[:MAX_FACT]
    return _both({**base, "description": _described(base.get("description"), [described])}, {**real[0], "description": ""})


def _any_object(alternatives: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one object with the properties of all; required are those that every one requires."""
    properties: dict[str, Any] = {}
    for each in reversed(alternatives):
        properties |= each["properties"] if isinstance(each.get("properties"), Mapping) else {}
    common = [
        name for name in _texts(alternatives[0].get("required")) if all(name in _texts(a.get("required")) for a in alternatives)
    ]
    shapes = [", ".join(each["properties"]) for each in alternatives if isinstance(each.get("properties"), Mapping)]
    told = f"either {' or '.join(f'({names})' for names in shapes)}" if len(set(shapes)) > 1 else ""
    return {"type": "object", "properties": properties, "required": common, "description": told[:MAX_FACT]}


def _spelled(schema: Mapping[str, Any]) -> str:
    facts = list[str]()
    kind, _ = _read_type(schema, facts)
    facts += _facts(schema, has_enum=False)
    said = schema.get("description")
    return _described(f"{kind}: {said}" if isinstance(said, str) and said else kind, facts)


def _read_type(schema: Mapping[str, Any], facts: list[str]) -> tuple[str, bool]:
    """Return the one type that is printed and whether null is allowed; of several types the others become a fact."""
    raw = schema.get("type")
    names = [name.lower() for name in (raw if isinstance(raw, list | tuple) else [raw]) if isinstance(name, str)]
    kinds = [name for name in dict.fromkeys(names) if name in TYPES]
    is_nullable = "null" in names or schema.get("nullable") is True or None in _choices(schema)
    if len(kinds) > 1:
        facts.append(f"may also be {' or '.join(kinds[1:])}")
    if not kinds:
        kinds = [_inferred(schema)]
        if not any(key in schema for key in (*OF_OBJECTS, *OF_ARRAYS, "enum", "const", "pattern", "format")) and not is_nullable:
            facts.append("any value")
    return kinds[0], is_nullable


def _inferred(schema: Mapping[str, Any]) -> str:
    """Return the type of a schema that names none."""
    values = [value for value in _choices(schema) if value is not None]
    if values:
        kinds = {_kind(value) for value in values}
        return "number" if kinds == {"integer", "number"} else kinds.pop() if len(kinds) == 1 else "string"
    if any(key in schema for key in OF_OBJECTS):
        return "object"
    if any(key in schema for key in OF_ARRAYS):
        return "array"
    return "number" if any(key in schema for key in ("minimum", "maximum", "multipleOf")) else "string"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "object" if isinstance(value, Mapping) else "array" if isinstance(value, list | tuple) else "string"


def _is_null(schema: Mapping[str, Any]) -> bool:
    return (
        schema.get("type") in ("null", ["null"])
        or ("const" in schema and schema["const"] is None)
        or schema.get("enum") == [None]
    )


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    """Return the values of an enum or const, none where there is neither."""
    if "const" in schema:
        return [schema["const"]]
    enum = schema.get("enum")
    return list(enum) if isinstance(enum, list | tuple) else []


def _string_choices(schema: Mapping[str, Any]) -> list[str]:
    """Return an enum that templates print: of strings alone, besides null."""
    values = [value for value in _choices(schema) if value is not None]
    return values if all(isinstance(value, str) for value in values) else []


def _facts(schema: Mapping[str, Any], *, has_enum: bool) -> Iterator[str]:
    """Yield what a template leaves out, in words."""
    values = [value for value in _choices(schema) if value is not None]
    if values and not has_enum:
        yield (f"always {_json(values[0])}" if len(values) == 1 else f"one of {', '.join(map(_json, values))}")[:MAX_FACT]
    for name, words in BOUNDS.items():
        bound = schema.get(name)
        if isinstance(bound, int | float) and not isinstance(bound, bool):
            yield words.format(_json(bound))
    for name in TEXT_FACTS:
        if isinstance(schema.get(name), str):
            yield f"{name} {schema[name]}"[:MAX_FACT]
    if "default" in schema:
        yield f"default {_json(schema['default'])}"[:MAX_FACT]


def _described(description: Any, facts: Sequence[str]) -> str:
    """Return a description with facts after it."""
    said = description if isinstance(description, str) else ""
    told = "; ".join(fact for fact in facts if fact)
    return f"{said} ({told})" if said and told else said or told


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):  # circular, or keys of other types
        return "a value that can't be shown"


def _texts(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list | tuple) else []


def _schemas(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
