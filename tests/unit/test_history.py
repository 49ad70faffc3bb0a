"""Conversations as clients send them: repaired where that is possible, named where it is not, printed in the order of events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemcutter.errors import RequestError
from gemcutter.text import chat
from gemcutter.text.canonical import LARGE, canonical_template
from gemcutter.text.history import NO_RESULT, check_messages, in_order, without_thoughts
from gemcutter.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(chat.__file__).resolve().parents[1] / "demo")
TEMPLATE = canonical_template(LARGE, TOKENIZER)
ASK: dict[str, Any] = {"role": "user", "content": "Go"}
Q = '<|"|>'
START = "<bos><|turn>user\nGo<turn|>\n<|turn>model\n"


def call(name: str, arguments: Any = "{}", id: str | None = None, **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **({} if id is None else {"id": id}), **more}


def model(*calls: dict[str, Any], content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def result(content: Any, id: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **({} if id is None else {"tool_call_id": id}), **more}


def printed(*messages: dict[str, Any], **options: Any) -> str:
    """Return what the canonical template prints after the user's turn."""
    prompt = TEMPLATE.render([ASK, *messages], **options)
    assert prompt.startswith(START)
    return prompt.removeprefix(START).replace(Q, "'")


def response(name: str, text: str) -> str:
    return f"<|tool_response>response:{name}{{value:'{text}'}}<tool_response|>"


CALL_F, CALL_G = "<|tool_call>call:f{}<tool_call|>", "<|tool_call>call:g{}<tool_call|>"


def test_an_answer_beside_calls_is_printed_before_them_and_the_turn_stays_open() -> None:
    turn = model(call("f", id="a"), content=" Let me see. ", reasoning="Hm.")
    found = printed(turn, result("1", "a"))
    assert found == f"<|channel>thought\nHm.\n<channel|>Let me see.{CALL_F}{response('f', '1')}"
    done = printed(turn, result("1", "a"), {"role": "assistant", "content": "One."}, {"role": "user", "content": "Thanks"})
    assert done.startswith(f"Let me see.{CALL_F}{response('f', '1')}One.<turn|>\n<|turn>user\nThanks<turn|>\n")


def test_an_answer_stays_beside_its_calls_where_turns_are_not_joined() -> None:
    turn = model(call("f"), content="Let me see.")
    assert len(in_order(check_messages([ASK, turn]), joins_turns=lambda: False)) == 2
    assert len(in_order(check_messages([ASK, turn]), joins_turns=lambda: True)) == 3


def test_calls_without_results_wait_for_them_at_the_end_only() -> None:
    assert printed(model(call("f"))) == f"{CALL_F}<|tool_response>"
    assert printed(model(call("f", id="a"), call("g", id="b")), result("1", "a")) == (
        f"{CALL_F}{CALL_G}{response('f', '1')}{response('g', NO_RESULT)}"
    )
    interrupted = printed(model(call("f")), {"role": "user", "content": "Stop"})
    assert interrupted.startswith(f"{CALL_F}{response('f', NO_RESULT)}<turn|>\n<|turn>user\nStop<turn|>\n")


@pytest.mark.parametrize(
    "results",
    [
        [result("2", "b"), result("1", "a")],
        [result("2", name="g"), result("1", name="f")],
        [result("2", name="g"), result("1")],
        [result("1"), result("2")],
        [result("1", "lost"), result("2", "b")],
        [{"role": "function", "name": "g", "content": "2"}, {"role": "function", "name": "f", "content": "1"}],
    ],
)
def test_results_are_those_of_their_calls(results: list[dict[str, Any]]) -> None:
    found = printed(model(call("f", id="a"), call("g", id="b")), *results)
    assert found == f"{CALL_F}{CALL_G}{response('f', '1')}{response('g', '2')}"


def test_calls_of_one_id_keep_their_names() -> None:
    found = printed(model(call("f", id="x"), call("g", id="x")), result("1", "x"), result("2", "x"))
    assert found == f"{CALL_F}{CALL_G}{response('f', '1')}{response('g', '2')}"


def test_a_result_of_no_call_keeps_its_name() -> None:
    found = printed(model(call("f", id="a")), result("1", "a"), result("2", "b", name="h"), result("3", "c"))
    assert found == f"{CALL_F}{response('f', '1')}{response('h', '2')}{response('unknown', '3')}"


