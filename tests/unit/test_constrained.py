"""Replies held to schemas, patterns and declarations, through models that sample wildly: trained, and with random weights.

`GEMCUTTER_CASES` says how many schemas are drawn. Read `test_grammar.py` for grammars and masks by themselves.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gemcutter
from gemcutter import Completion, Constraint, Model, RequestError
from gemcutter.checkpoint.write.synth import write_checkpoint
from gemcutter.engine.thinking_budget import ThinkingBudget

pytest.importorskip("llguidance")
QUESTION = [{"role": "user", "content": "Go on."}]
NUM_CASES = int(os.environ.get("GEMCUTTER_CASES", "60"))
DRAWN = settings(max_examples=NUM_CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
YES_NO = Constraint("choice", ("yes", "no"))
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["low", "high"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def trained() -> Iterator[Model]:
    with gemcutter.load("demo") as model:
        yield model


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("model") / "random"
    write_checkpoint("E2B", folder, full=False, seed=0)
    with gemcutter.load(folder) as model:
        yield model


def ask(model: Model, **options: Any) -> Completion:
    wild = {"temperature": 1.5, "seed": 1, "max_tokens": 150}
    return model.chat(QUESTION, **wild | options)


def tool(name: str, schema: Mapping[str, Any], **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


class Forced:
    """Makes a reply begin with some tokens, whatever the model prefers."""

    def __init__(self, *ids: int | None) -> None:
        self.ids = [id for id in ids if id is not None]

    def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        if len(reply) < len(self.ids):
            logits_V[self.ids[len(reply)]] = 1e6
        return logits_V


# ---- schemas that nobody thought of ----


def objects_of(value: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Return schemas of objects, some of whose properties are required."""
    names = st.sampled_from(["b", "A", "city", "dayOne", "x y", "a:b", "größe"])
    return st.builds(
        lambda found, every: {
            "type": "object",
            "properties": found,
            "required": sorted(found) if every else sorted(found)[:1],
            "additionalProperties": False,
        },
        st.dictionaries(names, value, min_size=1, max_size=3),
        st.booleans(),
    )


def array_of(item: dict[str, Any], low: int, more: int) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": low, "maxItems": low + more}


SCALARS = (
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["integer", "null"]},
            {"type": "number", "minimum": -1, "maximum": 1},
            {"enum": ["red", "two words", 'a "b"', "", 5, None]},
            {"const": 7},
            {"type": "string", "pattern": "^[a-c]{1,4}$"},
            {"type": "string", "format": "date"},
            {"type": "string", "minLength": 2, "maxLength": 5},
        ]
    )
    | st.integers(0, 50).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 40})
    | st.integers(0, 6).map(lambda most: {"type": "string", "maxLength": most})
)
VALUES = st.recursive(
    SCALARS,
    lambda value: (
        st.builds(array_of, value, st.integers(0, 2), st.integers(0, 2))
        | st.builds(lambda left, right: {"anyOf": [left, right]}, value, value)
        | objects_of(value)
    ),
    max_leaves=4,
)


def test_json_validates_whatever_the_schema(untrained: Model) -> None:
    finished = 0

    @DRAWN
    @given(objects_of(VALUES))
    def check(schema: dict[str, Any]) -> None:
        nonlocal finished
        found = ask(untrained, constraint=Constraint("json_schema", json.dumps(schema)))
        if found.finish_reason == "stop":
            jsonschema.validate(json.loads(found.text), schema)
            finished += 1

    check()
    assert finished > NUM_CASES // 2


