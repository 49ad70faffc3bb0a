"""Images in requests to all three chat APIs: the rows and replies of the Python API, their counts, limits and refusals.

Owns what a client sees. What the rows are is `unit/test_images.py`'s, what may be an image `unit/test_image.py`'s.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest

import gemcutter
from gemcutter.api import Model
from gemcutter.model.vision import VisionTower
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.fields import FieldError
from gemcutter.server.wire.media import image_part, of_request
from tests.images import drawing
from tests.server.conftest import Running, running
from tests.server.seeing import PICTURE, PLACEHOLDER, QUESTION, ROWS, block, data_url, image_url, png, text, user
from tests.server.serving import left, until
from tests.trained import release_folder

OPTIONS = ServerOptions(names=("demo",), max_images=4, max_soft_tokens=70)
OTHER = 255 - PICTURE
SAMPLING: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
CALLS = [
    {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}} for id, name in (("a", "look"), ("b", "peek"))
]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with gemcutter.load(release_folder(), media="auto", dtype="float32", context=1024, max_num_seqs=4) as found:
        yield found


@pytest.fixture(scope="module")
def sees(model: Model) -> Iterator[Running]:
    with running(model, OPTIONS) as found:
        yield found


def shown(*images: Any) -> list[dict[str, Any]]:
    """Return a conversation of the Python API: images, then the question."""
    return [user(*({"type": "image", "image": image} for image in images), text())]


def ask(sees: Running, *messages: Any, **more: Any) -> Any:
    """Send a chat completion and return the answer's body."""
    answer = sees.post("/v1/chat/completions", {"model": "demo", "messages": list(messages), **SAMPLING, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(sees: Running, *messages: Any, path: str = "/v1/chat/completions", **more: Any) -> dict[str, Any]:
    """Send what the server refuses, and return its error."""
    answer = sees.post(path, {"model": "demo", "messages": list(messages), "max_tokens": 4, **more})
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


# ---- the same prompt, whatever the API ----


def test_every_api_gives_the_reply_of_the_python_api(sees: Running, model: Model) -> None:
    wanted = model.chat(shown(PICTURE), max_soft_tokens=70, **SAMPLING)
    chats = openai.OpenAI(base_url=f"{sees.url}/v1", api_key="none", max_retries=0)
    asked: Any = [user(image_url(), text())]
    chat = chats.chat.completions.create(model="demo", messages=asked, **SAMPLING)
    assert chat.choices[0].message.content == wanted.text
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(wanted.prompt_tokens)
    parts: Any = [user({"type": "input_image", "image_url": data_url()}, {"type": "input_text", "text": QUESTION})]
    response = chats.responses.create(model="demo", input=parts, max_output_tokens=12, temperature=0)
    assert response.output_text == wanted.text
    theirs = anthropic.Anthropic(base_url=sees.url, api_key="none", max_retries=0)
    blocks: Any = [user(block(), text())]
    message = theirs.messages.create(model="demo", messages=blocks, max_tokens=12, extra_body={"temperature": 0})
    assert message.content[0].to_dict()["text"] == wanted.text
    counted = theirs.messages.count_tokens(model="demo", messages=blocks)
    assert counted.input_tokens == len(wanted.prompt_tokens)


def test_rows_of_images_are_counted(sees: Running) -> None:
    usage = ask(sees, user(image_url(), text(), image_url(OTHER)))["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 2 * ROWS
    body = {"model": "demo", "messages": [user(image_url(), text())], **SAMPLING, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    with httpx.stream("POST", f"{sees.url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    assert {json.loads(line)["usage"]["prompt_tokens_details"]["image_tokens"] for line in lines} == {ROWS}
    response = sees.post(
        "/v1/responses", {"model": "demo", "input": [user({"type": "input_image", "image_url": data_url()})]}
    ).json()
    assert response["usage"]["input_tokens_details"]["image_tokens"] == ROWS
    assert "image_tokens" not in ask(sees, user(text()))["usage"]["prompt_tokens_details"]


def test_tokenize_and_the_template_show_the_rows(sees: Running, model: Model) -> None:
    body = {"messages": [user(text("From"), image_url(), text("to"), image_url(OTHER))]}
    found = sees.post("/tokenize", body).json()
    given = [user(text("From"), {"type": "image", "image": PICTURE}, text("to"), {"type": "image", "image": OTHER})]
    assert found["tokens"] == list(model.prepare(given, max_soft_tokens=70).request.prompt)
    assert found["tokens"].count(PLACEHOLDER) == 2 * ROWS
    assert sees.post("/apply-template", body).json()["prompt"].count("<|image|>") == 2 * ROWS


def test_a_stream_says_the_same(sees: Running, model: Model) -> None:
    wanted = model.chat(shown(PICTURE, OTHER), max_soft_tokens=70, **SAMPLING).text
    theirs = anthropic.Anthropic(base_url=sees.url, api_key="none", max_retries=0)
    blocks: Any = [user(block(), block(OTHER), text())]
    with theirs.messages.stream(model="demo", messages=blocks, max_tokens=12, extra_body={"temperature": 0}) as stream:
        assert stream.get_final_message().content[0].to_dict()["text"] == wanted


def test_results_of_tools_may_be_images_in_any_order(sees: Running, model: Model) -> None:
    """They come in the order of the results, and are printed in the order of the calls."""
    asked, says = user(text("Look.")), {"role": "assistant", "content": None, "tool_calls": CALLS}
    results = [
        {"role": "tool", "tool_call_id": "b", "content": [text("peeked"), image_url(OTHER)]},
        {"role": "tool", "tool_call_id": "a", "content": [image_url()]},
    ]
    given = [
        {
            **result,
            "content": [part if part["type"] == "text" else {"type": "image", "image": image} for part in result["content"]],
        }
        for result, image in zip(results, (OTHER, PICTURE), strict=True)  # type: ignore[attr-defined]
    ]
    request = model.prepare([asked, says, *given], max_soft_tokens=70).request
    single = [model.prepare(shown(image), max_soft_tokens=70).request.media[0].digest for image in (PICTURE, OTHER)]
    assert [span.digest for span in request.media] == single
    body = {"messages": [asked, says, *results]}
    assert sees.post("/tokenize", body).json()["tokens"] == list(request.prompt)
    uses = [{"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}} for call in CALLS]  # type: ignore[index]
    blocks = [
        {"type": "tool_result", "tool_use_id": "b", "content": [text("peeked"), block(OTHER)]},
        {"type": "tool_result", "tool_use_id": "a", "content": [block()]},
    ]
    messages = [asked, {"role": "assistant", "content": uses}, {"role": "user", "content": blocks}]
    theirs = sees.post("/v1/messages/count_tokens", {"model": "demo", "messages": messages}).json()
    assert theirs == {"input_tokens": len(request.prompt)}
    items = [
        asked,
        *(
            {"type": "function_call", "call_id": call["id"], "name": call["function"]["name"], "arguments": "{}"}
            for call in CALLS
        ),  # type: ignore[index]
        {
            "type": "function_call_output",
            "call_id": "b",
            "output": [{"type": "input_text", "text": "peeked"}, {"type": "input_image", "image_url": data_url(OTHER)}],
        },
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image", "image_url": data_url()}]},
    ]
    response = sees.post("/v1/responses", {"model": "demo", "input": items, "max_output_tokens": 1}).json()
    assert response["usage"]["input_tokens"] == len(request.prompt)


def test_prefixes_are_shared_by_what_is_seen(sees: Running) -> None:
    first, second = np.roll(PICTURE, 5, axis=0), np.roll(PICTURE, 9, axis=0)
    cached = [
        ask(sees, user(image_url(image), text()))["usage"]["prompt_tokens_details"]["cached_tokens"]
        for image in (first, second, first)
    ]
    assert cached[0] < ROWS
    assert cached[1] < ROWS
    assert cached[2] > ROWS


# ---- how many rows an image gets ----


def test_budgets_of_parts_requests_and_the_server(sees: Running) -> None:
    def rows(*parts: Any, **more: Any) -> int:
        found = ask(sees, user(*parts), max_tokens=1, **{k: v for k, v in more.items() if k != "max_tokens"})
        return int(found["usage"]["prompt_tokens_details"]["image_tokens"])

    assert rows(image_url()) == 60
    assert rows(image_url(), max_soft_tokens=140) == 126
    assert rows(image_url(), mm_processor_kwargs={"max_soft_tokens": 140}) == 126
    assert rows(image_url(max_soft_tokens=140)) == 126
    assert rows({**image_url(), "max_soft_tokens": 140}, image_url(OTHER), text()) == 126 + 60
    assert rows(image_url(detail="low"), max_soft_tokens=140) == 60
    assert rows(image_url(detail="auto"), max_soft_tokens=140) == 126


@pytest.mark.parametrize(("detail", "most"), [("low", 70), ("high", 1120), ("original", 1120), ("auto", None), (None, None)])
def test_detail_is_a_budget(detail: str | None, most: int | None) -> None:
    assert image_part("data:;base64,AA", "x", detail).get("max_soft_tokens") == most
    assert image_part("data:;base64,AA", "x", detail, 280)["max_soft_tokens"] == 280


@pytest.mark.parametrize(
    ("detail", "soft_tokens", "param"), [("best", None, "x.detail"), (7, None, "x.detail"), (None, 100, "x.max_soft_tokens")]
)
def test_a_budget_there_is_not_is_refused(detail: object, soft_tokens: object, param: str) -> None:
    with pytest.raises(FieldError) as found:
        image_part("data:;base64,AA", "x", detail, soft_tokens)
    assert found.value.param == param


@pytest.mark.parametrize(
    ("soft_tokens", "processor", "param"),
    [(1, None, "max_soft_tokens"), (None, {"fps": 1}, "mm_processor_kwargs.fps"), (None, {"max_soft_tokens": 1}, None)],
)
def test_what_a_request_says_of_all_images_is_checked(soft_tokens: object, processor: Any, param: str | None) -> None:
    with pytest.raises(FieldError) as found:
        of_request(soft_tokens, processor)
    assert found.value.param == (param or "mm_processor_kwargs.max_soft_tokens")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("part", "param", "message"),
    [
        (image_url(b"no image"), "image_url", "no image that can be read"),
        (image_url(b"%PDF-1.7"), "image_url", "a PDF document"),
        (image_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "image_url", "an SVG drawing"),
        (image_url(png()[:200]), "image_url", "is the file damaged?"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAA"}}, "image_url", "was it cut off?"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,A*=="}}, "image_url", "the base64 can't be read"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, "image_url", "without data"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,AAAA"}}, "image_url", "not base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, "image_url", "without a comma"),
        ({"type": "image_url", "image_url": {"url": "lamp.png"}}, "image_url", "expected a URL"),
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "image_url", "addresses are not followed"),
        ({"type": "image_url", "image_url": {}}, "image_url", "expected a string"),
        ({"type": "image_url"}, "image_url", "expected a string"),
        (image_url(detail="best"), "image_url.detail", "expected one of low"),
        (image_url(max_soft_tokens=100), "image_url.max_soft_tokens", "expected one of 70"),
        (image_url(drawing(20, 900), max_soft_tokens=280), None, "position table"),
        ({"type": "input_image", "file_id": "file-1"}, "file_id", "files are not kept"),
        ({"type": "film"}, "type", "a part of type 'film'"),
        ({"type": "video"}, "video_url", "expected a string"),
    ],
    ids=str,
)
def test_what_cannot_be_seen_is_refused_by_name(sees: Running, part: Any, param: str | None, message: str) -> None:
    error = refused(sees, user(text("Look: "), part))
    assert message in error["message"]
    assert param is None or error["param"] == f"messages[0].content[1].{param}"


def test_other_apis_name_their_own_fields(sees: Running) -> None:
    answer = sees.post("/v1/responses", {"model": "demo", "input": [user({"type": "input_image", "image_url": data_url(b"no")})]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0].content[0].image_url")
    bad = {"type": "tool_result", "tool_use_id": "a", "content": [block(b"no")]}
    calls = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    error = refused(sees, user(text()), calls, user(bad), path="/v1/messages")
    assert "messages[2].content[0].content[0].source.data: no image that can be read" in error["message"]
    spoken = {"role": "system", "content": [{"type": "input_image", "image_url": data_url()}]}
    answer = sees.post("/v1/responses", {"model": "demo", "input": [spoken, user({"type": "input_text", "text": "Hi"})]})
    assert "input[0].content[0].image_url: images are read in messages of the user" in answer.json()["error"]["message"]


def test_files_of_the_server_are_none_of_a_clients_business(sees: Running, tmp_path: Path) -> None:
    file = tmp_path / "secret.png"
    file.write_bytes(png())
    for part in (
        {"type": "image", "path": str(file)},
        {"type": "image", "image": str(file)},
        {"type": "image", "url": str(file)},
        {"type": "image_url", "image_url": str(file)},
        {"type": "image_url", "image_url": {"url": f"file://{file}"}},
        {"type": "image", "image": f"file://{file}"},
        {"type": "audio", "path": str(file)},
        {"type": "audio", "audio": str(file)},
        {"type": "video", "path": str(file)},
        {"type": "video", "video": [str(file)]},
        {"type": "input_audio", "input_audio": {"data": f"file://{file}"}},
        {"type": "image", "image": ["a"]},
    ):
        error = refused(sees, user(part))
        assert error["param"].startswith("messages[0].content[0].")
        assert any(words in error["message"] for words in ("expected a", "not followed", "not read here", "base64"))


def test_more_images_than_the_limit_are_refused(sees: Running) -> None:
    error = refused(sees, user(*[image_url()] * 3), user(image_url()), user(image_url()))
    assert error["param"] == "messages[2].content[0].image_url"
    assert "at most 4 images in a request, found 5" in error["message"]


def test_a_server_without_a_tower_says_what_helps(demo: Model) -> None:
    with running(demo, OPTIONS) as blind:
        error = refused(blind, user(image_url()))
        assert "this model has no vision tower" in error["message"]
        assert error["param"] == "messages[0].content[0].image_url"
    with gemcutter.load(release_folder(), context=256) as unasked, running(unasked, OPTIONS) as blind:
        assert "start it with --media image" in refused(blind, user(image_url()))["message"]


# ---- nobody waits for somebody else's image ----


@pytest.fixture
def held(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Hold the tower: an event that is set when it was called, and one that lets it go on."""
    assert model.media is not None
    called, go = threading.Event(), threading.Event()

    def holds(self: VisionTower, images: Any, body: Any = None, encode: Any = VisionTower.encode) -> Any:
        called.set()
        assert go.wait(60)
        return encode(self, images, body)

    monkeypatch.setattr(VisionTower, "encode", holds)
    yield called, go
    go.set()


def test_text_goes_on_while_an_image_is_read(sees: Running, held: tuple[threading.Event, threading.Event]) -> None:
    called, go = held
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, sees, user(image_url(np.roll(PICTURE, shift, axis=1)))) for shift in (11, 12, 13)]
        assert called.wait(60)
        assert ask(sees, user(text("Hi")))["choices"][0]["message"]["content"]
        assert sees.get("/health").status_code == 200
        assert not any(each.done() for each in waiting)
        go.set()
        assert all(each.result()["choices"] for each in waiting)


def test_images_of_a_client_that_left_are_not_read(sees: Running, held: tuple[threading.Event, threading.Event]) -> None:
    called, go = held
    admission = sees.service.admission
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(ask, sees, user(image_url(np.roll(PICTURE, shift, axis=1)))) for shift in (21, 22)]
        assert called.wait(60)
        until(lambda: admission.requests == 2)
        body = {"model": "demo", "messages": [user(image_url(np.roll(PICTURE, 23, axis=1)))], **SAMPLING}
        left(sees.url, "/v1/chat/completions", body, lambda: admission.requests == 3)
        until(lambda: admission.requests == 2)
        go.set()
        assert all(each.result()["choices"] for each in first)
    until(lambda: admission.requests == 0)


def test_bytes_of_images_are_not_taken_for_text(sees: Running, model: Model) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    with running(model, ServerOptions(names=("demo",), max_queued_tokens=400, max_soft_tokens=70)) as small:
        admission = small.service.admission
        body = {"model": "demo", "messages": [user(image_url(noise))], "max_tokens": 2}
        assert len(json.dumps(body)) > 4 * 400 * 4
        with_waiting = admission.enter(10)
        assert small.post("/v1/chat/completions", body).status_code == 200
        answer = small.post("/v1/chat/completions", {**body, "messages": [user(text("lamp " * 4000))]})
        assert answer.status_code == 429
        with_waiting.leave()


def test_metrics_count_images_and_those_that_were_known(sees: Running) -> None:
    def counts() -> list[float]:
        text = sees.get("/metrics").text
        names = ("mm_cache_queries_total", "mm_cache_hits_total", "mm_items_total")
        found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] != "#"}
        return [sum(value for key, value in found.items() if key.startswith(f"vllm:{name}")) for name in names]

    before, new = counts(), np.roll(PICTURE, 31, axis=0)
    ask(sees, user(image_url(new), image_url(new, max_soft_tokens=140), text()))
    ask(sees, user(image_url(new), text()))
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [3, 1, 3]
    assert 'vllm:mm_items_total{engine="0",modality="image",model_name="demo"}' in sees.get("/metrics").text


def test_base64_may_be_wrapped_in_lines_and_quoted(sees: Running) -> None:
    wanted = sees.post("/tokenize", {"messages": [user(image_url())]}).json()
    data = data_url().partition(",")[2]
    lines = "\r\n".join(data[at : at + 76] for at in range(0, len(data), 76))
    for spelled in (lines, data.replace("+", "%2B").replace("=", "%3D"), f" {data}\n"):
        part = {"type": "image_url", "image_url": {"url": f"DATA:image/png;charset=utf-8;BASE64,{spelled}"}}
        assert sees.post("/tokenize", {"messages": [user(part)]}).json() == wanted
