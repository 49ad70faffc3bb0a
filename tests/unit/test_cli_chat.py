"""`gemcutter chat`: turns over a pipe, commands, the cache, and interrupts that leave the session alive."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gemcutter.checkpoint.write.synth import write_checkpoint
from gemcutter.cli import main
from gemcutter.cli.chat import interruptible
from gemcutter.cli.conversation import Conversation
from gemcutter.cli.line_input import line_history
from gemcutter.cli.terminal import Answer
from gemcutter.engine.engine import Engine
from gemcutter.errors import RequestError


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that holds a chat with the demo over a pipe, and gives replies and notes."""

    def hold(*lines: str, words: tuple[str, ...] = ()) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8"))
        assert main(["chat", "demo", "-n", "12", *words]) == 0
        shown = capsys.readouterr()
        return shown.out.splitlines(), shown.err

    return hold


def saved(file: Path) -> list[dict[str, str]]:
    """Read a saved conversation."""
    found: list[dict[str, str]] = json.loads(file.read_text())
    return found


def test_a_later_turn_reuses_the_cache(talk: Any) -> None:
    replies, notes = talk("What is a lantern?", "", "And a lamp?")
    assert len(replies) == 2
    turns = [tuple(map(int, found)) for found in re.findall(r"prompt (\d+) tokens, (\d+) of them from the cache", notes)]
    assert turns[0][1] == 0
    assert turns[0][0] <= turns[1][1] < turns[1][0]
    assert len(re.findall(r"\d tokens/s", notes)) == 2