def test_arguments_validate_whatever_the_schema(untrained: Model) -> None:
    finished = 0

    @DRAWN
    @given(objects_of(VALUES), st.sampled_from(["required", {"name": "f"}, {"names": ["f"], "mode": "required"}]))
    def check(schema: dict[str, Any], choice: object) -> None:
        nonlocal finished
        tools = [tool("g", {}), tool("f", schema, strict=True)]
        found = ask(untrained, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        if found.finish_reason == "stop":
            (call,) = found.tool_calls
            assert not found.text
            assert call.name == "f" or (choice == "required" and call.parsed == {})
            jsonschema.validate(call.parsed, schema if call.name == "f" else {})
            finished += 1

    check()
    assert finished > NUM_CASES // 2


def test_a_trained_model_keeps_to_a_schema(trained: Model) -> None:
    for seed in range(4):
        found = ask(trained, constraint=Constraint("json_schema", json.dumps(POINT)), seed=seed)
        jsonschema.validate(json.loads(found.text), POINT)
        calls = ask(trained, tools=[tool("f", POINT)], tool_choice="required", parallel_tool_calls=False, seed=seed).tool_calls
        jsonschema.validate(calls[0].parsed, POINT)


def test_arguments_of_every_kind(untrained: Model) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "v": {"type": "integer", "maximum": 9}}}
    schema = {
        "$defs": {"node": node | {"required": ["v"]}},
        "type": "object",
        "properties": {
            "list": {"$ref": "#/$defs/node"},
            "any": {"type": "array", "items": {}, "maxItems": 1},
            "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
            "when": {"type": "string", "format": "date-time"},
            "both": {"allOf": [{"type": "boolean"}], "nullable": True},
        },
        "required": ["list", "when", "both", "missing"],
    }
    finished = 0
    for seed in range(6):
        found = ask(untrained, tools=[tool("f", schema)], tool_choice="required", parallel_tool_calls=False, seed=seed)
        if found.finish_reason == "stop":
            arguments = found.tool_calls[0].parsed
            assert {"list", "when", "both", "missing"} <= arguments.keys() <= {*schema["properties"], "missing"}
            assert isinstance(arguments["list"]["v"], int)
            assert arguments["both"] in (True, False, None)
            assert len(arguments["when"]) >= len("2026-01-01T00:00:00Z")
            finished += 1
    assert finished


# ---- forms ----


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        (Constraint("choice", ("yes", 'n"o')), {"yes", 'n"o'}),
        (Constraint("regex", r"a{2}/[0-1]\/"), {"aa/0/", "aa/1/"}),
        (Constraint("regex", r"^(x|y)$"), {"x", "y"}),
        (Constraint("lark", 'start: "x" /y{2}/ Z\nZ: "}"'), {"xyy}"}),
    ],
)
def test_texts(untrained: Model, constraint: Constraint, texts: set[str]) -> None:
    found = {ask(untrained, constraint=constraint, seed=seed).text for seed in range(8)}
    assert found == texts


def test_an_object_of_any_kind(untrained: Model) -> None:
    found = [ask(untrained, constraint=Constraint("json_object"), seed=seed, max_tokens=80) for seed in range(4)]
    assert all(isinstance(json.loads(each.text), dict) for each in found if each.finish_reason == "stop")
    assert all(each.text.startswith("{") for each in found)


def test_several_calls_of_several_tools(untrained: Model) -> None:
    tools = [tool(name, {"type": "object", "properties": {}}) for name in ("f", "g")]
    found = [ask(untrained, tools=tools, tool_choice="required", seed=seed) for seed in range(12)]
    assert {call.name for each in found for call in each.tool_calls} == {"f", "g"}
    assert max(len(each.tool_calls) for each in found) > 1
    single = [ask(untrained, tools=tools, tool_choice="required", seed=seed, parallel_tool_calls=False) for seed in range(12)]
    assert {len(each.tool_calls) for each in single} == {1}
    for choice in ({"name": "g"}, {"names": ["g"], "mode": "required"}):
        calls = [ask(untrained, tools=tools, tool_choice=choice, seed=seed).tool_calls for seed in range(4)]
        assert {call.name for each in calls for call in each} == {"g"}
        assert all(calls)


def test_calls_or_the_answer(untrained: Model) -> None:
    opening = untrained.tokenizer.id_of("<|tool_call>")
    both: dict[str, Any] = {"tools": [tool("f", POINT)], "constraint": YES_NO, "parallel_tool_calls": False}
    call = ask(untrained, **both, logits_processors=[Forced(opening)])
    assert [each.name for each in call.tool_calls] == ["f"]
    jsonschema.validate(call.tool_calls[0].parsed, POINT)
    assert {ask(untrained, **both, tool_choice="none", seed=seed).text for seed in range(8)} == {"yes", "no"}
    must = ask(untrained, **both, tool_choice="required")
    assert (len(must.tool_calls), must.text) == (1, "")


