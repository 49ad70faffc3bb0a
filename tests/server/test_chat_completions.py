"""/v1/chat/completions as clients use it: whole, streamed, through openai's own client, and everything that is refused."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import httpx
import openai
import pytest

from gemcutter.server import chat_task
from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running
from tests.server.serving import until

ASK = [{"role": "user", "content": "What is a lantern?"}]


def client(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def frames(server: Running, body: object) -> list[Any]:
    """Return the data of all frames of a stream, the last one as text."""
    found = []
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(line.removeprefix("data: "))
    assert found[-1] == "[DONE]"
    return [json.loads(each) for each in found[:-1]]


def test_the_answer_is_the_models_own(server: Running) -> None:
    wanted = server.model.chat(ASK, max_tokens=16, temperature=0)
    answer = client(server).chat.completions.create(model="demo", messages=ASK, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (wanted.text, "assistant")
    assert choice.finish_reason == wanted.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(wanted.prompt_tokens)
    assert answer.usage.completion_tokens == len(wanted.tokens)
    assert answer.object == "chat.completion"


def test_a_stream_says_the_same_in_the_order_that_clients_demand(server: Running) -> None:
    wanted = server.model.chat(ASK, max_tokens=16, temperature=0)
    found = frames(server, {**server.chat("What is a lantern?"), "stream": True, "stream_options": {"include_usage": True}})
    assert len({each["id"] for each in found}) == 1
    assert all(each["object"] == "chat.completion.chunk" and each["created"] and each["model"] == "demo" for each in found)
    first, *middle, last, usage = found
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["choices"][0]["delta"]["content"] for each in middle) == wanted.text
    assert all(each["choices"][0]["finish_reason"] is None and each["usage"] is None for each in (first, *middle))
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, wanted.finish_reason)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(wanted.tokens)


def test_openais_stream_helper_reads_to_the_end(server: Running) -> None:
    wanted = server.model.chat(ASK, max_tokens=64, temperature=0)
    with client(server).chat.completions.stream(model="demo", messages=ASK, max_tokens=64, temperature=0) as stream:  # type: ignore[arg-type]
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == wanted.text
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)


def test_running_usage_is_in_every_chunk(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = frames(server, {**server.chat("Hi"), "stream": True, "stream_options": options})
    counts = [each["usage"]["completion_tokens"] for each in found]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > 1


def test_several_replies_of_one_seed_are_different_and_repeatable(server: Running) -> None:
    body = server.chat("Tell me a story.", temperature=1.5, n=3, seed=5)
    first, second = (server.post("/v1/chat/completions", body).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    streamed = frames(server, {**body, "stream": True})
    for index, text in enumerate(texts):
        parts = [each["choices"][0] for each in streamed if each["choices"][0]["index"] == index]
        assert "".join(part["delta"].get("content", "") for part in parts) == text


def test_log_probabilities_are_the_models(server: Running) -> None:
    wanted = server.model.chat(ASK, max_tokens=5, temperature=0, logprobs=3)
    body = server.chat("What is a lantern?", max_tokens=5, logprobs=True, top_logprobs=3)
    content = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert [each["logprob"] for each in content] == pytest.approx([each.logprob for each in wanted.logprobs])
    assert all(len(each["top_logprobs"]) == 3 for each in content)
    assert b"".join(bytes(each["bytes"]) for each in content).decode() == wanted.text
    streamed = frames(server, {**body, "stream": True})
    told = [entry for each in streamed for entry in (each["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert told == content


def test_a_stop_string_ends_the_text(server: Running) -> None:
    text = server.model.chat(ASK, max_tokens=16, temperature=0).text
    stop = text[4:7]
    found = server.post("/v1/chat/completions", server.chat("What is a lantern?", stop=stop)).json()["choices"][0]
    assert found["message"]["content"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]}, 400, None),
        ({"messages": "Hi"}, 400, "messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 99}, 400, "n"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias.x"),
        ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"max_tokens": 4000}, 400, "messages"),
        ({"functions": [{"name": "f"}]}, 400, "functions"),
        ({"audio": {"voice": "a"}}, 400, "audio"),
        ({"modalities": ["text", "audio"]}, 400, "modalities"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
        ({"tools": [{"type": "magic"}]}, 400, "tools[0].type"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice.function.name"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ],
)
def test_what_is_refused_names_the_field(server: Running, change: dict[str, Any], status: int, param: str | None) -> None:
    answer = server.post("/v1/chat/completions", {**server.chat("Hi"), **change})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param, error
    assert answer.headers["x-should-retry"] == "false"


def test_a_body_that_is_no_json_is_a_400(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_too_long_a_conversation_is_told_as_clients_know_it(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(server).chat.completions.create(model="demo", messages=ASK, max_tokens=2048)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 2048 tokens" in str(caught.value)


def test_dirty_fields_of_clients_are_taken(server: Running) -> None:
    more = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "unknown_field": 1,
        "top_k": -1,
        "seed": -3,
    }
    answer = server.post("/v1/chat/completions?beta=true", server.chat("Hi", **more), headers={"x-request-id": "mine"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"] == "mine"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}


def test_calls_are_streamed_and_sent_back(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo calls nothing by itself: its tokens are made to spell a call."""
    said = 'Well.<|tool_call>call:f{x:<|"|>a "b" \\n<|"|>}<tool_call|>'
    ids = [*server.model.tokenizer.encode(said, bos=False), server.model.tokenizer.id_of("<|tool_response>")]

    def script(prompt: Any, reply: Any, logits: Any) -> Any:
        logits.fill_(-1e9)[ids[len(reply)]] = 0.0
        return logits

    monkeypatch.setattr(chat_task, "_thinking_budget", lambda *_: script)
    body = server.chat("Hi", tools=[TOOL], max_tokens=64)
    (choice,) = server.post("/v1/chat/completions", body).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Well.")
    assert json.loads(call["function"]["arguments"]) == {"x": 'a "b" \\n'}
    found = frames(server, {**body, "stream": True})
    deltas = [each["choices"][0]["delta"] for each in found]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert (calls[0]["type"], calls[0]["function"]["name"]) == ("function", "f")
    assert all(each["index"] == 0 for each in calls)
    assert not any("id" in each or "name" in each["function"] for each in calls[1:])
    assert "".join(each["function"]["arguments"] for each in calls) == call["function"]["arguments"]
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"
    monkeypatch.undo()
    result = {"role": "tool", "tool_call_id": call["id"], "content": "<turn|>ten"}
    history = [{"role": "user", "content": "Hi"}, choice["message"], result]
    prompt = server.post("/apply-template", {"messages": history, "tools": [TOOL]}).json()["prompt"]
    assert 'call:f{x:<|"|>a "b" \\n<|"|>}<tool_call|>' in prompt
    assert server.post("/v1/chat/completions", {**body, "messages": history, "max_tokens": 2}).status_code == 200


