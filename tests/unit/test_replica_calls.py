"""What travels between the ingress and replicas, without Ray: texts of bodies, answers as bytes, merged counts, options."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import gemcutter
from gemcutter.errors import GemcutterError
from gemcutter.ray import ReplicaOptions
from gemcutter.ray.asgi_call import Part, answer
from gemcutter.ray.calls import MOST_CHARACTERS, Call, Head, prompt_of, read_body, session_of
from gemcutter.ray.merged_metrics import merged
from gemcutter.server.app import create_app
from gemcutter.server.options import ServerOptions

TURN = {"role": "user", "content": "What is a lantern?"}
REPLY = {"role": "assistant", "content": "A lamp."}
NEXT = {"role": "user", "content": "And a candle?"}


def test_a_conversation_that_goes_on_begins_as_before() -> None:
    first, second = ({"model": "m", "messages": messages} for messages in ([TURN], [TURN, REPLY, NEXT]))
    assert "What is a lantern?" in prompt_of(first)
    assert prompt_of(second).startswith(prompt_of(first))
    assert session_of(second) != session_of({"messages": [NEXT]})


def test_a_system_prompt_and_the_first_question_name_a_conversation() -> None:
    system = {"role": "system", "content": "Be brief."}
    opened = session_of({"messages": [system, TURN]})
    assert opened == session_of({"messages": [system, TURN, REPLY, NEXT]})
    assert session_of({"messages": [TURN]}) == session_of({"messages": [TURN, REPLY, NEXT]})
    assert opened != session_of({"messages": [system, NEXT]})
    assert opened != session_of({"messages": [system, TURN], "tools": [{"type": "function", "function": {"name": "f"}}]})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"system": "Be brief.", "messages": [TURN]}, ["Be brief.", "What is a lantern?"]),
        ({"instructions": "Be brief.", "input": "What?"}, ["Be brief.", "What?"]),
        ({"prompt": [5, 6, 7]}, ["5", "6", "7"]),
        ({"prompt": ["one", "two"], "tools": [{"name": "look_up"}]}, ["look_up", "one", "two"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "See"}]}]}, ["See"]),
    ],
)
def test_texts_of_every_api_come_in_the_order_of_a_prompt(body: dict[str, Any], words: list[str]) -> None:
    found = prompt_of(body)
    places = [found.index(word) for word in words]
    assert places == sorted(places)


def test_long_texts_are_cut_and_images_are_digests() -> None:
    assert len(prompt_of({"prompt": "word " * MOST_CHARACTERS})) == MOST_CHARACTERS
    assert prompt_of({"prompt": "燈" * 5000}) == "燈" * 5000
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    assert len(prompt_of({"messages": [{"role": "user", "content": [image]}]})) < 200


@pytest.mark.parametrize("body", [b"", b"no json", b"[1, 2]", b"\xff\xfe"])
def test_a_body_without_text_has_none(body: bytes) -> None:
    assert read_body(body) == {}
    assert prompt_of(read_body(body)) == session_of(read_body(body)) == ""


async def _read(source: AsyncGenerator[Part]) -> tuple[Head, bytes]:
    parts = [part async for part in source]
    assert isinstance(parts[0], Head)
    return parts[0], b"".join(part for part in parts[1:] if isinstance(part, bytes))


def call(path: str, body: object) -> Call:
    raw = json.dumps(body).encode()
    headers = ((b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode()))
    return Call("POST", path, b"", headers, raw)


def test_an_application_answers_calls_and_notices_that_a_reader_leaves() -> None:
    async def scene() -> None:
        with gemcutter.load("demo", context=2048, max_num_seqs=2) as model:
            app = create_app(model, ServerOptions(names=("demo",)))
            service = app.state.service
            service.start()
            body = {"model": "demo", "messages": [TURN], "temperature": 0, "max_tokens": 8}
            head, whole = await _read(answer(app, call("/v1/chat/completions", body)))
            assert (head.status, head.is_stream) == (200, False)
            text = json.loads(whole)["choices"][0]["message"]["content"]
            head, streamed = await _read(answer(app, call("/v1/chat/completions", body | {"stream": True})))
            assert head.is_stream
            frames = [json.loads(line[6:]) for line in streamed.decode().split("\n\n") if line.startswith("data: {")]
            assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames) == text
            head, refused = await _read(answer(app, call("/v1/chat/completions", {"model": "none", "messages": [TURN]})))
            assert head.status == 404, refused

            long = body | {"stream": True, "max_tokens": 1500, "ignore_eos": True}
            source = answer(app, call("/v1/chat/completions", long))
            assert isinstance(await anext(source), Head)
            await anext(source)
            await source.aclose()
            assert service.admission.requests == 0
            assert service.model.loop.run(lambda engine: engine.has_work) is False
            await service.stop()

    asyncio.run(scene())


def test_counts_of_replicas_stand_beside_each_other() -> None:
    page = b"# HELP vllm:prompt_tokens_total Tokens.\n# TYPE vllm:prompt_tokens_total counter\n"
    pages = [page + f'vllm:prompt_tokens_total{{engine="0",model_name="m"}} {count}\n'.encode() for count in (3, 4)]
    families = list(text_string_to_metric_families(merged(pages).decode()))
    assert len(families) == 1
    assert [(sample.labels["engine"], sample.value) for sample in families[0].samples] == [("0", 3.0), ("1", 4.0)]


def test_options_of_a_file_become_those_of_model_and_server() -> None:
    found = ReplicaOptions.read({"load": {"model": "demo", "media": ["image"]}, "server": {"api_keys": ["k"]}, "replicas": 2})
    assert (found.load.media, found.server.api_keys, found.server.names, found.replicas) == (("image",), ("k",), ("demo",), 2)
    assert (found.gpu_count, found.threshold, found.most_at_once) == (0.0, 4, 8 + 256)
    assert ReplicaOptions.read({"load": {"model": "demo"}, "gpus": 0.5}).gpu_count == 0.5


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"load": {"model": "demo"}, "replica": 2}, "replica: no option"),
        ({"load": {"model": "demo", "contxt": 2}}, "contxt"),
        ({"load": {"model": "demo", "context": 0}}, "context: expected 1 or more"),
        ({"load": "demo"}, "load: expected options by name"),
        ({"load": {"model": "demo"}, "replicas": 0}, "replicas: expected 1 or more"),
        ({"load": {"model": "demo"}, "replicas": 3, "max_replicas": 2}, "max_replicas: expected 3 or more"),
        ({"load": {"model": "demo"}, "routing": "random"}, "routing: expected one of prefix, hash, balanced"),
        ({"load": {"model": "demo"}, "server": {"store_bytes": 1}}, "store_bytes"),
        ({"load": {"model": "demo"}, "server": {"lora_root": "/a"}}, "use lora_root instead"),
        ({}, "model"),
    ],
)
def test_bad_options_are_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(GemcutterError) as found:
        ReplicaOptions.read(given)
    assert named in str(found.value)
