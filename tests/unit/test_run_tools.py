"""Tools end to end: functions are declared, a scripted model calls them, results come back; in the API and on the command line.

The model is the demo with a template that prints tools, and a logits processor that makes it write what a script says.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import gemcutter
from gemcutter import Model, RequestError
from gemcutter.cli import main
from gemcutter.text.tool_calls import ToolCall
from gemcutter.tools import declare, run_tools

Q, CALL, END = '<|"|>', "<|tool_call>", "<tool_call|>"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}"
    "{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' }}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}{{ c['function']['arguments'] }}{% endfor %}"
    "{{ '<turn|>\n' }}{% endfor %}{{ '<|turn>model\n' }}"
)
DECLARED = {"name": "ask_me", "description": "Ask.", "inputSchema": {"type": "object", "properties": {"n": {"type": "integer"}}}}
SOURCE = '''
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


def _hidden() -> None: ...
'''


class Script:
    """Makes a model write texts, one a reply, and remembers the prompts."""

    def __init__(self, model: Model, *texts: str) -> None:
        self.model, self.prompts = model, list[str]()
        self._replies = iter([[*model.tokenizer.encode(text, bos=False), model.tokenizer.id_of("<turn|>")] for text in texts])
        self._ids = list[int | None]()

    def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        if not reply:
            self._ids = next(self._replies)
            self.prompts.append(self.model.tokenizer.decode(prompt, special=True))
        forced = torch.full_like(logits_V, float("-inf"))
        forced[self._ids[len(reply)]] = 0.0
        return forced


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("models") / "tools"
    shutil.copytree(Path(gemcutter.__file__).parent / "demo", copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with gemcutter.load(folder) as loaded:
        yield loaded


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes every model of the process write texts."""
    original = Model.stream

    def write(*texts: str) -> list[Script]:
        scripts = list[Script]()

        def stream(self: Model, prompt: Any, **options: Any) -> Any:
            scripts[:] = scripts or [Script(self, *texts)]
            return original(self, prompt, **options, logits_processors=[scripts[0]])

        monkeypatch.setattr(Model, "stream", stream)
        return scripts

    return write


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Whole ones only.

    Args:
        a: The first one,
            which is needed.
        b (int): The second one.

    Returns:
        The sum.
    """
    return a + b


def fail(text: str | None, kind: Literal["a", "b"], more: list[dict[str, float]], any_way: bool | int = False) -> str:
    """:param text: what to say"""
    raise ValueError(text)


def test_functions_are_declared_by_signature_and_docstring() -> None:
    assert declare(add) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.\n\nWhole ones only.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "The first one, which is needed."},
                    "b": {"type": "integer", "description": "The second one."},
                },
                "required": ["a"],
            },
        },
    }
    function: Any = declare(fail)["function"]
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "text": {"type": "string", "nullable": True, "description": "what to say"},
            "kind": {"type": "string", "enum": ["a", "b"]},
            "more": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "number"}}},
            "any_way": {"anyOf": [{"type": "boolean"}, {"type": "integer"}]},
        },
        "required": ["text", "kind", "more"],
    }


def test_what_can_not_be_declared_is_named() -> None:
    def odd(*many: int, path: Path, other: int) -> None: ...

    with pytest.raises(RequestError, match=r"tool odd can't be declared\n +odd\(many\): .*\n +odd\(path\): no JSON schema"):
        declare(odd)
    with pytest.raises(RequestError, match="expected a function that has a name"):
        declare(lambda: None)
    with pytest.raises(RequestError, match="expected a function that has a name"):
        declare(Path)


def test_a_completion_brings_calls(model: Model) -> None:
    text = f"<|channel>thought\nHm.<channel|>Adding. {CALL}call:add{{a:2,b:{Q}3{Q}}}{END}{CALL}call:add{{a:1}}{END}"
    found = model.chat("Add.", tools=[add], logits_processors=[Script(model, text)])
    assert (found.text, found.reasoning, found.finish_reason) == ("Adding.", "Hm.", "stop")
    assert found.tool_calls == (ToolCall("add", '{"a":2,"b":3}'), ToolCall("add", '{"a":1}'))
    assert found.tool_calls[0].parsed == {"a": 2, "b": 3}
    assert found.reasoning_tokens == len(model.tokenizer.encode("thought\nHm.", bos=False))
    chunks = list(model.stream([{"role": "user", "content": "Add."}], tools=[add], logits_processors=[Script(model, text)]))
    calls = [chunk for chunk in chunks if chunk.kind == "tool_call"]
    assert [(chunk.index, chunk.name) for chunk in calls if chunk.name] == [(0, "add"), (1, "add")]
    assert "".join(chunk.text for chunk in calls if chunk.index == 0) == '{"a":2,"b":3}'
    assert chunks[-1].completion is not None
    assert chunks[-1].completion.tool_calls == found.tool_calls


def test_a_single_call_ends_the_reply_and_its_request(model: Model) -> None:
    script = Script(model, f"{CALL}call:add{{a:1}}{END}" * 20)
    found = model.chat("Add.", tools=[add], parallel_tool_calls=False, logits_processors=[script])
    assert (len(found.tool_calls), found.finish_reason) == (1, "stop")
    assert len(found.tokens) == len(model.tokenizer.encode(f"{CALL}call:add{{a:1}}{END}", bos=False))
    with pytest.raises(RequestError, match="parallel_tool_calls: expected True or False, found 1"):
        model.chat("Add.", parallel_tool_calls=1)  # type: ignore[arg-type]


def test_a_reply_that_is_cut_off_has_no_half_call(model: Model) -> None:
    script = Script(model, f"{CALL}call:add{{a:1,b:2}}{END}")
    found = model.chat("Add.", tools=[add], max_tokens=8, logits_processors=[script])
    assert (found.tool_calls, found.text, found.finish_reason) == ((), "", "length")


def test_the_loop_runs_tools_until_none_is_called(model: Model) -> None:
    calls = f"{CALL}call:add{{a:2,b:3}}{END}{CALL}call:fail{{text:{Q}no{Q}}}{END}{CALL}call:absent{{}}{END}"
    script = Script(model, f"First. {calls}", "It is 5.")
    found = run_tools(model, "Add 2 and 3.", [add, fail], logits_processors=[script])
    assert (found.text, found.tool_calls) == ("It is 5.", ())
    assert len(script.prompts) == 2
    for shown in ("add fail", "First.", "tool\n5<turn|>", "missing 2 required", "there is no tool absent; tools are: add, fail"):
        assert shown in script.prompts[1]


def test_the_loop_ends_after_its_rounds(model: Model) -> None:
    script = Script(model, *[f"{CALL}call:add{{a:1}}{END}"] * 3)
    found = run_tools(model, "Add.", [add], max_rounds=2, logits_processors=[script])
    assert [call.name for call in found.tool_calls] == ["add"]
    assert len(script.prompts) == 3


def test_run_prints_calls_as_lines(folder: Path, tmp_path: Path, scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tools.py"
    file.write_text(SOURCE)
    scripts = scripted(f"Adding.{CALL}call:add{{a:2}}{END}{CALL}call:add{{a:3}}{END}")
    assert main(["run", str(folder), "Add.", "--tools", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Adding.",
        '{"name": "add", "arguments": {"a": 2}}',
        '{"name": "add", "arguments": {"a": 3}}',
    ]
    assert "add <|turn>" in scripts[0].prompts[0]
    assert main(["run", str(folder), "Add.", "--raw", "--tools", str(file)]) == 2
    capsys.readouterr()
    scripted(f"{CALL}call:add{{a:2}}{END}")
    assert main(["run", str(folder), "Add.", "--tools", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tool_calls"] == [{"name": "add", "arguments": {"a": 2}}]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "5", "expected a JSON list of tools, found 5"),
        ("a.json", "[]", "no tools in it"),
        ("a.json", '[{"nome": 1}]', "a.json[0]: expected a declaration with a name"),
        ("a.py", "1 / 0", "the program failed: ZeroDivisionError"),
        ("a.py", "from json import dumps", "no tools in it"),
    ],
)
def test_files_without_tools_are_refused(
    name: str, content: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_text(content)
    assert main(["run", "demo", "Hi", "--tools", str(file)]) == 1
    assert problem in " ".join(capsys.readouterr().err.split())


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, lines: Sequence[str]) -> Any:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8"))
    assert main(["chat", *words]) == 0
    return capsys.readouterr()


def test_chat_runs_functions(
    folder: Path, tmp_path: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.py").write_text(SOURCE)
    scripts = scripted(f"Wait.{CALL}call:add{{a:2,b:5}}{END}", "It is 7.")
    kept = tmp_path / "kept.json"
    words = (str(folder), "--tools", str(tmp_path / "tools.py"))
    shown = talk(monkeypatch, capsys, *words, lines=["Add 2 and 5.", f"/save {kept}"])
    assert shown.out.splitlines() == ["Wait.", "It is 7."]
    assert 'call add {"a":2,"b":5}' in shown.err
    assert "-> 7" in shown.err
    assert "tool\n7<turn|>" in scripts[0].prompts[1]
    messages: list[Mapping[str, Any]] = json.loads(kept.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]


def test_chat_asks_for_results_of_declared_tools(
    folder: Path, tmp_path: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([DECLARED]))
    scripts = scripted(f"{CALL}call:ask_me{{n:{Q}2{Q}}}{END}", "Thanks.")
    words = (str(folder), "--tools", str(tmp_path / "tools.json"))
    shown = talk(monkeypatch, capsys, *words, lines=["Ask me.", "forty-two"])
    assert shown.out.splitlines() == ["Thanks."]
    assert 'call ask_me {"n":2}' in shown.err
    assert "tool\nforty-two<turn|>" in scripts[0].prompts[1]


def test_parse_shows_what_is_made_of_raw_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, pieces, tools = (tmp_path / name for name in ("reply.txt", "reply.json", "tools.json"))
    text.write_text(f"Hm.\n<channel|>One moment.{CALL}call:ask_me{{n:{Q}2{Q}}}{END}<|tool_response>")
    pieces.write_text(json.dumps([f"Write {CALL}call:f{{a:{Q}", {"literal": Q}, "b"]))
    tools.write_text(json.dumps([DECLARED]))

    def parsed(*words: str) -> Any:
        assert main(["parse", "demo", *words]) == 0
        return json.loads(capsys.readouterr().out)

    call = {"name": "ask_me", "arguments": {"n": 2}}
    expected = {"reasoning": "Hm.", "content": "One moment.", "tool_calls": [call]}
    assert parsed(str(text), "--start", "thinking", "--tools", str(tools)) == expected
    assert parsed(str(text))["reasoning"] is None
    assert parsed(str(pieces))["tool_calls"] == [{"name": "f", "arguments": {"a": f"{Q}b"}}]
    assert parsed(str(pieces), "--finish", "length") == {"reasoning": None, "content": "Write", "tool_calls": []}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"[not a list"), encoding="utf-8"))
    assert parsed("-")["content"] == "[not a list"
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    shutil.copy(Path(gemcutter.__file__).parent / "demo" / "tokenizer.json", folder)
    assert main(["parse", str(folder), str(text)]) == 0
    pieces.write_text('["a", 5]')
    assert main(["parse", "demo", str(pieces)]) == 1
    assert 'expected a string or {"literal": TEXT}, found 5' in " ".join(capsys.readouterr().err.split())