def test_auto_leaves_the_text_free_and_holds_calls(untrained: Model) -> None:
    opening = untrained.tokenizer.id_of("<|tool_call>")
    tools = [tool("f", POINT)]
    called = ask(untrained, tools=tools, logits_processors=[Forced(200, 201, opening)])
    assert called.text
    for call in called.tool_calls:
        jsonschema.validate(call.parsed, POINT)
    assert called.tool_calls
    free = ask(untrained, tools=tools, logit_bias={opening or 0: -math.inf}, max_tokens=20)
    assert (
        free.tokens == ask(untrained, max_tokens=20).tokens or free.prompt_tokens != ask(untrained, max_tokens=20).prompt_tokens
    )


# ---- where no call is allowed ----


def test_no_tools_and_no_choice_ban_calls(untrained: Model) -> None:
    opening = untrained.tokenizer.id_of("<|tool_call>")
    assert opening is not None
    tools = [tool("f", {})]
    for options in ({}, {"tools": tools, "tool_choice": "none"}, {"tools": tools, "tool_choice": {"names": []}}):
        assert opening in untrained.prepare(QUESTION, **options).request.sampling.suppress
        assert opening not in ask(untrained, logits_processors=[Forced(opening)], max_tokens=4, **options).tokens
    assert opening not in untrained.prepare(QUESTION, tools=tools).request.sampling.suppress


def test_raw_prompts_are_left_free(untrained: Model) -> None:
    opening = untrained.tokenizer.id_of("<|tool_call>")
    for prompt in ("Raw text", [2, 100, 101]):
        assert opening not in untrained.prepare(prompt).request.sampling.suppress
        assert opening in untrained.prepare(prompt, tool_choice="none").request.sampling.suppress
        held = untrained.stream(prompt, constraint=YES_NO, temperature=1.5, seed=3).finish()
        assert held.text in ("yes", "no")


def test_a_ban_changes_no_other_choice(trained: Model) -> None:
    ids = trained.encode(QUESTION)
    free = trained.generate([ids], max_tokens=40)[0]
    assert trained.chat(QUESTION, max_tokens=40).tokens == free.tokens


# ---- thoughts ----


def channel(model: Model, name: str) -> int:
    found = model.tokenizer.id_of(name)
    assert found is not None
    return found


def budget(model: Model, tokens: int) -> ThinkingBudget:
    return ThinkingBudget(tokens, channel(model, "<|channel>"), channel(model, "<channel|>"))


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_a_thought_is_free_and_its_budget_holds(untrained: Model, tokens: int) -> None:
    forced, limit = Forced(channel(untrained, "<|channel>"), 300, 301), budget(untrained, tokens)
    for form in ({"constraint": YES_NO}, {"tools": [tool("f", {})], "tool_choice": "required", "parallel_tool_calls": False}):
        found = ask(untrained, enable_thinking=True, logits_processors=[forced, limit], **form)
        assert found.reasoning_tokens == tokens
        assert found.text in ("yes", "no") if "constraint" in form else len(found.tool_calls) == 1
        assert found.finish_reason == "stop"


def test_without_thinking_a_channel_stays_empty(untrained: Model) -> None:
    forced = Forced(channel(untrained, "<|channel>"), 300, 301, 302)
    found = ask(untrained, constraint=YES_NO, logits_processors=[forced])
    assert found.tokens[0] == channel(untrained, "<|channel>")
    assert (found.reasoning, found.text in ("yes", "no")) == ("", True)


def test_a_prompt_that_ends_in_a_thought(untrained: Model) -> None:
    opening, closing = channel(untrained, "<|channel>"), channel(untrained, "<channel|>")
    prompt = [*untrained.encode(QUESTION), opening, *untrained.tokenizer.encode_plain("thought\n")]
    found = untrained.stream(prompt, constraint=YES_NO, logits_processors=[Forced(300, 301, closing)]).finish()
    assert (found.reasoning != "", found.text in ("yes", "no")) == (True, True)
    closed = untrained.stream([*prompt, closing], constraint=YES_NO, logits_processors=[Forced(opening)]).finish()
    assert (closed.reasoning, closed.text in ("yes", "no")) == ("", True)


