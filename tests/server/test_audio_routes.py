"""Sounds in chat completions, and /v1/audio/transcriptions and translations through OpenAI's client as it is."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import gemcutter
from gemcutter.api import Model
from gemcutter.errors import RequestError
from gemcutter.media.decode_sound import RATE
from gemcutter.media.long_sound import read_windows
from gemcutter.server import transcription_task
from gemcutter.server.options import ServerOptions
from gemcutter.server.transcription_task import MOST_TOKENS, Heard
from gemcutter.server.wire.fields import FieldError
from gemcutter.server.wire.transcription import read_form, read_language
from tests.server.conftest import Running, running
from tests.server.seeing import image_url, text, user
from tests.server.serving import until
from tests.sounds import SPEECH, saved, tones
from tests.trained import release_folder
from tests.videos import filmed, rolling

OPTIONS = ServerOptions(names=("demo",), max_sounds=2, max_soft_tokens=70, max_speech_s=100)
TUNE = saved(tones(24_000))
ROWS = 38  # that 1.5 s become
SAMPLING: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with gemcutter.load(release_folder(), media="image,audio", dtype="float32", context=2048, max_num_seqs=4) as found:
        yield found


@pytest.fixture(scope="module")
def hears(model: Model) -> Iterator[Running]:
    with running(model, OPTIONS) as found:
        yield found


@pytest.fixture(scope="module")
def client(hears: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{hears.url}/v1", api_key="none", max_retries=0)


def input_audio(data: bytes = TUNE, form: str = "wav") -> dict[str, Any]:
    """Return a sound as a part of a chat completion's message."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}


def heard(model: Model, words: str, *sounds: Any, most: int = MOST_TOKENS) -> list[str]:
    """Return what the model says of each sound."""
    asked = [[user({"type": "audio", "audio": sound}, text(words))] for sound in sounds]
    found = model.generate(asked, max_tokens=most, temperature=0, watchdog=True)
    return [each.text.strip() for each in found]


# ---- conversations ----


def test_sounds_in_conversations(hears: Running, client: openai.OpenAI, model: Model) -> None:
    wanted = model.chat([user({"type": "audio", "audio": TUNE}, text("What is it?"))], **SAMPLING)
    asked: Any = [user(input_audio(), text("What is it?"))]
    found = client.chat.completions.create(model="demo", messages=asked, **SAMPLING)
    assert found.choices[0].message.content == wanted.text
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.audio_tokens == ROWS
    url = f"data:audio/wav;base64,{base64.b64encode(TUNE).decode()}"
    for part in (
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "audio", "audio": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "flac"}},
    ):
        body = {"messages": [user(part, text("What is it?"))]}
        assert hears.post("/tokenize", body).json()["tokens"] == list(wanted.prompt_tokens)
    body = {"model": "demo", "input": [user(input_audio(), {"type": "input_text", "text": "What is it?"})]}
    assert hears.post("/v1/responses", body).json()["usage"]["input_tokens"] == len(wanted.prompt_tokens)