def test_a_result_without_any_call_is_named() -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]: a tool's result, but no message with tool_calls is before it"):
        TEMPLATE.render([ASK, result("1", "a")])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("", "{}"),
        (None, "{}"),
        ({}, "{}"),
        ({"x": None}, "{x:null}"),
        ('{"x": 1}', "{x:1}"),
        ("{x: 1", "{arguments:'{x: 1'}"),
        ("[1]", "{arguments:'[1]'}"),
        ("[" * 100_000, f"{{arguments:'{'[' * 100_000}'}}"),
    ],
)
def test_arguments_in_every_spelling(arguments: Any, shown: str) -> None:
    for kind in ({}, {"type": ""}, {"type": "function"}):
        assert printed(model(call("f", arguments, **kind))) == f"<|tool_call>call:f{shown}<tool_call|><|tool_response>"


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (None, ""),
        ("", ""),
        ("text", "text"),
        ({"a": [1, "é"]}, '{"a": [1, "é"]}'),
        ([1, 2], "[1, 2]"),
        ([], "[]"),
        (5, "5"),
        (False, "false"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_results_in_every_spelling(content: Any, shown: str) -> None:
    assert printed(model(call("f", id="a")), result(content, "a")) == CALL_F + response("f", shown)


def test_what_no_json_can_hold_is_named() -> None:
    circular: dict[str, Any] = {}
    circular["x"] = circular
    with pytest.raises(RequestError, match=r"messages\[2\]\.content: expected a text, parts, or what can be JSON, found a dict"):
        TEMPLATE.render([ASK, model(call("f", id="a")), result(circular, "a")])


def test_the_model_may_have_said_nothing() -> None:
    for content in (None, "", []):
        assert TEMPLATE.render([ASK, {"role": "assistant", "content": content}, ASK]).count("<|turn>model\n<turn|>\n") == 1


def test_system_messages_stay_where_they_are() -> None:
    first = {"role": "developer", "content": "Be brief."}
    later = [{"role": role, "content": f"Now {role}."} for role in ("system", "developer")]
    found = TEMPLATE.render([first, ASK, *later, ASK])
    turns = "".join(f"<|turn>system\nNow {role}.<turn|>\n" for role in ("system", "developer"))
    assert f"<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nGo<turn|>\n{turns}<|turn>user\nGo<turn|>\n" in found


def test_either_spelling_of_reasoning_is_replayed_within_a_loop() -> None:
    for field in ("reasoning", "reasoning_content"):
        found = printed(model(call("f", id="a"), **{field: "Hm."}), result("1", "a"))
        assert found == f"<|channel>thought\nHm.\n<channel|>{CALL_F}{response('f', '1')}"


def test_thoughts_in_an_answer_are_left_out_and_talk_of_markers_is_not() -> None:
    assert without_thoughts("<|channel>thought\nHm.\n<channel|>Hi<|channel>thought\n<channel|>!") == "Hi!"
    for text in ("the marker <|channel> opens", "<channel|>", "<|channel>thought\nnever closed", "<|channel>final\nx<channel|>"):
        assert without_thoughts(text) == text
    assert len(without_thoughts("<|channel>thought\n" * 20_000)) == 20_000 * 18, "in linear time"


def test_a_native_conversation_stays_as_it_is() -> None:
    native = {"role": "model", "tool_calls": [call("f")], "tool_responses": [{"name": "f", "response": {"x": 1}}]}
    assert printed(native) == f"{CALL_F}<|tool_response>response:f{{x:1}}<tool_response|>"


def test_a_final_message_is_continued_as_it_is_written() -> None:
    messages = [ASK, {"role": "assistant", "content": "  One,\n two, \n"}]
    assert TEMPLATE.render(messages, continue_final_message=True) == f"{START}  One,\n two, \n"
    parts = [ASK, {"role": "assistant", "content": [{"type": "text", "text": " One"}, {"type": "text", "text": ", "}]}]
    assert TEMPLATE.render(parts, continue_final_message=True) == f"{START} One, "
    spelled = [ASK, {"role": "assistant", "content": "a <turn|> b"}]
    ids = TEMPLATE.encode(spelled, continue_final_message=True)
    assert TOKENIZER.decode(ids, special=True) == f"{START}a <turn|> b"
    assert ids.count(TOKENIZER.id_of("<turn|>") or -1) == 1
    thought = [ASK, {"role": "assistant", "content": "So", "reasoning": "Hm."}]
    assert TEMPLATE.render(thought, continue_final_message=True) == f"{START}<|channel>thought\nHm.\n<channel|>So"


@pytest.mark.parametrize("last", [ASK, model(call("f")), result("1", "a")])
def test_only_an_answer_can_be_continued(last: dict[str, Any]) -> None:
    before = [ASK, model(call("f", id="a"))] if last["role"] == "tool" else [ASK]
    with pytest.raises(RequestError, match=rf"messages\[{len(before)}\]: only a text of the assistant can be continued"):
        TEMPLATE.render([*before, last], continue_final_message=True)


def test_messages_are_not_changed() -> None:
    messages = [ASK, model(call("f", '{"x": 1}'), content="a<|channel>thought\n<channel|>"), result({"y": 2})]
    before = json.dumps(messages)
    TEMPLATE.render([*messages, {"role": "assistant", "content": "b"}], continue_final_message=True)
    assert json.dumps(messages) == before