def test_a_saved_conversation_holds_every_turn_and_can_go_on(talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    replies, notes = talk("/system Be brief.", "Hi", "What is a lantern?", f"/save {file}")
    assert "saved 5 messages" in notes
    messages = saved(file)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "Be brief."
    assert [message["content"] for message in messages[2::2]] == replies
    again, notes = talk(f"/load {file}", "/undo", "What is a lantern?", f"/save {file}")
    assert again == replies[1:]
    assert saved(file) == messages


def test_commands_change_the_conversation(talk: Any, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    replies, notes = talk(
        "Hi", "/retry", f"/save {first}", "/undo", "/undo", "/retry", " /etc is what?", "/system", f"/save {second}", "/clear",
        f"/save {third}", "/exit", "never asked", words=("--system", "Be kind."),
    )  # fmt: skip
    assert len(replies) == 3
    assert replies[0] == replies[1]  # greedy
    assert [message["role"] for message in saved(first)] == ["system", "user", "assistant"]
    assert "last turn forgotten" in notes
    assert "there is no turn to forget" in notes
    assert "there is no question to answer anew" in notes
    assert [message["content"] for message in saved(second)] == ["/etc is what?", replies[2]]
    assert saved(third) == []


def test_a_retry_with_a_seed_says_something_else_and_repeats_itself(talk: Any) -> None:
    words = ("--temperature", "1.5", "--seed", "5")
    replies, _ = talk("What is a lantern?", "/retry", words=words)
    assert replies[0] != replies[1]
    assert talk("What is a lantern?", "/retry", words=words)[0] == replies


def test_thinking_can_be_switched(talk: Any, tmp_path: Path) -> None:
    _, plain = talk("Hi")
    _, thinking = talk("/think on", "Hi", "/think off", "/clear", "Hi")
    counts = [int(count) for count in re.findall(r"prompt (\d+) tokens", thinking)]
    assert counts[0] > counts[1] == int(re.findall(r"prompt (\d+) tokens", plain)[0])
    _, by_option = talk("Hi", words=("--think",))
    assert f"prompt {counts[0]} tokens" in by_option


@pytest.mark.parametrize("line", ["/foo", "/undo twice", "/think maybe", "/exit now", "/"])
def test_what_is_no_command_is_told_and_not_sent(line: str, talk: Any) -> None:
    replies, notes = talk(line)
    assert replies == []
    assert f"{line} is no command; /help lists them" in notes


@pytest.mark.parametrize(
    ("line", "usage"),
    [("/save", "FILE"), ("/load", "FILE"), ("/think", "on|off"), ("/set", "NAME VALUE"), ("/set temperature", "NAME VALUE")],
)
def test_a_command_without_its_argument_says_what_it_takes(line: str, usage: str, talk: Any) -> None:
    replies, notes = talk(line)
    assert replies == []
    assert f"{line.split()[0]} needs more: {line.split()[0]} {usage}" in notes


@pytest.mark.parametrize(
    "lines",
    [
        ('"""What is', "a lantern?", '"""'),
        ('"""', "What is", 'a lantern?"""'),
        ("What is\\", "a lantern?"),
        ('"""What is', "a lantern?"),  # the input ends before the block
    ],
)
def test_a_message_may_span_lines(lines: tuple[str, ...], talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    replies, _ = talk(*lines, *([] if lines[-1] == "a lantern?" and '"""What is' in lines else [f"/save {file}"]))
    assert len(replies) >= 1
    if file.exists():
        assert saved(file)[0]["content"] == "What is\na lantern?"


def test_a_block_on_one_line_and_one_that_looks_like_a_command(talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk('"""Hi"""', '"""/exit', 'is no command here"""', f"/save {file}")
    assert [message["content"] for message in saved(file)[::2]] == ["Hi", "/exit\nis no command here"]


def test_options_are_set_shown_and_taken_back(talk: Any) -> None:
    ask = "What is a lantern?"
    replies, notes = talk(
        ask, "/retry", "/set temperature 1.5", "/set seed 5", "/retry", "/set temperature default", "/retry",
        "/set max-tokens 2", "/retry", "/show", "/set top_k many", "/set top_p 7", "/set colour red",
        "/set max_tokens 0", "/set max_tokens default", "/show",
    )  # fmt: skip
    assert replies[0] == replies[1] == replies[3]
    assert replies[2] != replies[0]
    assert replies[0].startswith(replies[4])
    assert len(replies[4]) < len(replies[0])
    assert notes.count("so the reply will be the same; /set temperature 1 varies it") == 3
    assert "stopped at --max-tokens 12; /set max_tokens N changes it" in notes
    assert "temperature 1.5\n" in notes
    assert "temperature 0.0 (default)" in notes
    first, second = notes.split("max_tokens          ")[1:]
    assert first.startswith("2\n")
    assert second.startswith("1024\n")
    assert re.search(r"seed +5\n", notes)
    assert re.search(r"messages +2, \d+ of 32768 tokens", notes)
    assert "/set top_k: expected an integer, found 'many'" in notes
    assert "sampling.top_p: expected above 0, at most 1, found 7.0" in notes
    assert "/set colour: expected one of max_tokens, temperature" in notes
    assert "/set max_tokens: expected 1 or more, found 0" in notes


@pytest.mark.parametrize("line", ["/bye", "/quit", "/exit"])
def test_a_farewell_ends_the_session(line: str, talk: Any) -> None:
    assert talk(line, "never asked")[0] == []


@pytest.mark.parametrize("line", ["quit", "exit", "bye"])
def test_a_farewell_without_a_slash_is_not_sent(line: str, talk: Any) -> None:
    replies, notes = talk(line)
    assert replies == []
    assert "/exit or Ctrl-D leaves" in notes
    assert len(talk(f" {line}")[0]) == 1


def test_a_quiet_conversation_says_only_what_was_asked_for(talk: Any) -> None:
    replies, notes = talk("What is a lantern?", "/?", "/foo", words=("-q",))
    assert len(replies) == 1
    assert "tokens/s" not in notes
    assert "note:" not in notes
    assert "/foo is no command" in notes
    assert "\n  /set NAME VALUE" in notes


def test_a_conversation_with_a_picture_is_refused_when_it_is_loaded(talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]))
    replies, notes = talk(f"/load {file}", "Hi")
    assert "messages[0].content[0].type: a part of type 'image'" in notes
    assert len(replies) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_lines_that_are_pasted_at_once_are_one_message(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit knows no bracketed paste")
    import pty

    file = tmp_path / "talk.json"
    ours, theirs = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    command = [sys.executable, "-m", "gemcutter.cli", "chat", "demo", "-n", "4"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    shown = read_until(ours, b"> ")
    assert b"demo: bfloat16 on cpu" in shown
    assert b"context 32768 tokens" in shown
    os.write(ours, b"\x1b[200~def f():\n    return 1\n\n/exit\x1b[201~\r")
    read_until(ours, b"from the cache")
    os.write(ours, f"/save {file}\r/exit\r".encode())
    assert process.wait(60) == 0
    os.close(ours)
    assert [message["role"] for message in saved(file)] == ["user", "assistant"]
    assert saved(file)[0]["content"] == "def f():\n    return 1\n\n/exit"


def read_until(terminal: int, end: bytes) -> bytes:
    """Read what a terminal shows until it shows `end`."""
    shown = b""
    while end not in shown:
        shown += os.read(terminal, 4096)
    return shown


def test_help_lists_the_commands(talk: Any) -> None:
    _, notes = talk("/help")
    assert all(f"\n  {word}" in notes for word in ("/system", "/clear", "/undo", "/retry", "/save", "/load", "/think", "/exit"))


def test_errors_end_a_turn_and_not_the_session(talk: Any, tmp_path: Path) -> None:
    broken, file = tmp_path / "broken.json", tmp_path / "talk.json"
    broken.write_text('[{"role": "nobody", "content": "x"}]')
    replies, notes = talk(
        "/load /no/such/file", "/save /no/such/folder/file", f"/load {broken}", "long " * 60, "Hi", f"/save {file}",
        words=("--context", "48"),
    )  # fmt: skip
    assert "error: /no/such/file: No such file or directory" in notes
    assert "error: /no/such/folder/file: No such file or directory" in notes
    assert "messages[0].role" in notes
    assert "the context holds 48" in notes
    assert len(replies) == 1
    assert [message["content"] for message in saved(file)] == ["Hi", replies[0]]  # the long question is not in the way


def test_an_interrupt_keeps_the_partial_reply(talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write, calls = tmp_path / "talk.json", Answer.write, count()

    def write_or_interrupt(answer: Answer, text: str, *kind: Any) -> None:
        write(answer, text, *kind)
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    whole, _ = talk("What is a lantern?")
    monkeypatch.setattr(Answer, "write", write_or_interrupt)
    replies, notes = talk("What is a lantern?", "And a lamp?", f"/save {file}")
    assert "(interrupted)" in notes
    assert whole[0].startswith(replies[0])
    assert 0 < len(replies[0]) < len(whole[0])
    assert [message["content"] for message in saved(file)] == ["What is a lantern?", replies[0], "And a lamp?", replies[1]]
    (cached,) = re.findall(r"(\d+) of them from the cache", notes)  # of the second turn; the first one got no summary
    assert int(cached) > 10


def test_an_interrupt_before_the_reply_forgets_the_question(talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, step, calls = tmp_path / "talk.json", Engine.step, count()

    def step_or_interrupt(engine: Engine) -> Any:
        if next(calls) == 0:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_or_interrupt)
    replies, notes = talk("What is a lantern?", "Hi", f"/save {file}")
    assert "(interrupted before the reply; the question is forgotten)" in notes
    assert [message["content"] for message in saved(file)] == ["Hi", replies[0]]


def test_a_second_interrupt_waits_until_the_first_is_dealt_with() -> None:
    before, tidied = signal.getsignal(signal.SIGINT), []

    def interrupt_twice() -> None:
        with interruptible():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                tidied.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert tidied
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_from_outside_leaves_the_session_alive(tmp_path: Path) -> None:
    write_checkpoint("E2B", tmp_path / "model")  # random weights: it never ends a reply by itself
    file = tmp_path / "talk.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "gemcutter.cli", "chat", str(tmp_path / "model"), "-n", "100000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("Hi\n")
    process.stdin.flush()
    begin = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(f"/save {file}\n/exit\n", timeout=120)
    assert process.returncode == 0
    assert "(interrupted)" in notes
    assert "Traceback" not in notes
    assert [message["role"] for message in saved(file)] == ["user", "assistant"]
    assert saved(file)[1]["content"].startswith(begin)


def test_lines_are_remembered_where_that_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    readline.clear_history()
    with line_history():
        readline.add_history("What is a lantern?")
    assert "lantern" in (tmp_path / "gemcutter" / "history").read_text()
    readline.clear_history()
    with line_history():
        assert readline.get_history_item(1) == "What is a lantern?"
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    with line_history():
        pass  # nowhere to write: no error


def test_a_model_without_a_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint("E2B", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert main(["chat", str(tmp_path)]) == 1
    assert "use `gemcutter run`" in capsys.readouterr().err


def test_a_conversation_goes_back_and_forth(tmp_path: Path) -> None:
    talk = Conversation("Be kind.")
    talk.ask("a")
    talk.answer("b", reasoning="because")
    talk.save(tmp_path / "talk.json")
    assert Conversation.load(tmp_path / "talk.json") == talk
    assert talk.messages[2] == {"role": "assistant", "content": "b", "reasoning": "because"}
    assert talk.reopen()
    assert talk.turns == [{"role": "user", "content": "a"}]
    assert talk.undo()
    assert not talk.undo()
    assert not talk.reopen()
    assert talk.system == "Be kind."
    talk.save(tmp_path / "talk.json")
    assert Conversation.load(tmp_path / "talk.json").turns == []
    (tmp_path / "talk.json").write_text("{")
    with pytest.raises(RequestError, match="is not JSON"):
        Conversation.load(tmp_path / "talk.json")