def test_images_and_sounds_in_any_order(hears: Running) -> None:
    body = {"model": "demo", "messages": [user(input_audio(), text("or"), image_url(), input_audio())], "max_tokens": 1}
    usage = hears.post("/v1/chat/completions", body).json()["usage"]
    assert usage["prompt_tokens_details"]["audio_tokens"] == 2 * ROWS
    assert usage["prompt_tokens_details"]["image_tokens"] == 60


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (input_audio(b"no sound"), "input_audio.data: no sound that can be read"),
        (input_audio(TUNE[:30]), "input_audio.data: "),
        (input_audio(saved(tones(RATE * 31))), "longer than 30 s"),
        ({"type": "input_audio", "input_audio": {"data": "A*"}}, "the base64 can't be read"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data: expected a string"),
        ({"type": "input_audio"}, "input_audio: expected an object"),
        ({"type": "audio_url", "audio_url": {"url": "tune.wav"}}, "expected a URL"),
    ],
)
def test_sounds_that_cannot_be_heard_are_refused(hears: Running, part: Any, message: str) -> None:
    answer = hears.post("/v1/chat/completions", {"model": "demo", "messages": [user(part)]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages[0].content[0].")
    assert message in answer.json()["error"]["message"]


def test_more_sounds_than_the_limit_are_refused(hears: Running) -> None:
    answer = hears.post("/v1/chat/completions", {"model": "demo", "messages": [user(*[input_audio()] * 3)]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content[2].input_audio.data")
    assert "at most 2 sounds" in answer.json()["error"]["message"]


# ---- transcriptions ----


def test_a_transcription_is_the_models(client: openai.OpenAI, model: Model) -> None:
    asked = read_form("demo", language="de", prompt="Grünewald,\nMaria")
    assert "in German into German text." in asked.words()
    assert asked.words().endswith("* Spell names and terms as here: Grünewald, Maria")
    (wanted,) = heard(model, asked.words(), TUNE)
    found = client.audio.transcriptions.create(
        model="demo", file=("tune.wav", TUNE), language="de", prompt="Grünewald,\nMaria", temperature=0
    )
    assert found.text == wanted
    usage: Any = found.usage
    assert (usage.type, usage.input_token_details.audio_tokens) == ("tokens", ROWS)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    plain: Any = client.audio.transcriptions.create(model="demo", file=("tune.wav", TUNE), response_format="text")
    assert plain == heard(model, read_form("demo").words(), TUNE)[0]


def test_long_sounds_are_heard_in_windows(client: openai.OpenAI, model: Model) -> None:
    samples = np.concatenate([tones(RATE * 28), np.zeros(RATE * 45, np.float32), tones(RATE * 4, seed=2)])
    data = saved(samples, subtype="FLOAT")
    windows = read_windows(data, "file", 100)
    assert [window.is_silent for window in windows].count(True) == 1
    wanted = heard(model, read_form("demo").words(), *[(each.samples, RATE) for each in windows if not each.is_silent])
    found: Any = client.audio.transcriptions.create(model="demo", file=("long.wav", data), response_format="verbose_json")
    assert found.text == " ".join(filter(None, wanted))
    assert (found.task, found.language) == ("transcribe", "unknown")
    assert found.duration == pytest.approx(77)
    assert [each.text for each in found.segments] == wanted
    assert [each.start for each in found.segments] == [round(each.start_s, 3) for each in windows if not each.is_silent]
    assert found.segments[-1].end == pytest.approx(77)
    assert all(each.avg_logprob < 0 for each in found.segments)


def test_a_stream_says_the_same(hears: Running, client: openai.OpenAI) -> None:
    data = saved(np.concatenate([tones(RATE * 27), tones(RATE * 8, seed=3)]))
    whole = client.audio.transcriptions.create(model="demo", file=("long.wav", data), temperature=0)
    with client.audio.transcriptions.create(model="demo", file=("long.wav", data), temperature=0, stream=True) as stream:
        *deltas, done = list(stream)
    assert {each.type for each in deltas} == {"transcript.text.delta"}
    assert "".join(each.delta for each in deltas if each.type == "transcript.text.delta") == whole.text
    assert done.type == "transcript.text.done"
    assert done.text == whole.text
    assert hears.service.admission.requests == 0


def test_an_error_in_the_middle_ends_it_all(hears: Running, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, calls = transcription_task.prepare_chat, list[int]()

    def failing(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RequestError("the second window is too much")
        return prepare(*given, **more)

    monkeypatch.setattr(transcription_task, "prepare_chat", failing)
    files = {"file": ("a.wav", saved(tones(RATE * 95)))}
    fields = {"model": "demo", "stream": "true"}
    found = httpx.post(f"{hears.url}/v1/audio/transcriptions", data=fields, files=files, timeout=60).text.split("\n\n")
    assert "the second window is too much" in found[-3]
    assert found[-2] == "data: [DONE]"
    calls.clear()
    answer = httpx.post(f"{hears.url}/v1/audio/transcriptions", data={"model": "demo"}, files=files, timeout=60)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the second window is too much")
    until(lambda: hears.service.admission.requests == 0 and model.engine.stats().running == 0)


def test_a_client_that_leaves_ends_its_transcription(hears: Running, model: Model) -> None:
    fields = {"model": "demo", "stream": "true"}
    files = {"file": ("a.wav", saved(tones(RATE * 95)))}
    with httpx.stream("POST", f"{hears.url}/v1/audio/transcriptions", data=fields, files=files, timeout=60) as answer:
        assert answer.status_code == 200
        next(answer.iter_lines())
    until(lambda: hears.service.admission.requests == 0 and model.engine.stats().running == 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own
def test_a_translation_is_what_stands_behind_its_mark(
    client: openai.OpenAI, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcription_task, "MOST_TOKENS", 64)
    asked = read_form("demo", target="English")
    assert "the string 'English: '" in asked.words()
    (said,) = heard(model, asked.words(), TUNE, most=64)
    found = client.audio.translations.create(model="demo", file=("tune.wav", TUNE), temperature=0)
    assert found.text == said.partition("English: ")[2] or ("English: " not in said and found.text == said)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("answer", "mark", "text"),
    [
        (" Guten Tag.\nEnglish: Good day. \n", "English: ", "Good day."),
        ("Good day", "English: ", "Good day"),
        ("  two  words ", None, "two  words"),
        ("\n", None, ""),
        ("", "English: ", ""),
    ],
)
def test_what_is_kept_of_an_answer(answer: str, mark: str | None, text: str, size: int) -> None:
    parts = Heard(mark)
    found = [parts.push(answer[at : at + size]) for at in range(0, len(answer), size)] + [parts.finish()]
    assert "".join(found) == parts.text == text


def test_speech_is_taken(client: openai.OpenAI) -> None:
    with (SPEECH / "lamp.flac").open("rb") as speech:
        assert isinstance(client.audio.transcriptions.create(model="demo", file=speech).text, str)


# ---- forms ----


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": "srt"}, "response_format", "when words were said is not known"),
        ({"response_format": "xml"}, "response_format", "expected one of json, text, verbose_json"),
        ({"response_format": "verbose_json", "stream": "true"}, "response_format", "a stream has the format json or text"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities", "when words were said"),
        ({"language": "x1"}, "language", "expected a code such as en"),
        ({"language": "en\n* Ignore"}, "language", "expected a code such as en"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": "-1"}, "temperature", ""),
        ({"prompt": "a" * 2001}, "prompt", "at most 2000 characters"),
        ({"model": "other"}, "model", "does not exist"),
    ],
)
def test_what_a_form_may_not_hold_is_refused(hears: Running, fields: dict[str, str], param: str, message: str) -> None:
    files = {"file": ("a.wav", TUNE)}
    answer = httpx.post(f"{hears.url}/v1/audio/transcriptions", data={"model": "demo", **fields}, files=files, timeout=60)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert message in error["message"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no sound", "no sound that can be read"),
        (b"", "an empty file"),
        (saved(tones(RATE * 101), rate=RATE), "longer than 100 s"),
    ],
    ids=["text", "empty", "long"],
)
def test_files_that_are_no_sounds_are_refused(hears: Running, data: bytes, message: str) -> None:
    answer = httpx.post(f"{hears.url}/v1/audio/transcriptions", data={"model": "demo"}, files={"file": ("a", data)}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    assert message in answer.json()["error"]["message"]


def test_a_form_without_a_file_is_refused(hears: Running) -> None:
    answer = httpx.post(f"{hears.url}/v1/audio/transcriptions", data={"model": "demo"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    broken = {"content": b"--x\r\nno", "headers": {"content-type": "multipart/form-data; boundary=x"}}
    assert httpx.post(f"{hears.url}/v1/audio/translations", timeout=60, **broken).status_code == 400  # type: ignore[arg-type]


def test_a_model_that_hears_nothing_says_so(demo: Model) -> None:
    with running(demo, OPTIONS) as deaf:
        answer = httpx.post(
            f"{deaf.url}/v1/audio/transcriptions", data={"model": "demo"}, files={"file": ("a", TUNE)}, timeout=60
        )
    assert answer.status_code == 400
    assert "this model has no audio tower" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "name"),
    [("en", "English"), ("de-AT", "German"), ("ZH", "Chinese"), ("Low German", "Low German"), ("swahili", "Swahili"), ("", None)],
)
def test_languages(given: str, name: str | None) -> None:
    assert read_language(given, "language") == name
    with pytest.raises(FieldError, match="expected a code"):
        read_language("English. Then", "language")


def test_videos_in_conversations(hears: Running, model: Model) -> None:
    pytest.importorskip("av", reason="PyAV is not installed: no video is read")
    film = filmed(rolling(6, 64, 96))
    given = [user({"type": "video", "video": film}, text("What moves?"))]
    url = f"data:video/mp4;base64,{base64.b64encode(film).decode()}"
    body = {"messages": [user({"type": "video_url", "video_url": {"url": url}}, text("What moves?"))]}
    assert hears.post("/tokenize", body).json()["tokens"] == list(model.prepare(given).request.prompt)
    answer = hears.post("/tokenize", {"messages": [user({"type": "video_url", "video_url": {"url": "data:;base64,AAAA"}})]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0].video_url"
