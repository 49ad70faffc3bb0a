"""The routes beside the completions: models, tokens, templates, metrics, and what no route answers."""

from __future__ import annotations

import anthropic
import openai
import pytest

import gemcutter
from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running


def test_both_clients_read_the_list_of_models(server: Running) -> None:
    theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models
    assert [each.id for each in theirs.list()] == ["demo", "alias"]
    assert theirs.retrieve("alias").id == "alias"
    others = anthropic.Anthropic(base_url=server.url, api_key="none").models
    assert [each.id for each in others.list()] == ["demo", "alias"]
    assert server.get("/v1/models/other").status_code == 404
    assert server.get("/v1/models").json()["data"][0]["max_model_len"] == 2048


def test_a_star_answers_any_name(server: Running) -> None:
    with running(server.model, ServerOptions(names=("demo", "*"))) as any_name:
        answer = any_name.post("/v1/chat/completions", {**any_name.chat("Hi", max_tokens=2), "model": "claude-haiku"})
        assert answer.json()["model"] == "claude-haiku"
        assert [each["id"] for each in any_name.get("/v1/models").json()["data"]] == ["demo"]


def test_tokens_there_and_back(server: Running) -> None:
    tokenizer = server.model.tokenizer
    found = server.post("/tokenize", {"prompt": "A lamp", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode("A lamp")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 2048)
    assert "".join(found["token_strs"]) == "<bos>A lamp"
    assert server.post("/detokenize", {"tokens": found["tokens"][1:]}).json() == {"prompt": "A lamp"}
    assert server.post("/tokenize", {"prompt": "<eos>", "add_special_tokens": False}).json()["tokens"] == [
        tokenizer.id_of("<eos>")
    ]


def test_conversations_are_shown_as_the_model_sees_them(server: Running) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = server.model.encode(messages)
    assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == ids
    assert server.post("/apply-template", {"messages": messages}).json()["prompt"] == server.model.tokenizer.decode(
        ids, special=True
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/apply-template", {"prompt": "a"}),
        ("/apply-template", {"messages": [{"role": "user"}]}),
    ],
)
def test_bad_bodies_are_400s(server: Running, path: str, body: object) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"]


def test_tokenizer_info_is_told_on_request_only(server: Running) -> None:
    assert server.get("/tokenizer_info").status_code == 404
    with running(server.model, ServerOptions(names=("demo",), tokenizer_info=True)) as telling:
        assert telling.get("/tokenizer_info").json()["bos_token"] == "<bos>"


def test_metrics_have_the_names_that_dashboards_know(server: Running) -> None:
    server.post("/v1/chat/completions", server.chat("Hi", max_tokens=4))
    answer = server.get("/metrics", follow_redirects=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    for name in ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count", "num_requests_running"):
        assert f'vllm:{name}{{engine="0",model_name="demo"}}' in answer.text, name
    assert "_created" not in answer.text


def test_the_rest(server: Running) -> None:
    assert server.get("/version").json() == {"version": gemcutter.__version__}
    lost = server.get("/v1/nothing")
    assert (lost.status_code, set(lost.json()["error"])) == (404, {"message", "type", "param", "code"})
    assert server.get("/v1/chat/completions").status_code == 405