def test_a_reply_that_comes_back_is_found_in_the_cache(server: Running) -> None:
    """Its ids are those that the model wrote, however its text would be encoded."""
    known = len(server.model.replies)
    first = server.post("/v1/chat/completions", server.chat("Tell me of the sea, please.", max_tokens=24)).json()
    until(lambda: len(server.model.replies) > known)
    history = [{"role": "user", "content": "Tell me of the sea, please."}, first["choices"][0]["message"]]
    second = server.chat("", max_tokens=2, messages=[*history, {"role": "user", "content": "And?"}])
    used = server.post("/v1/chat/completions", second).json()["usage"]
    before = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert used["prompt_tokens_details"]["cached_tokens"] >= before - 1


def test_none_bans_calls_and_keeps_the_prompt(server: Running) -> None:
    bodies = [server.chat("Hi", tools=[TOOL], max_tokens=4, **more) for more in ({}, {"tool_choice": "none"})]
    auto, none = (server.post("/v1/chat/completions", body).json() for body in bodies)
    assert auto["usage"]["prompt_tokens"] == none["usage"]["prompt_tokens"]
    assert "tool_calls" not in none["choices"][0]["message"]


def aborts(server: Running) -> float:
    """Return how many requests were cancelled so far."""
    found = re.findall(r'^vllm:request_success_total\{.*="abort".*\} (\S+)$', server.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def test_a_reader_that_leaves_ends_its_request(server: Running) -> None:
    before = aborts(server)
    body = server.chat("Tell me a long story.", max_tokens=1900, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    until(lambda: server.service.admission.requests == 0 and not server.model.engine.has_work)
    assert aborts(server) == before + 1


def test_a_client_that_leaves_before_the_whole_answer_ends_its_request(server: Running) -> None:
    before = aborts(server)
    body = server.chat("Tell me a long story.", max_tokens=1900, ignore_eos=True)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=httpx.Timeout(10, read=0.05))
    until(lambda: server.service.admission.requests == 0 and not server.model.engine.has_work)
    assert aborts(server) == before + 1


def test_keys_are_demanded_but_not_of_operators(server: Running) -> None:
    with running(server.model, ServerOptions(names=("demo",), api_keys=("one", "two"))) as locked:
        for headers in ({}, {"authorization": "Bearer three"}, {"x-api-key": ""}, {"authorization": "one"}):
            answer = locked.post("/v1/chat/completions", locked.chat("Hi"), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert locked.post("/v1/messages", {}).json()["error"]["type"] == "authentication_error"
        assert client(locked, "two").chat.completions.create(model="demo", messages=ASK, max_tokens=2).choices  # type: ignore[arg-type]
        assert locked.get("/v1/models", headers={"x-api-key": "one"}).status_code == 200
        assert all(locked.get(path).status_code == 200 for path in ("/health", "/ready", "/ping", "/version", "/metrics"))


def test_a_full_queue_answers_429(server: Running) -> None:
    with running(server.model, ServerOptions(names=("demo",), max_queue=0)) as small:
        small.service.admission.max_requests = 1
        ticket = small.service.admission.enter(1)
        refused = small.post("/v1/chat/completions", small.chat("Hi"))
        ticket.leave()
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert refused.headers["x-should-retry"] == "true"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert small.post("/v1/chat/completions", small.chat("Hi", max_tokens=2)).status_code == 200
        assert 'vllm:admission_rejections_total{engine="0",model_name="demo"} 1.0' in small.get("/metrics").text


def test_prompt_tokens_that_wait_are_bounded(server: Running) -> None:
    with running(server.model, ServerOptions(names=("demo",), max_queued_tokens=64)) as small:
        small.service.admission.tokens = 60
        try:
            assert small.post("/v1/chat/completions", small.chat("word " * 200)).status_code == 429
        finally:
            small.service.admission.tokens = 0


def test_a_huge_body_is_a_413(server: Running) -> None:
    with running(server.model, ServerOptions(names=("demo",), max_body_bytes=10_000)) as small:
        answer = small.post("/v1/chat/completions", small.chat("x" * 20_000))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        pieces = (b"x" * 1000 for _ in range(20))  # which nobody has counted
        answer = httpx.post(f"{small.url}/v1/chat/completions", content=pieces, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_request_may_take_only_so_long(server: Running) -> None:
    with running(server.model, ServerOptions(names=("demo",), request_timeout_s=0.1)) as hasty:
        found = httpx.post(
            f"{hasty.url}/v1/chat/completions", json=hasty.chat("Go on.", max_tokens=2000, ignore_eos=True), timeout=60
        )
        assert found.status_code == 408
        assert "longer than 0.1 s" in found.json()["error"]["message"]


def test_draining_lets_requests_end_and_takes_no_more(server: Running) -> None:
    with running(server.model, ServerOptions(names=("demo",))) as ending:
        ending.service.admission.is_draining = True
        assert ending.get("/ready").status_code == 503
        refused = ending.post("/v1/chat/completions", ending.chat("Hi"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert ending.get("/health").status_code == 200


def test_an_error_in_a_step_ends_a_stream_with_an_error_frame(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret words")

    monkeypatch.setattr(server.model.engine.runner, "launch", fail)
    found = frames(server, server.chat("Hi", stream=True))
    assert "error" in found[-1]
    assert set(found[-1]["error"]) == {"message", "type", "param", "code"}
    monkeypatch.undo()
    assert server.post("/v1/chat/completions", server.chat("Hi", max_tokens=2)).status_code == 200


def test_streams_side_by_side_do_not_mix(server: Running) -> None:
    questions = [f"Tell me about the number {number}." for number in range(12)]
    wanted = [server.model.chat(question, max_tokens=24, temperature=0).text for question in questions]
    found = dict[int, str]()

    def ask(number: int) -> None:
        parts = frames(server, server.chat(questions[number], max_tokens=24, stream=True))
        found[number] = "".join(each["choices"][0]["delta"].get("content", "") for each in parts)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(len(questions))] == wanted
