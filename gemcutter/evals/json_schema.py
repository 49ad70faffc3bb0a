"""Whether a value is valid against a JSON schema, for the keywords that generated schemas use.

Owns `problem`; refuses schemas with other keywords rather than passing over them. Source: JSON Schema 2020-12, validation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

KINDS: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int, float),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KEYWORDS = {"type", "enum", "properties", "required", "additionalProperties", "items", "description"}
BOUNDS = {"minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"}


def problem(value: Any, schema: Mapping[str, Any], where: str = "$") -> str | None:
    """Return the first reason why a value is not valid, and where; None where it is. Raises ValueError for other keywords."""
    if unknown := set(schema) - KEYWORDS - BOUNDS:
        raise ValueError(f"keywords that are not checked: {sorted(unknown)}")
    if "type" in schema and not _is_kind(value, schema["type"]):
        return f"{where}: expected {schema['type']}, found {json.dumps(value)[:40]}"
    if "enum" in schema and not any(type(value) is type(each) and value == each for each in schema["enum"]):
        return f"{where}: not one of {schema['enum']}"
    if (bound := _broken_bound(value, schema)) is not None:
        return f"{where}: {bound} {schema[bound]} is broken"
    if isinstance(value, dict):
        return _of_object(value, schema, where)
    if isinstance(value, list) and "items" in schema:
        found = (problem(each, schema["items"], f"{where}[{place}]") for place, each in enumerate(value))
        return next((each for each in found if each is not None), None)
    return None


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, KINDS[kind]) and (kind != "integer" or is_whole)


def _broken_bound(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Return the keyword of a bound that a value breaks."""
    if isinstance(value, bool):
        return None
    ends = ("minimum", "maximum") if isinstance(value, int | float) else ("minLength", "maxLength")
    ends = ("minItems", "maxItems") if isinstance(value, list) else ends
    if not isinstance(value, int | float | str | list):
        return None
    size = value if isinstance(value, int | float) else len(value)
    if ends[0] in schema and size < schema[ends[0]]:
        return ends[0]
    return ends[1] if ends[1] in schema and size > schema[ends[1]] else None


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    properties = schema.get("properties", {})
    if missing := [name for name in schema.get("required", ()) if name not in value]:
        return f"{where}: {missing[0]!r} is missing"
    for name, each in value.items():
        if name in properties:
            found = problem(each, properties[name], f"{where}.{name}")
            if found is not None:
                return found
        elif schema.get("additionalProperties", True) is False:
            return f"{where}: {name!r} is not allowed"
    return None
