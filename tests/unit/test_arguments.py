"""Wrong but natural arguments of the Python API: each is one RequestError that names the argument, and nothing else happens.

What other engines call an option is named by what it is called here. Read `test_api.py` for what right arguments give.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemcutter
from gemcutter import CapacityError, Engine, Model, RequestError
from gemcutter.cache import kv_cache
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.errors import spell_value
from gemcutter.generate_options import ELSEWHERE, NAMES, OTHERWISE
from gemcutter.load_options import LoadOptions

TEXT = "The king"
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """Load the demo once."""
    with gemcutter.load("demo", dtype="float32", kernels="reference") as loaded:
        yield loaded


# ---- conversations ----


def test_a_text_is_a_users_message(model: Model) -> None:
    found = model.chat("Hello", max_tokens=4)
    assert found.prompt_tokens == model.chat([HELLO], max_tokens=4).prompt_tokens
    assert found.text


@pytest.mark.parametrize("messages", [None, [], HELLO, [2, 5], ["Hello"], [HELLO, "and"], b"Hello"], ids=repr)
def test_what_is_no_conversation_is_refused(messages: Any, model: Model) -> None:
    with pytest.raises(RequestError, match="messages: expected a text or a list of messages"):
        model.chat(messages, max_tokens=1)


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "input_audio", "video", "file"])
def test_parts_that_cannot_be_read_are_named(kind: str, model: Model) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, "url": "x.png"}]
    messages: list[Any] = [HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": parts}]
    for ask in (model.chat, model.stream, model.prepare, model.encode, lambda prompt: model.generate([prompt])):
        with pytest.raises(RequestError, match=re.escape(f"messages[2].content[1].type: a part of type '{kind}'; only text")):
            ask(messages)


def test_parts_of_text_are_read(model: Model) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert model.encode([{"role": "user", "content": parts}]) == model.encode([HELLO])


def test_a_conversation_given_to_generate_is_sent_to_chat(model: Model) -> None:
    with pytest.raises(RequestError, match="ask `chat` for an answer to this one"):
        model.generate([HELLO])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="put a single one in a list"):
        model.generate([2, 5])  # type: ignore[list-item]


# ---- options of a request ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt_logprobs": True}, "request.prompt_logprobs: expected 0 or more, found True"),
        ({"max_tokens": None}, "request.max_tokens: expected 0 or more, found None"),
        ({"sampling": {"temperature": 1}}, "request.sampling: expected SamplingParams, found {'temperature': 1}"),
        ({"logit_bias": {"452": -100}}, "sampling.logit_bias: expected ids with finite numbers or -inf, found {'452': -100}"),
        ({"temperature": 1e-308}, "sampling.temperature: expected 0 (greedy), or a number above it, found 1e-308"),
        ({"presence_penalty": 10**400}, "sampling.presence_penalty: expected a finite number, found 1000"),
        ({"presence_penalty": 10**9000}, "sampling.presence_penalty: expected a finite number, found a value of type int"),
        ({"hidden_states": [-1]}, "request.hidden_states: expected True or False, found [-1]"),
        ({"adapter": [None, "a"]}, "request.adapter: expected the name of one adapter for the whole request"),
        ({"logits_processors": [3]}, "request.logits_processors: expected a tuple of callables"),
        ({"stop": 3}, "stop: expected a list of strings, found int"),
        ({"stop": b"ab"}, "stop: expected a list of strings, found bytes"),
        ({"stop": iter(["a"])}, "stop: expected a list of strings, found list_iterator"),
        ({"stop": ["a", ""]}, "stop[1] is '', expected a non-empty string"),
        ({"ignore_eos": 1}, "ignore_eos: expected True or False, found 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_named(options: Any, expected: str, model: Model) -> None:
    with pytest.raises(RequestError) as caught:
        model.generate(TEXT, **options)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 400
    assert isinstance(caught.value, ValueError)  # what Python's own functions raise


def test_stop_strings_come_from_any_collection(model: Model) -> None:
    whole = model.generate(TEXT, max_tokens=8).text
    prompts = [TEXT, TEXT]
    for stop in ([whole[4:8]], (whole[4:8],), {whole[4:8]}):
        cut = model.generate(prompts, max_tokens=8, stop=stop)  # type: ignore[arg-type]
        assert [each.text for each in cut] == [whole[:4]] * 2


def test_processors_come_as_a_list_too(model: Model) -> None:
    seen = list[int]()

    def look(prompt: object, reply: object, logits_V: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits_V))
        return logits_V

    model.generate(TEXT, max_tokens=2, logits_processors=[look])
    assert seen == [model.plan.vocab] * 2


@pytest.mark.parametrize("name", [*ELSEWHERE, "temperatur", "topp"])
def test_options_of_other_engines_are_told_by_their_names_here(name: str, model: Model) -> None:
    meant = ELSEWHERE.get(name) or {"temperatur": "temperature", "topp": "top_p"}[name]
    assert meant in NAMES
    with pytest.raises(RequestError) as caught:
        model.generate(TEXT, **{name: 3})  # type: ignore[call-overload]
    assert f"{name}: not an option of a request; did you mean {meant}?" in caught.value.problems
    assert caught.value.problems[-1].startswith("options are: max_tokens, stop, ")


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_done_in_another_way_is_told(name: str, model: Model) -> None:
    assert name not in NAMES
    with pytest.raises(RequestError, match=re.escape(f"{name}: not an option of a request; {OTHERWISE[name]}")):
        model.prepare(TEXT, **{name: 3})  # type: ignore[misc]


# ---- batches ----


def test_bad_prompts_of_a_batch_are_named_by_their_places(model: Model) -> None:
    with pytest.raises(RequestError) as caught:
        model.generate([TEXT, [2, 99999], TEXT, [5] * 200000, [99999]], max_tokens=1)
    first, second = caught.value.problems
    assert first == "prompts[1], prompts[4]: request.prompt: ids [99999] are outside the vocabulary of 4096"
    assert second.startswith("prompts[3]: request.prompt: 200000 tokens, the context holds 32768; raise the context")
    assert "--" not in second  # no option of the command line, which an API has not
    with pytest.raises(RequestError) as caught:
        model.generate([TEXT, TEXT, TEXT], max_tokens=-1)
    assert caught.value.problems == ("request.max_tokens: expected 0 or more, found -1",)
    with pytest.raises(RequestError) as caught:
        model.generate([TEXT, [99999]], top_p=2.0)
    assert caught.value.problems == ("sampling.top_p: expected above 0, at most 1, found 2.0",)
    with pytest.raises(RequestError) as caught:
        model.generate([[99999], [99999]])
    assert caught.value.problems[0].startswith("every prompt: request.prompt: ids [99999]")
    with pytest.raises(RequestError) as caught:
        model.generate([[99999]] * 9 + [TEXT])
    assert caught.value.problems[0].startswith("prompts[0], prompts[1], prompts[2], prompts[3], prompts[4] and 4 more: ")
    with pytest.raises(RequestError) as caught:
        model.generate([[token] for token in range(90000, 90030)])
    assert caught.value.problems[20:] == ("and 10 problems more",)


def test_ids_may_be_numpys(model: Model) -> None:
    ids = model.encode(TEXT)
    whole = model.generate([ids], max_tokens=2)[0].tokens
    for prompt in (np.array(ids), np.array(ids, np.int32), [np.int64(each) for each in ids]):
        assert model.generate([prompt], max_tokens=2)[0].tokens == whole  # type: ignore[list-item]
    prepared = model.prepare([np.int64(each) for each in ids])
    assert {type(each) for each in prepared.request.prompt} == {int}
    for bad in (np.array([2.0]), np.array([True]), np.array([[2]]), [np.bool_(True)]):
        with pytest.raises(RequestError, match="expected text, a list of token ids"):
            model.prepare(bad)  # type: ignore[arg-type]


# ---- what is printed, closed and logged ----


def test_a_model_prints_as_what_it_is() -> None:
    with gemcutter.load("demo", context=99) as loaded:
        assert repr(loaded) == f"<gemcutter.Model {DEMO_FOLDER}: 10 layers, bfloat16 on cpu, context 99>"
    assert repr(loaded) == "<gemcutter.Model, closed>"


def test_a_stream_is_a_context_manager(model: Model) -> None:
    with model.stream(TEXT, max_tokens=500) as stream:
        assert next(stream).text
    assert list(stream) == []
    assert model.loop.run(lambda engine: not engine.has_work)


def test_the_tokenizer_needs_no_keyword(model: Model) -> None:
    ids = model.tokenizer.encode(TEXT)
    assert ids == model.encode(TEXT)
    assert model.tokenizer.decode(ids) == TEXT


def test_the_package_shows_its_own_names_alone() -> None:
    assert {name for name in dir(gemcutter) if not name.startswith("_")} == set(gemcutter.__all__)


def test_notes_and_timings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "gemcutter"), gemcutter.load("demo", dtype="float32", ple="mmap") as loaded:
        loaded.generate(TEXT, max_tokens=3)
        notes = [f"demo: {note}" for note in loaded.notes]
    assert all(record.name.startswith("gemcutter.") for record in caplog.records)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    *before, (_, loading), (_, request) = told
    assert before == [("INFO", note) for note in notes]
    assert re.match(r"demo: loaded in \d+\.\d\d s: <gemcutter.Model ", loading)
    assert re.match(r"request 0: \d+ prompt tokens, 0 of them cached; 3 tokens in [\d.]+ s; end: length", request)


# ---- loading ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"context": "64"}, "context: expected 1 or more, found '64'"),
        ({"ignore": None}, "ignore: expected a list of patterns, such as ['*.foo'], found None"),
        ({"ignore": "blk.*"}, "ignore: expected a list of patterns, such as ['*.foo'], found 'blk.*'"),
        ({"ignore": [3]}, "ignore: expected a list of patterns"),
        ({"adapters": "x"}, "adapters: expected paths by name, such as {'lamp': 'path/to/it'}, found 'x'"),
        ({"adapters": ["x"]}, "adapters: expected paths by name"),
        ({"adapters": {"x": None}}, "adapters: expected paths by name"),
        ({"device": None}, "device: expected a text, found None"),
        ({"kernels": None}, "kernels: expected a text, found None"),
        ({"kernels": 3, "quant": 4}, "quant: expected a text or None, found 4"),
        ({"dtype": ["float32"]}, "dtype: expected a text or None, found ['float32']"),
        ({"adapter": ["x"]}, "adapter: expected a text or None"),
        ({"repack_cache": "yes"}, "repack_cache: expected True, False or None, found 'yes'"),
        ({"progress": True}, "progress: expected a function"),
        ({"model": None}, "model: expected a text, found None"),
        ({"model": ""}, "model: expected a text, found ''"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_options_of_loading_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        gemcutter.load(**({"model": "demo"} | options))
    assert expected in str(caught.value)


def test_paths_dtypes_and_devices_may_be_objects() -> None:
    with gemcutter.load(Path(DEMO_FOLDER), dtype=torch.float32, device=torch.device("cpu"), ignore=["a.*"]) as loaded:
        assert loaded.decoder.dtype == torch.float32
    assert LoadOptions(model="demo", adapter="x", adapters={"a": "b"}).adapters == {"a": "b"}


@pytest.mark.parametrize("limits", [{"max_num_seqs": 10**9}, {"prefix_cache_bytes": 10**15}, {"max_num_seqs": 10**15}], ids=repr)
def test_memory_is_computed_before_it_is_taken(limits: dict[str, Any], model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[object]()
    monkeypatch.setattr(kv_cache, "PageAllocator", taken.append)
    monkeypatch.setattr(kv_cache.torch, "empty", lambda *shape, **_: taken.append(shape))
    with pytest.raises(CapacityError, match=r"needs [\d,]+ GB for its lists of pages alone, and this machine has"):
        Engine(model.decoder, 32768, **limits)
    assert taken == []


# ---- how values are shown ----


def test_values_are_shown_short_and_never_fail() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise OSError

    assert spell_value("a") == "'a'"
    assert spell_value("a" * 1000) == "'" + "a" * 79 + "..."
    assert spell_value(Odd()) == "a value of type Odd"
    assert spell_value(10**9000) == "a value of type int"
