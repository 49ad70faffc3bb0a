"""Replies held to grammars: JSON by schema, choices, patterns, Lark and tool calls, with a model that samples wildly."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gemcutter
from gemcutter.engine.grammar_mask import GrammarMask
from gemcutter.errors import RequestError
from gemcutter.text.grammar import Constraint, build_grammar
from gemcutter.text.grammar_compiler import CompiledGrammar

pytest.importorskip("llguidance")
QUESTION = [{"role": "user", "content": "Go on."}]
NUM_SCHEMAS = int(os.environ.get("GEMCUTTER_CASES", "60"))


@pytest.fixture(scope="module")
def model() -> Iterator[gemcutter.Model]:
    with gemcutter.load("demo") as loaded:
        yield loaded


def answer(model: gemcutter.Model, constraint: Constraint, seed: int = 1) -> gemcutter.Completion:
    return model.chat(QUESTION, constraint=constraint, temperature=1.5, seed=seed, max_tokens=100)


def called(
    model: gemcutter.Model, tools: list[dict[str, Any]], choice: object, seed: int = 1, **more: Any
) -> gemcutter.Completion:
    return model.chat(QUESTION, tools=tools, tool_choice=choice, temperature=1.5, seed=seed, **{"max_tokens": 100} | more)


def tool(name: str, schema: dict[str, Any], **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def objects_of(value: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Return schemas of objects, some of whose properties are required."""
    properties = st.dictionaries(st.sampled_from(["b", "A", "city", "dayOne"]), value, min_size=1, max_size=3)
    return st.builds(
        lambda found, every: {
            "type": "object",
            "properties": found,
            "required": sorted(found) if every else sorted(found)[:1],
            "additionalProperties": False,
        },
        properties,
        st.booleans(),
    )


VALUES = st.recursive(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["red", "two words", 'a "b"']}, {"const": 7}])
    | st.integers(0, 50).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 40})
    | st.integers(1, 6).map(lambda most: {"type": "string", "maxLength": most}),
    lambda value: (
        st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, value, st.integers(1, 2))
        | st.builds(lambda left, right: {"anyOf": [left, right]}, value, value)
        | objects_of(value)
    ),
    max_leaves=4,
)
DRAWN = settings(max_examples=NUM_SCHEMAS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_json_validates_whatever_the_schema(model: gemcutter.Model) -> None:
    finished = 0

    @DRAWN
    @given(objects_of(VALUES))
    def check(schema: dict[str, Any]) -> None:
        nonlocal finished
        found = answer(model, Constraint("json_schema", json.dumps(schema)))
        if found.finish_reason == "stop":
            jsonschema.validate(json.loads(found.text), schema)
            finished += 1

    check()
    assert finished > NUM_SCHEMAS // 3


def test_arguments_validate_whatever_the_schema(model: gemcutter.Model) -> None:
    finished = 0

    @DRAWN
    @given(objects_of(VALUES), st.sampled_from(["required", {"name": "f"}]))
    def check(schema: dict[str, Any], choice: object) -> None:
        nonlocal finished
        found = called(model, [tool("f", schema)], choice, parallel_tool_calls=False)
        if found.finish_reason == "stop":
            (call,) = found.tool_calls
            assert call.name == "f"
            assert not found.text
            jsonschema.validate(call.parsed, schema)
            finished += 1

    check()
    assert finished > NUM_SCHEMAS // 3


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        (Constraint("choice", ("yes", 'n"o')), {"yes", 'n"o'}),
        (Constraint("regex", r"a{2}/[0-1]"), {"aa/0", "aa/1"}),
        (Constraint("lark", 'start: "x" /y{2}/'), {"xyy"}),
    ],
)
def test_texts(model: gemcutter.Model, constraint: Constraint, texts: set[str]) -> None:
    assert {answer(model, constraint, seed).text for seed in range(3)} <= texts


def test_calls_of_one_of_several_tools(model: gemcutter.Model) -> None:
    tools = [tool(name, {"type": "object", "properties": {}}) for name in ("f", "g")]
    assert {called(model, tools, "required", seed).tool_calls[0].name for seed in range(12)} == {"f", "g"}
    for choice in ({"name": "g"}, {"names": ["g"], "mode": "required"}):
        assert {called(model, tools, choice, seed).tool_calls[0].name for seed in range(6)} == {"g"}


