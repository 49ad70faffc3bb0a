"""Clients that live in environments of their own, against the demo model: each runs as a program and says what it understood.

`make clients` makes the environments; without them these tests are skipped. The demo calls nothing by itself: its tokens are made
to spell a call at a question, and an answer where a result of a tool stands in the prompt.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gemcutter.api import Model
from gemcutter.server import chat_task
from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "clients"
FOLDER = Path(os.environ.get("GEMCUTTER_CLIENTS", ROOT / ".venv" / "clients"))
LIMIT_S = 120
CALL = 'Well.<|tool_call>call:f{x:<|"|>a "b"<|"|>}<tool_call|>'
ARGUMENTS = {"x": 'a "b"'}
ANSWER = "It is done."

pytestmark = pytest.mark.slow


def ask(program: Path, script: str, *words: object) -> dict[str, Any]:
    """Return what a client printed."""
    if not program.exists():
        pytest.skip(f"no {program}; `make clients` installs it")
    command = [str(program), str(SCRIPTS / script), *map(str, words)]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=FOLDER, env=clean, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def python(name: str) -> Path:
    return FOLDER / name / "bin" / "python"


def direct(model: Model, ids: list[int]) -> list[float]:
    """Return the log-probability of every token but the first, as the Python API gives them."""
    (found,) = model.generate([ids], max_tokens=1, temperature=0, prompt_logprobs=1)
    return [each.logprob for each in found.prompt.logprobs]


@pytest.fixture
def scripted(server: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A server whose model calls the tool once, and then answers."""
    tokenizer = server.model.tokenizer
    result = tokenizer.id_of("<|tool_response>")
    call = [*tokenizer.encode(CALL, bos=False), result]
    answer = [*tokenizer.encode(ANSWER, bos=False), tokenizer.id_of("<turn|>")]

    def script(prompt: Any, reply: Any, logits: Any) -> Any:
        ids = answer if result in list(prompt) else call
        logits.fill_(-1e9)[ids[len(reply)]] = 0.0
        return logits

    monkeypatch.setattr(chat_task, "_thinking_budget", lambda *_: script)
    return server


def test_openai_1_reads_a_streamed_call_and_scores(scripted: Running) -> None:
    found = ask(python("openai1"), "openai_1.py", scripted.url)
    assert found["version"].startswith("1.")
    assert (found["text"], found["name"], found["reason"]) == ("Well.", "f", "tool_calls")
    assert found["arguments"] == found["whole"] == ARGUMENTS
    assert found["used"] > 0
    assert found["scored"][0] is None
    assert found["scored"][1:] == pytest.approx(direct(scripted.model, scripted.model.tokenizer.encode("A lamp")))
    assert found["models"] == ["demo", "alias"]


def test_langchains_tool_loop_comes_to_an_answer(scripted: Running) -> None:
    found = ask(python("langchain"), "langchain_loop.py", scripted.url)
    assert found["text"] == "Well."
    assert found["calls"] == found["streamed"] == [["f", ARGUMENTS]]
    assert (found["result"], found["answer"]) == ('A "B"', ANSWER)


def test_litellm_reads_a_streamed_call(scripted: Running) -> None:
    found = ask(python("litellm"), "litellm_call.py", scripted.url)
    assert (found["text"], found["name"], found["arguments"]) == ("Well.", "f", ARGUMENTS)
    assert found["reason"] == "tool_calls"


def test_the_ai_sdk_runs_a_streamed_call_and_reads_the_answer(scripted: Running) -> None:
    if not (FOLDER / "ai" / "node_modules").exists():
        pytest.skip("no AI SDK; `make clients` installs it where npm is")
    found = ask(Path(shutil.which("node") or "node"), "ai_sdk_call.mjs", scripted.url, FOLDER / "ai")
    assert found["errors"] == []
    assert found["calls"] == [["f", ARGUMENTS]]
    assert found["results"] == ['A "B"']
    assert (found["text"], found["reason"]) == (["Well.", ANSWER], "stop")


def test_lm_eval_scores_and_generates_as_the_python_api_does(server: Running) -> None:
    """The harness asks for the tokenizer and leaves out `<bos>`: the hardest of its ways for this family's scores."""
    model, tokenizer = server.model, server.model.tokenizer
    with running(model, ServerOptions(names=("demo",), tokenizer_info=True)) as telling:
        found = ask(python("lmeval"), "lm_eval_tasks.py", telling.url, SCRIPTS / "lamps.jsonl")
    lines = [json.loads(line) for line in (SCRIPTS / "lamps.jsonl").read_text().splitlines()]
    assert len(found["choice"]) == len(found["free"]) == len(found["chat"]) == len(lines)
    for line, choices, free, chat in zip(lines, found["choice"], found["free"], found["chat"], strict=True):
        question = line["question"]
        context = len(tokenizer.encode(question))
        for choice, ((score, _),) in zip(line["choices"], choices, strict=True):
            scores = direct(model, tokenizer.encode(f"{question} {choice}"))
            assert float(score) == pytest.approx(sum(scores[context - 1 :]), abs=1e-3)
        raw = model.generate(question, max_tokens=12, temperature=0, stop=["\n\n"])
        assert free == [[raw.text]]
        spoken = model.chat(question, max_tokens=12, temperature=0, stop=["\n\n"])
        assert chat == [[spoken.text]]
