"""Chat templates: golden prompts, what a conversation may hold, and foreign templates that misbehave."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from gemcutter.errors import CheckpointError, RequestError
from gemcutter.text import chat as module
from gemcutter.text.chat import ChatTemplate
from gemcutter.text.history import check_messages
from gemcutter.text.tokenizer import Tokenizer
from tests.real_tokenizer import golden_chats, real_template, real_tokenizer

DEMO = Path(module.__file__).resolve().parents[1] / "demo"
TOKENIZER = Tokenizer.load(DEMO)
CANONICAL = {"large": "large.canonical-2026-07-09", "e-series": "e-series.canonical-2026-07-09"}
HELLO = [{"role": "user", "content": "Hello"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, TOKENIZER, origin="some.jinja")


def call(arguments: object) -> list[dict[str, Any]]:
    """Return a conversation that ends in a tool call with these arguments."""
    tool_call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": [tool_call]}]


def test_demo_template_renders_and_encodes() -> None:
    chat = ChatTemplate.find(DEMO, TOKENIZER)
    assert chat is not None
    parts = [{"type": "text", "text": " Hello "}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": parts}]
    prompt = chat.render(messages)
    assert prompt == "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHello<turn|>\n<|turn>model\n"
    ids = chat.encode(messages)
    assert ids == TOKENIZER.encode(prompt, bos=False)
    assert ids.count(TOKENIZER.bos_id) == 1
    assert chat.render(HELLO, enable_thinking=True, add_generation_prompt=False) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHello<turn|>\n"
    )


@pytest.mark.parametrize("source", ["{{ bos_token }}hi", "hi"])
def test_encode_gives_exactly_one_bos(source: str) -> None:
    assert template(source).encode(HELLO) == TOKENIZER.encode("hi", bos=True)


@pytest.mark.parametrize("size", CANONICAL)
@pytest.mark.parametrize("index", range(16))
def test_golden_prompts(size: str, index: int) -> None:
    golden = golden_chats()[index]
    chat = real_template(CANONICAL[size])
    prompt = golden[size]
    assert chat.render(**golden["input"]) == prompt
    ids = chat.encode(**golden["input"])
    tokenizer = real_tokenizer()
    assert ids == tokenizer.encode(prompt, bos=False)
    assert tokenizer.decode(ids, special=True) == prompt
    for id in tokenizer.special_ids:
        assert ids.count(id) == prompt.count(tokenizer.piece(id))


def test_golden_prompts_are_all_there() -> None:
    assert len(golden_chats()) == 16


@pytest.mark.parametrize(
    ("name", "thinking", "cue"),
    [
        ("26B-A4B.launch", "<|think|>", "<|channel>thought\n<channel|>"),
        ("large.interleaved", "<|think|>\n", "<|channel>thought\n<channel|>"),
        ("large.newer", "<|think|>\n", "<|channel>thought\n<channel|>"),
        ("large.canonical-2026-07-09", "<|think|>\n", "<|channel>thought\n<channel|>"),
        ("e-series.canonical-2026-07-09", "<|think|>\n", ""),
    ],
)
def test_every_generation_of_template_renders(name: str, thinking: str, cue: str) -> None:
    chat = real_template(name)
    reply = {"role": "assistant", "content": "<|channel>thought\nHm.\n<channel|> Hi! "}
    messages = [{"role": "system", "content": "Be brief."}, *HELLO, reply, {"role": "user", "content": "Again"}]
    turns = "<|turn>user\nHello<turn|>\n<|turn>model\nHi!<turn|>\n<|turn>user\nAgain<turn|>\n<|turn>model\n"
    assert chat.render(messages) == f"<bos><|turn>system\nBe brief.<turn|>\n{turns}{cue}"
    assert chat.render(messages, enable_thinking=True) == f"<bos><|turn>system\n{thinking}Be brief.<turn|>\n{turns}"


@pytest.mark.parametrize("name", ["26B-A4B.launch", "large.interleaved", "large.newer", "large.canonical-2026-07-09"])
def test_tool_call_arguments_look_the_same_in_every_generation(name: str) -> None:
    chat = real_template(name)
    arguments = {"city": "Oslo", "days": [1, 2], "unit": None, "opt": {"x": True, "y": None}}
    expected = '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:[1,2],opt:{x:true,y:null},unit:null}<tool_call|>'
    assert expected in chat.render(call(arguments))
    assert chat.render(call(json.dumps(arguments))) == chat.render(call(arguments))
    assert "call:get_weather{}<tool_call|>" in chat.render(call(""))
    assert "call:get_weather{}<tool_call|>" in chat.render(call(None))


def test_messages_are_not_changed() -> None:
    messages = call('{"city": "Oslo"}')
    before = copy.deepcopy(messages)
    checked = check_messages(messages)
    assert messages == before
    assert checked[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert checked[1]["content"] == ""


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"messages: expected a non-empty list of objects, found a list"),
        ("hi", r"messages: expected a non-empty list of objects, found 'hi'"),
        ({"role": "user"}, r"messages: expected a non-empty list of objects, found a dict"),
        (["hi"], r"messages\[0\]: expected an object with role and content, found 'hi'"),
        ([{"content": "hi"}], r"messages\[0\]\.role: expected one of system, .*, found nothing"),
        ([{"role": "usr", "content": "hi"}], r"messages\[0\]\.role: .*found 'usr'"),
        ([{"role": ["user"], "content": "hi"}], r"messages\[0\]\.role: .*found a list"),
        ([{"role": "user"}], r"messages\[0\]\.content: expected a string or a list of parts, found nothing"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: .*found 5"),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\]\.content\[0\]\.type: expected one of text, .*, found nothing"),
        ([{"role": "user", "content": [{"type": "smell"}]}], r"messages\[0\]\.content\[0\]\.type: .*found 'smell'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text: expected a string"),
        ([{"role": "assistant", "content": "", "reasoning": 1}], r"messages\[0\]\.reasoning: expected a string, found 1"),
        ([{"role": "assistant", "tool_calls": "x"}], r"messages\[0\]\.tool_calls: expected a list of calls, found 'x'"),
        ([{"role": "assistant", "tool_calls": ["x"]}], r"messages\[0\]\.tool_calls\[0\]\.function: .*found nothing"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], r"messages\[0\]\.tool_calls\[0\]\.function: .*found a dict"),
        (call(5), r"messages\[1\]\.tool_calls\[0\]\.function\.arguments: expected an object or its JSON text, found 5"),
    ],
)
def test_malformed_messages_are_named(messages: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        template("x").render(messages)


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ({"name": "f"}, r"tools: expected a list of function declarations, found a dict"),
        (["f"], r"tools\[0\]\.function: expected an object with a name, found nothing"),
        ([{"type": "function", "function": {"name": 3}}], r"tools\[0\]\.function: expected an object with a name, found a dict"),
    ],
)
def test_malformed_tools_are_named(tools: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        template("{{ tools }}").render(HELLO, tools=tools)


def test_all_problems_come_at_once() -> None:
    messages = [{"role": "usr", "content": 1}, *call(1)]
    with pytest.raises(RequestError) as caught:
        template("{{ tools }}").render(messages, tools=[{}])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "messages[0].role",
        "messages[0].content",
        "messages[2].tool_calls[0].function.arguments",
        "tools[0].function",
    ]


def test_reasoning_or_tool_responses_stand_in_for_content() -> None:
    checked = check_messages(
        [{"role": "assistant", "reasoning": "Hm."}, {"role": "model", "content": None, "tool_responses": [{"name": "f"}]}]
    )
    assert [message["content"] for message in checked] == ["", ""]


def test_variables_that_templates_rely_on() -> None:
    source = "{{ bos_token }}{{ eot_token }}{{ [enable_thinking, add_generation_prompt, tools is none] | tojson }}{{ mood }}"
    assert template(source).render(HELLO, mood="calm") == "<bos><turn|>[false, true, true]calm"
    assert template(source).render(HELLO, eot_token="END", mood="") == "<bos>END[false, true, true]"


def test_tojson_escapes_neither_html_nor_unicode() -> None:
    content = "<b>'é' & \"x\""
    assert template("{{ messages[0].content | tojson }}").render([{"role": "user", "content": content}]) == json.dumps(
        content, ensure_ascii=False
    )
    assert template("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}").render(HELLO) == '{\n "a": 2,\n "b": 1\n}'


def test_strftime_loop_controls_and_block_trimming() -> None:
    assert template("{{ strftime_now('%Y') }}").render(HELLO) == str(datetime.datetime.now().year)
    source = "{% for i in range(9) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}\n"
    assert template(source).render(HELLO) == "0\n1\n"


def test_options_that_the_template_ignores_are_refused() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(RequestError) as caught:
        template("x").render(HELLO, tools=[tool], enable_thinking=True, preserve_thinking=True)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["tools", "enable_thinking", "preserve_thinking"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("line one\n{% if %}", r"some\.jinja:2: the chat template is not valid Jinja"),
        ("\n\n{{ x | no_such_filter }}", r"some\.jinja:3: .*no_such_filter"),
        ("{% for m in messages %}", r"some\.jinja:1: "),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", r"some\.jinja: the chat template can't be compiled: RecursionError"),
        ("{% for a in b %}" * 50 + "{% endfor %}" * 50, r"some\.jinja: the chat template can't be compiled: SyntaxError"),
    ],
)
def test_templates_that_do_not_compile(source: str, found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        template(source)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"some\.jinja: .*failed on this conversation: roles must alternate$"),
        ("{{ messages.missing.field }}", r"has no attribute 'missing'"),
        ("{{ ''.__class__.__mro__[1] }}", r"unsafe"),
        ("{{ messages.append(1) }}", r"unsafe"),
        ("{{ messages[0].update(role='x') }}", r"unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", r"OverflowError"),
        ("{{ 'a' + none }}", r"TypeError"),
        ("{{ 1 / 0 }}", r"ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"RecursionError"),
        ("{% include 'other' %}", r"no loader"),
    ],
)
def test_templates_that_fail_while_rendering(source: str, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        template(source).render(HELLO)


def test_find_prefers_the_file_of_its_own(tmp_path: Path) -> None:
    assert ChatTemplate.find(tmp_path, TOKENIZER) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config"}')
    assert found_in(tmp_path) == "config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert found_in(tmp_path) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja é", encoding="utf-8")
    assert found_in(tmp_path) == "jinja é"


@pytest.mark.parametrize(
    ("entry", "prompt"),
    [
        ("text", "text"),
        ([{"name": "rag", "template": "other"}, {"name": "default", "template": "chosen"}], "chosen"),
        ([{"name": ["odd"], "template": "only"}], "only"),
        (None, None),
    ],
)
def test_find_reads_every_spelling_of_the_config(tmp_path: Path, entry: object, prompt: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    assert found_in(tmp_path) == prompt


def found_in(folder: Path) -> str | None:
    chat = ChatTemplate.find(folder, TOKENIZER)
    return None if chat is None else chat.render(HELLO)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja can't be read"),
        ("chat_template.jinja", b"a\n{% if", r"chat_template\.jinja:2: "),
        ("chat_template.json", b"{", r"chat_template\.json can't be read"),
        ("chat_template.json", b"[]", r"chat_template\.json can't be read \(the file holds \[\] .*, not a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 5}', r"tokenizer_config\.json: chat_template is 5, expected"),
        ("tokenizer_config.json", b'{"chat_template": []}', r"tokenizer_config\.json: chat_template is a list, expected"),
        ("tokenizer_config.json", b'{"chat_template": "{% if"}', r"tokenizer_config\.json\[chat_template\]:1: "),
    ],
)
def test_find_names_damaged_files(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=found):
        ChatTemplate.find(tmp_path, TOKENIZER)
