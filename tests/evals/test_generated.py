"""Tasks whose items are generated: what they ask, and how they judge right and wrong replies."""

from __future__ import annotations

import io
import json
import random
import stat
import wave
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

import gemcutter
from gemcutter.cli import main
from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.evals.json_schema import problem
from gemcutter.evals.records import read, sha256_of
from gemcutter.evals.report import summarize
from gemcutter.evals.run import items_of
from gemcutter.evals.task import Asked, Item, Mode, Reply, Task
from gemcutter.evals.tasks import find_mode, open_task
from gemcutter.evals.tasks.json_replies import JsonReplies
from gemcutter.evals.tasks.needle import RESERVED
from gemcutter.text.tool_calls import ToolCall

NO_DATA = Data(None)
GENERATED = [
    ("arithmetic", "chat"),
    ("arithmetic", "raw8"),
    ("copy", "chat"),
    ("copy", "raw3"),
    ("json", "free"),
    ("json", "grammar"),
    ("tools", "chat"),
    ("ocr", "chat"),
]


def opened(name: str, mode: str) -> tuple[Task, Mode]:
    """Return a task and one of its modes."""
    task = open_task(name)
    return task, find_mode(task, mode)


def items(name: str, mode: str, **asked: Any) -> list[Item]:
    """Return a task's items."""
    task, found = opened(name, mode)
    return items_of(task, NO_DATA, found, Asked(**asked))


def grade(name: str, mode: str, item: Item, text: str = "", calls: tuple[ToolCall, ...] = ()) -> tuple[Any, float]:
    """Return what is read out of a reply, and the first metric."""
    task, found = opened(name, mode)
    judged = task.grade(item, found, Reply(text=text, tool_calls=calls), Asked())
    return judged.extracted, next(iter(judged.metrics.values()))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return gemcutter.load("demo").tokenizer


@pytest.mark.parametrize(("name", "mode"), GENERATED)
def test_a_seed_decides_the_items(name: str, mode: str) -> None:
    first, again, other = (items(name, mode, seed=seed, options={"count": "12"}) for seed in (1, 1, 2))
    assert [(each.id, sha256_of(each.prompt), each.gold) for each in first] == [
        (each.id, sha256_of(each.prompt), each.gold) for each in again
    ]
    assert len(first) == 12
    assert [sha256_of(each.prompt) for each in first] != [sha256_of(each.prompt) for each in other]
    longer = items(name, mode, seed=1, options={"count": "13"})
    assert [sha256_of(each.prompt) for each in longer[:12]] == [sha256_of(each.prompt) for each in first]


def test_sums_are_right_and_replies_are_read() -> None:
    chat, raw = (items("arithmetic", mode) for mode in ("chat", "raw8"))
    for one, other in zip(chat, raw, strict=True):
        first, sign, second = str(one.prompt[0]["content"]).split()[2:5]  # type: ignore[index]
        second = second.rstrip("?")
        assert sign in "+-*"
        assert eval(first + sign + second) == int(one.gold) == int(other.gold)
        assert str(other.prompt).endswith(f"\n{first} {sign} {second} =")
    item = Item("0", "", "-1234")
    assert grade("arithmetic", "chat", item, "That is 1000 - 2234 = -1,234.") == ("-1234", 1.0)
    assert grade("arithmetic", "chat", item, "\u22121234") == ("-1234", 1.0)
    assert grade("arithmetic", "raw8", item, " -1234 and 5") == ("-1234", 1.0)
    assert grade("arithmetic", "chat", item, "1234") == ("1234", 0.0)
    assert grade("arithmetic", "chat", item, "I can't say") == (None, 0.0)