def test_no_reply_ends_within_a_thought(untrained: Model) -> None:
    forced = Forced(channel(untrained, "<|channel>"), 300, min(untrained.defaults.stop_ids))
    options = {"enable_thinking": True, "max_tokens": 6, "stop_token_ids": [1 << 20]}
    found = ask(untrained, constraint=YES_NO, logits_processors=[forced], **options)
    assert len(found.tokens) == 6


# ---- beside other options ----


def test_the_end_of_a_grammar_wins_over_min_tokens(untrained: Model) -> None:
    found = ask(untrained, constraint=YES_NO, min_tokens=40)
    assert (found.text in ("yes", "no"), found.finish_reason) == (True, "stop")
    longer = ask(untrained, constraint=Constraint("regex", "a{1,60}"), min_tokens=10)
    assert len(longer.tokens) >= 10


@pytest.mark.parametrize(
    ("options", "reason", "text"),
    [
        ({"stop": ["b"]}, "stop", "aaa"),
        ({"max_tokens": 2}, "length", None),
        ({"watchdog": True}, "stop", "aaabaaa"),
        ({"logprobs": 2}, "stop", "aaabaaa"),
    ],
)
def test_other_ends(untrained: Model, options: dict[str, Any], reason: str, text: str | None) -> None:
    bans = {"logit_bias": {channel(untrained, "<|channel>"): -math.inf}}
    found = ask(untrained, constraint=Constraint("regex", "a{3}ba{3}"), **bans, **options)
    assert found.finish_reason == reason
    assert "aaabaaa".startswith(found.text) if text is None else found.text == text


def test_log_probabilities_are_the_models_own(untrained: Model) -> None:
    held, free = (ask(untrained, logprobs=2, constraint=form, max_tokens=1).logprobs[0] for form in (YES_NO, None))
    assert held.top == free.top  # which the grammar forbids
    assert held.token not in [token for token, _ in held.top]


def test_a_reply_that_goes_round_in_circles_ends(untrained: Model) -> None:
    found = ask(untrained, constraint=Constraint("regex", "( ){400,}"), watchdog=True, max_tokens=400)
    assert found.finish_reason == "repetition"


def test_requests_share_a_grammar_but_no_state(untrained: Model) -> None:
    prepared = untrained.prepare(QUESTION, constraint=Constraint("choice", ("abc", "xyz")), temperature=3.0)
    texts = [stream.finish().text for stream in untrained.submit_many([prepared] * 6)]
    assert set(texts) <= {"abc", "xyz"}


