"""Declared tools: whatever their schema, the canonical template prints it, and prints what it says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.text import chat
from gemcutter.text.canonical import LARGE, canonical_template
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tool_schemas import MAX_DEPTH, printable_tools

TOKENIZER = Tokenizer.load(Path(chat.__file__).resolve().parents[1] / "demo")
TEMPLATE = canonical_template(LARGE, TOKENIZER)
HELLO = [{"role": "user", "content": "Hi"}]
Q = '<|"|>'


def tool(parameters: Any, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters, **function}}


def printed(schema: Any, **root: Any) -> str:
    """Return how the one property of a tool is declared."""
    prompt = TEMPLATE.render(HELLO, tools=[tool({"type": "object", "properties": {"x": schema}, **root})])
    return prompt.partition("properties:{x:")[2].partition(f"}},type:{Q}OBJECT{Q}}}}}<tool|>")[0].replace(Q, '"')


@pytest.mark.parametrize(
    ("schema", "declared"),
    [
        ({"type": "string", "description": "City"}, '{description:"City",type:"STRING"}'),
        ({"type": ["string", "null"]}, '{nullable:true,type:"STRING"}'),
        ({"type": ["integer", "string"]}, '{description:"may also be string",type:"INTEGER"}'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, '{nullable:true,type:"STRING"}'),
        (
            {"oneOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None, "description": "Days"},
            '{description:"Days (at least 1; default null)",nullable:true,type:"INTEGER"}',
        ),
        ({"$ref": "#/$defs/unit"}, '{description:"Unit",enum:["c","f"],type:"STRING"}'),
        ({"$ref": "#/$defs/unit", "description": "Own"}, '{description:"Own",enum:["c","f"],type:"STRING"}'),
        ({"$ref": "https://example.org/schema.json"}, '{properties:{},type:"OBJECT"}'),
        ({"$ref": "#/nowhere"}, '{properties:{},type:"OBJECT"}'),
        ({"type": "object", "additionalProperties": True}, '{properties:{},type:"OBJECT"}'),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            '{description:"keys of your choice with values of type integer",properties:{},type:"OBJECT"}',
        ),
        ({"type": "integer", "enum": [1, 2], "default": 2}, '{description:"one of 1, 2; default 2",type:"INTEGER"}'),
        ({"enum": ["a", None]}, '{enum:["a"],nullable:true,type:"STRING"}'),
        ({"const": "x"}, '{enum:["x"],type:"STRING"}'),
        ({"const": 3}, '{description:"always 3",type:"INTEGER"}'),
        (
            {"type": "string", "pattern": "^a+$", "format": "date", "maxLength": 9},
            '{description:"at most 9 characters; pattern ^a+$; format date",type:"STRING"}',
        ),
        ({"type": "number", "exclusiveMinimum": 0, "multipleOf": 2}, '{description:"above 0; a multiple of 2",type:"NUMBER"}'),
        ({"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "minItems": 1},
         '{description:"at least 1 items",items:{nullable:true,type:"STRING"},type:"ARRAY"}'),
        (
            {"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}, {"properties": {"b": {"type": "boolean"}}}]},
            '{properties:{a:{type:"STRING"},b:{type:"BOOLEAN"}},required:["a"],type:"OBJECT"}',
        ),
        (
            {"anyOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}, {"properties": {"b": {"type": "string"}}}]},
            '{description:"either (a) or (b)",properties:{a:{type:"STRING"},b:{type:"STRING"}},type:"OBJECT"}',
        ),
        (
            {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 1}]},
            '{description:"string; or integer (at least 1)",type:"STRING"}',
        ),
        ({"anyOf": [{"const": "a"}, {"const": "b"}]}, '{enum:["a","b"],type:"STRING"}'),
        ({}, '{description:"any value",type:"STRING"}'),
        (True, '{description:"any value",type:"STRING"}'),
        ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]},
         '{description:"in this order: string, integer",type:"ARRAY"}'),
    ],
)  # fmt: skip
def test_what_schemas_say_is_declared(schema: Any, declared: str) -> None:
    unit = {"type": "string", "enum": ["c", "f"], "description": "Unit"}
    assert printed(schema, **{"$defs": {"unit": unit}}) == declared


def test_properties_with_names_of_keywords_are_declared() -> None:
    names = ("description", "type", "properties", "required", "nullable", "items")
    inner = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": ["type"]}
    assert all(f'{name}:{{type:"STRING"}}' in printed(inner) for name in names)


def test_a_schema_that_holds_itself_ends() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "value": {"type": "integer"}}}
    found = printed({"$ref": "#/$defs/node"}, **{"$defs": {"node": node}})
    assert 2 <= found.count("value:") <= MAX_DEPTH
    wide = {"type": "object", "properties": {name: {"$ref": "#/$defs/node"} for name in "abcdefgh"}}
    assert len(printed({"$ref": "#/$defs/node"}, **{"$defs": {"node": wide}})) < 1_000_000
    forks = {"anyOf": [{"$ref": "#/$defs/node"}] * 9}
    assert len(printed({"$ref": "#/$defs/node"}, **{"$defs": {"node": forks}})) < 1_000_000


def test_deep_schemas_are_cut() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"y": schema}}
    assert printed(schema).count("y:{") == MAX_DEPTH - 1


def test_declarations_are_not_changed() -> None:
    tools = [tool({"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"const": 1}}})]
    before = copy.deepcopy(tools)
    printable_tools(tools)
    assert tools == before


@pytest.mark.parametrize(
    "function", [{}, {"description": None}, {"parameters": None}, {"parameters": []}, {"response": {"type": 3}}]
)
def test_bare_functions_are_declared(function: dict[str, Any]) -> None:
    prompt = TEMPLATE.render(HELLO, tools=[{"function": {"name": "f", **function}}])
    declaration = prompt.partition("<|tool>")[2].partition("<tool|>")[0]
    assert declaration.startswith(f"declaration:f{{description:{Q}{Q}")
    assert declaration.count("{") == declaration.count("}")
    assert "None" not in declaration
    assert "null" not in declaration


# ---- whatever the schema ----

FRAGMENTS = st.sampled_from(["a", "B", "<", "|", ">", '"', "turn", "tool", "_call", " ", "$", "/", "{", "}", "é"])
TEXTS = st.lists(FRAGMENTS, max_size=6).map("".join)
SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | TEXTS | st.sampled_from(sorted(TOKENIZER.markers))
KEYWORDS = st.sampled_from(
    """
    type description properties required items anyOf oneOf allOf not $ref enum const default minimum maxLength pattern format
    nullable additionalProperties prefixItems $defs if then title
    """.split()  # noqa: SIM905
)
POINTERS = st.sampled_from(["#", "#/properties/x", "#/$defs/a", "#/properties", "#/anyOf/0", "other.json"])
TYPES = st.sampled_from(["string", "integer", "number", "boolean", "object", "array", "null", "OBJECT", "file"])
SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    SCALARS | POINTERS | TYPES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYWORDS, inner, max_size=5)
        | st.dictionaries(TEXTS, inner, max_size=3)
        | st.fixed_dictionaries({"type": TYPES, "properties": st.dictionaries(TEXTS, inner, max_size=3)})
        | st.fixed_dictionaries({"$ref": POINTERS, "anyOf": st.lists(inner, max_size=3)})
    ),
    max_leaves=25,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SCHEMAS, TEXTS | SCALARS)
def test_every_schema_is_printed_and_none_makes_a_marker(schema: Any, description: Any) -> None:
    tools = [tool(schema, description=description), tool({"type": "object", "properties": {"x": schema}, "anyOf": [schema]})]
    ids = TEMPLATE.encode(HELLO, tools=tools)
    markers = TOKENIZER.markers - {Q}
    ours = [TOKENIZER.piece(id) for id in ids if TOKENIZER.piece(id) in markers]
    declared = ["<|tool>", "<tool|>"] * 2
    cue = ["<|turn>", "<|channel>", "<channel|>"]
    assert ours == ["<bos>", "<|turn>", *declared, "<turn|>", "<|turn>", "<turn|>", *cue]
    # keys that begin with "<" are sorted as the characters that stand for it
    assert sorted(TOKENIZER.decode(ids, special=True)) == sorted(TEMPLATE.render(HELLO, tools=tools))
    assert ids.count(TOKENIZER.id_of(Q) or -1) % 2 == 0
