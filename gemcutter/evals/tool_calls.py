"""Whether calls of functions are the right ones, by the rules of the Berkeley Function-Calling Leaderboard's ast_checker.

Owns the comparison of names, types and values for Python's types; refuses to know data sets and models. A right call lists for
each parameter the values that count, "" among them where it may be left out. Source: bfcl-eval 2026.3.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TYPES: Mapping[str, type[Any]] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
OPTIONAL = ""
IGNORED = re.compile(r"[ ,./\-_*^]")

Call = Mapping[str, Mapping[str, Any]]  # one name, and its arguments


def safe_name(name: str) -> str:
    """Return a function's name as models are told it: without dots, which the field's servers refuse."""
    return name.replace(".", "_")


def wrong_calls(functions: Sequence[Mapping[str, Any]], calls: Sequence[Call], right: Sequence[Call]) -> str | None:
    """Return what is wrong with calls, in whatever order they come; None where they are the right ones."""
    if len(calls) != len(right):
        return f"expected {len(right)} calls, found {len(calls)}"
    declared, left = {function["name"]: function for function in functions}, list(calls)
    for each in right:
        [(name, values)] = each.items()
        errors = [wrong_call(declared[name], call, values) for call in left]
        if None not in errors:
            return f"no call is the right one of {name}: {'; '.join(map(str, errors))}"
        left.pop(errors.index(None))
    return None


def wrong_call(function: Mapping[str, Any], call: Call, right: Mapping[str, Sequence[Any]]) -> str | None:
    """Return what is wrong with a call of a function, None where nothing is."""
    properties, name = function["parameters"]["properties"], safe_name(function["name"])
    if name not in call:
        return f"it calls {', '.join(call)}, not {name}"
    given = call[name]
    if missing := [each for each in function["parameters"].get("required", ()) if each not in given]:
        return f"{missing[0]} is missing"
    for each, value in given.items():
        if each not in properties or each not in right:
            return f"{each} is no parameter"
        if not _is_right(value, properties[each], right[each]):
            return f"{each} is {value!r}"
    left_out = [each for each, values in right.items() if each not in given and OPTIONAL not in values]
    return f"{left_out[0]} is left out" if left_out else None


def _is_right(value: Any, schema: Mapping[str, Any], values: Sequence[Any]) -> bool:
    """Return whether an argument has the declared type, or that of the right values, and is one of these."""
    kind = TYPES[schema["type"]]
    inner = TYPES[schema["items"]["type"]] if kind is list else None
    if kind is float and type(value) is int:
        value = float(value)
    if not _has_type(value, values, kind, inner):
        return False
    if type(value) is not kind or _type_of(values) not in (kind, None):
        return value in values  # the name of a variable in place of a value
    if kind is dict:
        return _is_one_of_objects(value, values)
    if inner is dict:
        return any(_are_objects(value, each) for each in values)
    if kind is str:
        return _plain(value) in [_plain(each) for each in values if isinstance(each, str)]
    if kind is list:
        right = [[_plain(item) for item in each] for each in values if isinstance(each, list | str)]
        return [_plain(each) for each in value] in right
    return value in values


def _type_of(values: Sequence[Any]) -> type[Any] | None:
    """Return the type of the first value that is not "", None where there is no such."""
    return next((type(value) for value in values if value != OPTIONAL), None)


def _has_type(value: Any, values: Sequence[Any], kind: type[Any], inner: type[Any] | None) -> bool:
    if type(value) is not kind:
        return type(value) is _type_of(values)
    return inner is None or any(
        not isinstance(each, list) or all(_has_type(item, each, inner, None) for item in value) for each in values
    )


def _plain(value: Any) -> Any:
    """Return a text without blanks and marks, in lower case and with double quotes; other values as they are."""
    return IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _are_objects(value: Sequence[Mapping[str, Any]], right: Sequence[Any]) -> bool:
    return len(value) == len(right) and all(
        _is_one_of_objects(*pair) for pair in zip(value, ([each] for each in right), strict=True)
    )


def _is_one_of_objects(value: Mapping[str, Any], values: Sequence[Any]) -> bool:
    return any(each != OPTIONAL and _is_object(value, each) for each in values)


def _is_object(value: Any, right: Any) -> bool:
    """Return whether an object has the right values, and leaves out only what may be."""
    if not isinstance(value, Mapping) or not isinstance(right, Mapping):
        return False
    return all(
        name in right and _plain(given) in [_plain(each) for each in right[name]] for name, given in value.items()
    ) and all(name in value or OPTIONAL in values for name, values in right.items())
