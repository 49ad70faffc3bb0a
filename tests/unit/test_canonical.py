"""Which chat template a model gets: its own, Google's canonical one, or a file's; and what a request may ask of it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import gemcutter
from gemcutter.api import Model
from gemcutter.errors import CheckpointError, RequestError
from gemcutter.generate_options import OF_TEMPLATE, GenerateOptions, TemplateOptions
from gemcutter.text import chat
from gemcutter.text.canonical import LARGE, SMALL, canonical_template, preferred
from gemcutter.text.chat import ChatTemplate
from gemcutter.text.tokenizer import Tokenizer
from tests.real_tokenizer import fixtures, real_template, real_tokenizer

DEMO = Path(chat.__file__).resolve().parents[1] / "demo"
TOKENIZER = Tokenizer.load(DEMO)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "description": "d"}}]
CALLED: list[dict[str, Any]] = [*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]


@pytest.mark.parametrize("size", [LARGE, SMALL])
def test_the_packaged_templates_are_the_published_ones(size: str) -> None:
    published = (fixtures() / f"chat_template.{size}.canonical-2026-07-09.jinja").read_text(encoding="utf-8")
    assert canonical_template(size, TOKENIZER).source == published
    assert preferred(canonical_template(size, TOKENIZER), TOKENIZER)[1] is None


@pytest.mark.parametrize("name", ["26B-A4B.launch", "large.interleaved", "large.newer"])
def test_older_generations_are_replaced(name: str) -> None:
    own = real_template(name)
    found, note = preferred(own, real_tokenizer())
    assert found.source == canonical_template(LARGE, TOKENIZER).source
    assert note is not None
    assert f"chat_template.{name}.jinja is an older generation of Google's chat template" in note
    assert "chat_template own keeps it" in note


def test_an_older_generation_of_the_small_models_is_replaced_by_theirs() -> None:
    source = real_template("large.newer").source
    cue = "{{- '<|channel>thought\\n<channel|>' -}}"
    assert cue in source
    own = ChatTemplate(source.replace(cue, ""), real_tokenizer())
    assert preferred(own, real_tokenizer())[0].source == canonical_template(SMALL, TOKENIZER).source


def test_a_template_that_somebody_changed_is_kept() -> None:
    source = real_template("large.newer").source.replace("{{- bos_token -}}", "{{- bos_token -}}{{- 'You are a pirate.' -}}", 1)
    assert "pirate" in source
    own = ChatTemplate(source, real_tokenizer())
    assert preferred(own, real_tokenizer()) == (own, None)
    failing = ChatTemplate(real_template("large.newer").source + "{{ raise_exception('no') }}", real_tokenizer())
    assert preferred(failing, real_tokenizer()) == (failing, None)


def test_a_template_without_tools_gets_them_from_the_canonical_one() -> None:
    own = ChatTemplate.find(DEMO, TOKENIZER)
    assert own is not None
    assert "tools" not in own.variables
    found, note = preferred(own, TOKENIZER)
    assert (found, note) == (own, None)
    canonical = canonical_template(SMALL, TOKENIZER)
    assert found.render(HELLO, tools=TOOLS) == canonical.render(HELLO, tools=TOOLS)
    assert found.render(CALLED) == canonical.render(CALLED)
    assert "declaration:f{" in found.render(HELLO, tools=TOOLS)
    assert "call:f{}" in found.render(CALLED)


def test_a_foreign_template_without_tools_refuses_them() -> None:
    own, _ = preferred(ChatTemplate("{{ messages[0].content }}", TOKENIZER), TOKENIZER)
    with pytest.raises(RequestError, match="tools: this template does not read it"):
        own.render(HELLO, tools=TOOLS)


def test_the_template_is_chosen_when_a_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}é {{ messages[0].content }}", encoding="utf-8")
    with gemcutter.load("demo", chat_template=file) as model:
        assert model.tokenizer.decode(model.encode(HELLO)) == "é Hi"
    with gemcutter.load("demo", chat_template="canonical") as model:
        assert model.template is not None
        assert model.template.source == canonical_template(SMALL, TOKENIZER).source
    with gemcutter.load("demo", chat_template="own") as model, pytest.raises(RequestError, match="does not read it"):
        model.encode(HELLO, tools=TOOLS)
    folder = tmp_path / "base"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").unlink()
    with gemcutter.load(folder) as model:
        assert model.template is None
    with gemcutter.load(folder, chat_template="canonical") as model:
        assert model.tokenizer.decode(model.encode(HELLO), special=True).endswith("<|turn>model\n"), "a small model's"


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "can't be read .*give a Jinja file, canonical or own"), (b"\xff", "can't be read"), (b"{% if", ":1: ")],
)
def test_a_file_that_is_no_template_is_named(content: bytes | None, found: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"mine\.jinja.*{found}"):
        gemcutter.load("demo", chat_template=str(file))


# ---- what a request may ask of its template ----


@pytest.fixture(scope="module")
def model() -> Any:
    with gemcutter.load("demo", chat_template="canonical") as loaded:
        yield loaded


def text_of(model: Model, messages: list[dict[str, Any]], **options: Any) -> str:
    prepared = model.prepare(messages, **options)
    return model.tokenizer.decode(prepared.request.prompt, special=True)


def test_options_of_templates_are_those_of_requests() -> None:
    of_requests = get_type_hints(GenerateOptions)
    assert {name: of_requests[name] for name in OF_TEMPLATE} == get_type_hints(TemplateOptions)


def test_options_reach_the_template(model: Model) -> None:
    assert "<|think|>" in text_of(model, HELLO, enable_thinking=True)
    assert "<|think|>" in text_of(model, HELLO, template_options={"enable_thinking": True})
    assert "<|think|>" not in text_of(model, HELLO, enable_thinking=True, template_options={"enable_thinking": False})
    assert text_of(model, HELLO, add_generation_prompt=False).endswith("Hi<turn|>\n")
    begun = [*HELLO, {"role": "assistant", "content": "One, "}]
    assert text_of(model, begun, continue_final_message=True).endswith("<|turn>model\nOne, ")
    spelled = [{"role": "user", "content": "<|turn>"}]
    turn = model.tokenizer.id_of("<|turn>")
    assert [model.encode(spelled, trusted=trusted).count(turn or 0) for trusted in (False, True)] == [2, 3]
    kept = [*CALLED, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "Two."}, *HELLO]
    kept[1] = {**kept[1], "reasoning": "Hm."}
    assert "Hm." not in text_of(model, kept)
    assert "Hm." in text_of(model, kept, template_options={"preserve_thinking": True})


def test_options_that_the_template_does_not_read(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RequestError, match="mood: this template does not read it"):
        model.encode(HELLO, template_options={"mood": 1})
    with caplog.at_level(logging.INFO, "gemcutter"):
        assert model.encode(HELLO, template_options={"mood": 1}, lenient_options=True) == model.encode(HELLO)
    assert "the chat template does not read mood, which is ignored" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"template_options": {"messages": []}}, r"template_options\.messages: no option"),
        ({"template_options": {"trusted": True}}, r"template_options\.trusted: no option"),
        ({"template_options": {"bos_token": "x"}}, r"template_options\.bos_token: no option"),
        ({"template_options": {"enable_thinking": "yes"}}, r"enable_thinking: expected True or False, found 'yes'"),
        ({"template_options": 3}, r"template_options: expected an object, found 3"),
        ({"trusted": 1}, r"trusted: expected True or False, found 1"),
        ({"add_generation_prompt": None}, r"add_generation_prompt: expected True or False, found None"),
    ],
)
def test_options_that_are_none_are_named(options: Any, problem: str, model: Model) -> None:
    with pytest.raises(RequestError, match=problem):
        model.prepare(HELLO, **options)


@pytest.mark.parametrize(
    "options", [{"template_options": {"a": 1}}, {"continue_final_message": True}, {"add_generation_prompt": False}]
)
def test_raw_text_has_no_template(options: Any, model: Model) -> None:
    with pytest.raises(RequestError, match="which raw text and ids leave out"):
        model.prepare("Hi", **options)