def test_a_copy_is_exact_or_right_up_to_a_place() -> None:
    task, mode = opened("copy", "chat")
    for item in items("copy", "chat", options={"count": "10"}):
        assert item.gold in str(item.prompt[0]["content"])  # type: ignore[index]
        assert grade("copy", "chat", item, f"\n{item.gold} ") == (item.gold, 1.0)
        half = item.gold[: len(item.gold) // 2]
        judged = task.grade(item, mode, Reply(text=f"{half}\0and so on"), Asked())
        assert judged.metrics == {"exact": 0.0, "beginning": len(half) / len(item.gold)}
    assert grade("copy", "chat", item, "  ") == (None, 0.0)


@pytest.mark.parametrize("mode", ["chat", "raw"])
def test_a_needle_lies_in_a_text_of_exact_length(mode: str, tokenizer: Any) -> None:
    found = items("needle", mode, options={"lengths": "256,1000", "depths": "0,50,100"}, open_tokenizer=lambda: tokenizer)
    assert [(item.id, item.subject) for item in found] == [
        (f"{length}/{depth}", str(length)) for length in (256, 1000) for depth in (0, 50, 100)
    ]
    for item in found:
        length, depth = map(int, item.id.split("/"))
        text = str(item.prompt if mode == "raw" else item.prompt[0]["content"])  # type: ignore[index]
        assert len(tokenizer.encode(text)) == length - RESERVED
        assert text.count(item.gold) == 1
        haystack = text.split("\n\n")[1]
        assert haystack.index(item.gold) / len(haystack) == pytest.approx(depth / 100, abs=0.15)
    assert grade("needle", mode, found[0], f"It is {found[0].gold}.") == (found[0].gold, 1.0)
    assert grade("needle", mode, found[0], "It is 7.") == ("7", 0.0)
    assert grade("needle", mode, found[0], "It is.") == (None, 0.0)


def made_up(schema: dict[str, Any], source: random.Random) -> Any:
    """Return a value that often is valid against a schema, and often just not."""
    if source.random() < 0.1:
        return source.choice([None, True, 3, 2.5, "x", [], {}, [1], "y" * 30, 4.0, -1])
    if "enum" in schema:
        return source.choice(schema["enum"])
    if schema["type"] == "object":
        found = {name: made_up(each, source) for name, each in schema["properties"].items() if source.random() < 0.97}
        return found | ({"more": 1} if source.random() < 0.05 else {})
    if schema["type"] == "array":
        return [made_up(schema["items"], source) for _ in range(source.randint(schema["minItems"], schema["maxItems"]))]
    if schema["type"] == "integer":
        return source.randint(schema["minimum"], schema["maximum"])
    return {"string": "text", "boolean": False}[schema["type"]]


def test_validity_is_what_jsonschema_says() -> None:
    source, counts = random.Random(0), [0, 0]
    for item in items("json", "free", options={"count": "40"}):
        validator = jsonschema.Draft202012Validator(item.gold)
        for _ in range(25):
            value = made_up(item.gold, source)
            is_valid = validator.is_valid(value)
            counts[is_valid] += 1
            assert (problem(value, item.gold) is None) is is_valid, (value, item.gold)
    assert min(counts) > 200
    with pytest.raises(ValueError, match="pattern"):
        problem("x", {"pattern": "x"})


def test_json_is_judged_by_its_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    item = Item("0", "", schema)
    assert grade("json", "free", item, '{"a": 1}') == ("valid", 1.0)
    assert grade("json", "free", item, 'Here it is:\n```json\n{"a": 1}\n```\nDone.') == ("valid", 1.0)
    assert grade("json", "free", item, '{"a": "1"}') == ('$.a: expected integer, found "1"', 0.0)
    assert grade("json", "free", item, '{"a": 1') == (None, 0.0)
    free, held = (items("json", mode) for mode in ("free", "grammar"))
    assert [each.prompt for each in free] == [each.prompt for each in held]
    assert all("constraint" in each.options for each in held)
    assert not any(each.options for each in free)


def test_a_grammar_holds_a_small_model_to_the_schema() -> None:
    mode = find_mode(JsonReplies(), "grammar")
    (item, *_) = items("json", "grammar")
    with gemcutter.load("demo") as model:
        free, held = (
            model.chat(item.prompt, max_tokens=mode.max_tokens, temperature=0, **options)  # type: ignore[arg-type]
            for options in ({}, item.options)
        )
    assert grade("json", "grammar", item, held.text) == ("valid", 1.0)
    assert grade("json", "grammar", item, free.text)[1] == 0.0


def test_calls_are_judged_by_name_and_arguments() -> None:
    found = items("tools", "chat")
    assert [item.subject for item in found].count("no call") == len(found) // 6
    for item in found:
        declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in item.options["tools"]}
        if item.subject == "no call":
            assert grade("tools", "chat", item, "A lamp stood there.") == ([], 1.0)
            assert grade("tools", "chat", item, calls=(ToolCall("set_timer", "{}"),))[1] == 0.0
            continue
        ((name, arguments),) = [(call["name"], call["arguments"]) for call in item.gold]
        assert jsonschema.Draft202012Validator(declared[name]).is_valid(arguments)
        right = ToolCall(name, json.dumps(arguments))
        assert grade("tools", "chat", item, calls=(right,)) == (item.gold, 1.0)
        assert grade("tools", "chat", item, calls=(right, right))[1] == 0.0
        assert grade("tools", "chat", item, calls=(ToolCall(name, "{}"),))[1] == 0.0
        assert grade("tools", "chat", item, "I would call it.") == (None, 0.0)