def test_no_call_bans_its_marker(model: gemcutter.Model) -> None:
    request = model.prepare(QUESTION, tool_choice="none").request
    assert model.tokenizer.id_of("<|tool_call>") in request.sampling.suppress


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        (Constraint("json_schema", '{"not": {}}'), "not"),
        (Constraint("json_schema", "{"), "not valid JSON"),
        (Constraint("json_schema", '{"type":"integer","minimum":3,"maximum":1}'), "minimum"),
        (Constraint("regex", "("), "regex"),
        (Constraint("choice", ()), "choice"),
        (Constraint("lark", "start: nothing"), "lark"),
    ],
)
def test_bad_constraints_are_refused(model: gemcutter.Model, constraint: Constraint, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        model.prepare(QUESTION, constraint=constraint)


@pytest.mark.parametrize("choice", ["any", {"name": "h"}, {"names": "f"}, "required", 3])
def test_bad_choices_are_refused(choice: object) -> None:
    with pytest.raises(RequestError, match="tool_choice"):
        build_grammar(None, [], choice)


def test_limits_and_strictness() -> None:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        nested = {"type": "array", "items": nested}
    wide = {"type": "object", "properties": {f"p{each}": {} for each in range(4001)}}
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x(?=y)"}}}
    for schema, match in (({"properties": {"a": nested}}, "deep"), (wide, "4000")):
        with pytest.raises(RequestError, match=match):
            build_grammar(None, [tool("f", schema)], "required")
    with pytest.raises(RequestError, match="pattern"):
        build_grammar(None, [tool("f", odd, strict=True)], "required")
    lenient = build_grammar(None, [tool("f", odd)], "required")
    assert lenient is not None
    assert "pattern" in lenient.warnings[0]


def mask_of(compiled: CompiledGrammar, **more: Any) -> GrammarMask:
    return GrammarMask(compiled.matcher, compiled.first, "test", **more)


def allowed(mask: GrammarMask, reply: list[int], size: int) -> set[int]:
    logits_V = mask([2], reply, torch.zeros(size))
    return set(torch.isfinite(logits_V).nonzero().flatten().tolist())


def test_a_mask_follows_drafts_and_other_replies(model: gemcutter.Model) -> None:
    grammar = build_grammar(Constraint("choice", ("abc", "abd", "xyz")), [], "auto")
    assert grammar is not None
    first, size = model.grammars.compile(grammar), model.plan.vocab
    a, b, c, x = (model.tokenizer.encode(letter, bos=False)[0] for letter in "abcx")
    replies = [[], [a], [a, b], [a, b, c], [a], [x], [], [a, b], [a, b, c], [a, b, c], [x]]
    mask = mask_of(first)
    for reply in replies:
        assert allowed(mask, reply, size) == allowed(mask_of(first), reply, size)
    assert allowed(mask, [a, b, c], size) == set(model.defaults.stop_ids)
    assert len(allowed(mask, [a, x], size)) == size  # after a draft that is forbidden nothing is ever taken
    assert a in allowed(mask, [], size)


def test_a_mask_waits_for_its_trigger(model: gemcutter.Model) -> None:
    grammar = build_grammar(None, [tool("f", {})], "auto", parallel=False)
    assert grammar is not None
    assert grammar.is_triggered
    opening = model.tokenizer.id_of("<|tool_call>")
    mask, size = mask_of(model.grammars.compile(grammar), trigger=opening), model.plan.vocab
    assert len(allowed(mask, [40, 41], size)) == size
    assert opening is not None
    texts = {model.tokenizer.piece(id) for id in allowed(mask, [40, 41, opening], size)}
    assert texts
    assert all("call:f".startswith(text) or text == "<0x63>" for text in texts)


def test_requests_share_a_grammar_but_no_state(model: gemcutter.Model) -> None:
    prepared = model.prepare(QUESTION, constraint=Constraint("choice", ("abc", "xyz")), temperature=3.0)
    texts = [stream.finish().text for stream in model.submit_many([prepared] * 6)]
    assert set(texts) <= {"abc", "xyz"}