def test_a_grammar_that_can_not_go_on_ends_its_own_request_alone(untrained: Model) -> None:
    bad = untrained.prepare(QUESTION, constraint=Constraint("regex", "(a{1000}){1000}"), max_tokens=8)
    gone = untrained.prepare(QUESTION, constraint=YES_NO, suppress=tuple(range(100, 4096)), max_tokens=8)
    good = untrained.prepare(QUESTION, constraint=YES_NO)
    streams = untrained.submit_many([bad, good, gone])
    with pytest.raises(RequestError, match=r"constraint \(regex\): the reply can't go on"):
        streams[0].finish()
    with pytest.raises(RequestError, match="no token is left"):
        streams[2].finish()
    assert streams[1].finish().text in ("yes", "no")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        (Constraint("json_schema", '{"not": {}}'), r"constraint \(json_schema\): .*not"),
        (Constraint("json_schema", "{"), "constraint: .*not valid JSON"),
        (Constraint("json_schema", "[]"), "constraint: a JSON schema is an object"),
        (Constraint("json_schema", '{"a":' * 400 + "1" + "}" * 400), "constraint"),
        (Constraint("json_schema", " " * (1 << 20)), "1,048,576 characters"),
        (Constraint("json_schema", '{"type":"integer","minimum":3,"maximum":1}'), "minimum"),
        (Constraint("json_schema", '{"$ref":"https://example.com/a"}'), "example.com"),
        (Constraint("regex", "("), "constraint .regex.: .*unclosed group"),
        (Constraint("regex", "a(?=b)"), "look-ahead"),
        (Constraint("choice", ()), "constraint: a choice"),
        (Constraint("choice", "yes"), "constraint: a choice"),
        (Constraint("lark", "start: nothing"), "constraint .lark.: unknown name"),
        (Constraint("lark", 'start: start "a"'), "no text that it accepts"),
        (Constraint("xml", "a"), "constraint: expected one of json_schema"),  # type: ignore[arg-type]
        ({"type": "object"}, "constraint: expected a Constraint"),
    ],
)
def test_bad_constraints_are_refused(untrained: Model, constraint: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        untrained.prepare(QUESTION, constraint=constraint)


@pytest.mark.parametrize("choice", ["any", {"name": "h"}, {"names": "f"}, {"names": [["f"]]}, 3, None])
def test_bad_choices_are_refused(untrained: Model, choice: Any) -> None:
    with pytest.raises(RequestError, match="tool_choice: "):
        untrained.prepare(QUESTION, tools=[tool("f", {})], tool_choice=choice)


def test_a_call_can_not_be_required_without_tools(untrained: Model) -> None:
    with pytest.raises(RequestError, match="tool_choice: a call is required"):
        untrained.prepare(QUESTION, tool_choice="required")
    with pytest.raises(RequestError, match="ignore_eos"):
        untrained.prepare(QUESTION, constraint=YES_NO, ignore_eos=True)


def test_what_can_not_be_held_to_is_refused_or_told(untrained: Model, caplog: pytest.LogCaptureFixture) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x(?=y)"}}, "required": ["a"]}
    with pytest.raises(RequestError, match="tools: f: pattern"):
        untrained.prepare(QUESTION, tools=[tool("f", odd, strict=True)])
    lenient = Constraint("json_schema", '{"type": "object", "propertyNames": {}}', strict=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            untrained.prepare(QUESTION, tools=[tool("f", odd)])
            untrained.prepare(QUESTION, constraint=lenient)
    assert [record.message for record in caplog.records] == [
        "tools: f: pattern 'x(?=y)' is not held to",
        'constraint (json_schema): Unimplemented keys: ["propertyNames"]',
    ]


def test_without_the_library_only_what_needs_it_fails(untrained: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install gemcutter\[serve\]"):
        untrained.prepare(QUESTION, constraint=Constraint("choice", ("never seen",)))
    with pytest.raises(RequestError, match=r"pip install gemcutter\[serve\]"):
        untrained.prepare(QUESTION, tools=[tool("unseen", {})], tool_choice="required")
    assert untrained.prepare(QUESTION, tools=[tool("unseen", {})]).request.logits_processors == ()


# ---- the command line ----


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    from gemcutter.cli import main

    code = main(["run", "demo", "Go on.", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line_takes_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema, lark, tools = tmp_path / "schema.json", tmp_path / "form.lark", tmp_path / "tools.json"
    schema.write_text(json.dumps(POINT))
    lark.write_text('start: "x" /[0-9]{2}/')
    tools.write_text(json.dumps([{"name": "f", "parameters": POINT}, {"name": "g"}]))
    jsonschema.validate(json.loads(run(capsys, "--json-schema", str(schema))[1]), POINT)
    assert run(capsys, "--choice", "one", "--choice", "two")[1].strip() in ("one", "two")
    assert run(capsys, "--regex", "[0-9]{3}")[1].strip().isdecimal()
    assert run(capsys, "--grammar", str(lark))[1].startswith("x")
    for choice in ("required", "f"):
        code, out, _ = run(capsys, "--tools", str(tools), "--tool-choice", choice, "-n", "200")
        assert code == 0
        assert json.loads(out.splitlines()[0])["name"] in ("f", "g")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--regex", "a", "--choice", "b"), "--regex and --choice"),
        (("--tool-choice", "none"), "give both"),
        (("--json-schema", "absent.json"), "absent.json"),
        (("--regex", "("), "unclosed group"),
    ],
)
def test_the_command_line_refuses(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *words)
    assert code != 0
    assert told in err


def test_an_observer_that_fails_ends_its_own_request(untrained: Model) -> None:
    class Broken:
        def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
            return logits_V

        def for_sequence(self) -> Broken:
            return self

        def observe(self, reply: Sequence[int]) -> None:
            raise ValueError("broken observer")

    other = untrained.prepare(QUESTION, max_tokens=4)
    streams = untrained.submit_many([untrained.prepare(QUESTION, logits_processors=[Broken()], max_tokens=4), other])
    with pytest.raises(Exception, match="broken observer"):
        streams[0].finish()
    assert len(streams[1].finish().tokens) == 4