def test_text_is_rendered_in_its_size() -> None:
    heights = dict[int, int]()
    for item in items("ocr", "chat"):
        with Image.open(io.BytesIO(item.prompt[0]["content"][0]["image"])) as image:  # type: ignore[index]
            levels = image.convert("L").getextrema()
            heights[int(item.subject)] = image.height
        assert levels == (0, 255)
        assert grade("ocr", "chat", item, f" {item.gold.upper()}\n")[1] == 1.0
        assert grade("ocr", "chat", item, item.gold[:-1])[1] == 0.0
    assert list(heights) == sorted(heights) == [12, 16, 24, 32, 48]
    assert list(heights.values()) == sorted(set(heights.values()))


SPEAKS = """#!/bin/sh
exec {python} - "$@" <<'END'
import sys, wave
with wave.open(sys.stdout.buffer, "wb") as file:
    file.setnchannels(1), file.setsampwidth(2), file.setframerate(22050)
    file.writeframes(sys.argv[-1].encode().hex().encode())
END
"""


def test_digits_are_said_by_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match=r"apt install espeak-ng"):
        items("digits", "chat")
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\necho nothing\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(RequestError, match="no WAV file"):
        items("digits", "chat")
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RequestError, match="exit status 3"):
        items("digits", "chat")
    monkeypatch.undo()
    import sys

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program.write_text(SPEAKS.format(python=sys.executable))
    (item, *_) = items("digits", "chat", options={"count": "2"})
    with wave.open(io.BytesIO(item.prompt[0]["content"][0]["audio"])) as file:  # type: ignore[index]
        said = bytes.fromhex(file.readframes(file.getnframes()).decode()).decode()
    assert grade("digits", "chat", item, f"I hear {said}.") == (item.gold, 1.0)  # in words
    assert grade("digits", "chat", item, " ".join(item.gold)) == (item.gold, 1.0)
    assert grade("digits", "chat", item, item.gold[:-1])[1] == 0.0
    assert grade("digits", "chat", item, "nothing") == (None, 0.0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("arithmetic", {"cuont": "1"}, "--option cuont: options are count"),
        ("arithmetic", {"count": "x"}, "expected integers"),
        ("arithmetic", {"count": "0"}, "expected 1 or more"),
        ("arithmetic", {"count": "1,2"}, "expected one integer"),
        ("ocr", {"sizes": "2"}, "expected 6 to 256"),
        ("needle", {"depths": "101"}, "expected 0 to 100"),
        ("needle", {"lengths": "10"}, "expected 256 or more"),
        ("perplexity", {"stride": "512"}, "would skip tokens"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, str], expected: str, tokenizer: Any) -> None:
    with pytest.raises(RequestError, match=expected):
        items(name, open_task(name).modes[0].name, options=options, open_tokenizer=lambda: tokenizer)


def test_perplexity_is_what_score_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(__file__).parents[2] / "SECURITY.md"
    assert main(["score", "demo", str(text), "--window", "100", "--stride", "60", "--json", "--dtype", "float32"]) == 0
    expected = json.loads(capsys.readouterr().out)
    words = ["--data", str(text), "--option", "window=100", "--option", "stride=60", "--output", str(tmp_path)]
    assert main(["eval", "demo", "--task", "perplexity", "--dtype", "float32", "--json", *words]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    metrics = found["result"]["metrics"]
    assert metrics["nll"]["mean"] == pytest.approx(expected["nll_mean"], abs=1e-6)
    assert metrics["perplexity"]["mean"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert metrics["perplexity"]["low"] < metrics["perplexity"]["mean"] < metrics["perplexity"]["high"]
    assert found["items"] == expected["windows"]
    (file,) = tmp_path.iterdir()
    records = list(read(file).records.values())
    assert sum(record.counts["nll"] for record in records) == expected["tokens"]
    spoiled = [gemcutter.evals.records.Record(id="failed", error="no room"), *records]
    assert summarize(spoiled).means[0].mean == pytest.approx(metrics["nll"]["mean"], abs=1e-12)
    assert summarize(spoiled).failed == 1


def test_the_smoke_suite_runs_on_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "demo", "--task", "smoke", "--json", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    found = {(run["task"], run["mode"]): run["result"] for run in json.loads(shown.out)}
    assert list(found) == [
        ("arithmetic", "raw8"),
        ("arithmetic", "chat"),
        ("copy", "chat"),
        ("needle", "chat"),
        ("json", "free"),
        ("json", "grammar"),
        ("tools", "chat"),
        ("perplexity", "windows"),
    ]
    assert "left out: ocr/chat shows image, for which this checkpoint has no tower" in shown.err
    assert all(result["failed"] == 0 for result in found.values())
    assert found["json", "grammar"]["metrics"]["valid"]["mean"] == 1.0
    assert main(["eval", "demo", "--task", "ocr", "--output", str(tmp_path)]) == 1  # asked for by name, it is no less than that
    assert "tower" in capsys.readouterr().err
