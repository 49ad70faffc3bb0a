"""BFCL: which functions a model calls, and how; five parts of the Berkeley Function-Calling Leaderboard, version 4.

The data is the folder `bfcl_eval/data` of the package bfcl-eval. Functions are declared through the chat template, and calls are
those that the reply's own parser has read. Source: bfcl-eval 2026.3.23. Read `evals/tool_calls.py` for who judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply
from gemcutter.evals.tool_calls import TYPES, safe_name, wrong_calls

PARTS = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
WITHOUT_CALLS = "irrelevance"
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
FLOAT_NOTE = " This is a float type value."
REMEDY = (
    "bfcl takes its data from the package bfcl-eval; run `pip download --no-deps bfcl-eval==2026.3.23` where there is a network, "
    "unzip the wheel, and name its folder bfcl_eval/data with --data"
)


class Bfcl:
    """The task."""

    name = "bfcl"
    about = "BFCL v4: calls of functions, one, several, among others, none"
    modes: Sequence[Mode] = (
        Mode(
            "native", "functions in the chat template, 1024 tokens", "generate", "bfcl-native-1", True, None, 1024, can_think=True
        ),
    )
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the questions of all parts. Raises RequestError."""
        if data.place is None or data.place.is_file():
            raise RequestError(REMEDY)
        for part in PARTS:
            answers = {} if part == WITHOUT_CALLS else _answers(data, part)
            for number, row in enumerate(data.rows(f"bfcl, {part}", [Layout((f"BFCL_v4_{part}",))]), 1):
                yield _item(row, part, answers, f"bfcl, {part}, row {number}")

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the calls with the right ones, in whatever order; where no function fits, there must be none."""
        try:
            calls = [{call.name: call.parsed} for call in reply.tool_calls]
        except ValueError:  # arguments that the cap has cut off
            return Grade(None, {"accuracy": 0.0})
        if item.subject == WITHOUT_CALLS:
            return Grade(calls, {"accuracy": float(not calls)})
        error = wrong_calls(item.about["functions"], calls, item.gold)
        return Grade({"calls": calls, "error": error} if calls else None, {"accuracy": float(error is None)})


def _answers(data: Data, part: str) -> dict[str, list[Any]]:
    """Return the right calls of a part by the questions' ids. Raises RequestError."""
    rows = data.rows(f"bfcl, answers of {part}", [Layout((f"possible_answer/BFCL_v4_{part}",))])
    return {
        field(row, "id", str, f"bfcl, answers of {part}, row {number}"): field(
            row, "ground_truth", list, f"bfcl, answers of {part}, row {number}"
        )
        for number, row in enumerate(rows, 1)
    }


def _item(row: Row, part: str, answers: Mapping[str, list[Any]], where: str) -> Item:
    id = field(row, "id", str, where)
    where = f"{where} ({id})"
    functions, turns = field(row, "function", list, where), field(row, "question", list, where)
    if len(turns) != 1 or not isinstance(turns[0], list):
        raise RequestError(f"{where}: 'question': expected one turn, a list of messages")
    try:
        tools = [declaration(function) for function in functions]
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{where}: 'function': not a function as BFCL declares it: {error!r}") from None
    if part != WITHOUT_CALLS and id not in answers:
        raise RequestError(f"{where}: there is no answer with this id")
    right = answers.get(id, [])
    _check(right, functions, where)
    return Item(id, turns[0], right, part, about={"functions": functions}, options={"tools": tools})


def _check(right: Sequence[Any], functions: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise RequestError for right calls of functions that are not declared, or whose types the judge does not know."""
    declared = {function["name"]: function["parameters"]["properties"] for function in functions}
    for call in right:
        if not isinstance(call, dict) or len(call) != 1 or next(iter(call)) not in declared:
            raise RequestError(f"{where}: 'ground_truth': expected calls of declared functions, found {call!r:.80}")
    for name, properties in declared.items():
        for parameter, schema in properties.items():
            of_items = schema.get("items", {}).get("type") if TYPES.get(schema.get("type")) is list else "any"
            if schema.get("type") not in TYPES or of_items not in TYPES:
                raise RequestError(
                    f"{where}: {name}: parameter {parameter!r} has a type that is not judged: {schema.get('type')!r}"
                )


def declaration(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function as tools are declared: JSON schema's types, and a name without dots."""
    parameters = function["parameters"]
    properties = {name: _schema(each) for name, each in parameters["properties"].items()}
    of_json = {**parameters, "type": "object", "properties": properties}
    return {"type": "function", "function": {**function, "name": safe_name(function["name"]), "parameters": of_json}}


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    kind = schema.get("type", "string")
    found = {**schema, "type": JSON_TYPES.get(kind, kind)}
    if kind == "float":
        found |= {"format": "float", "description": schema.get("description", "") + FLOAT_NOTE}
    if "properties" in schema:
        found["properties"] = {name: _schema(each) for name, each in schema["properties"].items()}
    elif "items" in schema:
        found["items"] = _item_schema(schema["items"])
    return found


def _item_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a list's items, to which no note is added."""
    found = {**schema, "type": JSON_TYPES.get(schema["type"], schema["type"])}
    if "properties" in schema:
        found["properties"] = {name: _schema(each) for name, each in schema["properties"].items()}
    elif "items" in schema:
        found["items"] = _item_schema(schema["items"])
    return found
