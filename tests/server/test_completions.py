"""/v1/completions: raw prompts of every form, and scores as evaluation harnesses read them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running

TEXT = "The lamp was lit, and the keeper wrote it down."


def ask(server: Running, **body: Any) -> dict[str, Any]:
    answer = server.post("/v1/completions", {"model": "demo", "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_text_is_continued_as_the_model_does(server: Running) -> None:
    wanted = server.model.generate(TEXT, max_tokens=8, temperature=0)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.completions.create(model="demo", prompt=TEXT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == wanted.text
    assert answer.object == "text_completion"
    stream = client.completions.create(model="demo", prompt=TEXT, max_tokens=8, temperature=0, stream=True)
    assert "".join(each.choices[0].text for each in stream) == wanted.text


def test_all_forms_of_a_prompt_give_choices_in_their_order(server: Running) -> None:
    texts = [TEXT, "A storm came", "Who"]
    ids = [server.model.tokenizer.encode(text) for text in texts]
    wanted = [each.text for each in server.model.generate(texts, max_tokens=6, temperature=0)]
    for prompt in (texts, ids):
        found = ask(server, prompt=prompt, max_tokens=6)
        assert [choice["text"] for choice in found["choices"]] == wanted
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert ask(server, prompt=ids[0], max_tokens=6)["choices"][0]["text"] == wanted[0]
    twice = ask(server, prompt=texts[:2], max_tokens=6, n=2)
    assert [choice["text"] for choice in twice["choices"]] == [wanted[0], wanted[0], wanted[1], wanted[1]]


def test_sixteen_tokens_are_the_default(server: Running) -> None:
    assert ask(server, prompt=TEXT, ignore_eos=True)["usage"]["completion_tokens"] == 16


def harness_request(server: Running, ids: list[int]) -> dict[str, Any]:
    """Return the log-probabilities of a choice to the very request that lm-eval sends for scores."""
    found = ask(server, prompt=ids, max_tokens=1, logprobs=1, echo=True, seed=1234)
    (choice,) = found["choices"]
    assert choice["text"].startswith(server.model.tokenizer.decode(ids))
    told: dict[str, Any] = choice["logprobs"]
    return told


@pytest.mark.parametrize("with_bos", [True, False])
def test_scores_are_the_models_own_with_and_without_bos(server: Running, with_bos: bool) -> None:
    tokenizer = server.model.tokenizer
    ids = tokenizer.encode(TEXT)
    wanted = server.model.generate([ids], max_tokens=1, prompt_logprobs=1, temperature=0)[0].prompt.logprobs
    sent = ids if with_bos else ids[1:]
    told = harness_request(server, sent)
    assert all(len(values) == len(sent) + 1 for values in told.values())
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    start = 1 if with_bos else 2  # the first score that both have
    assert told["token_logprobs"][1:-1] == pytest.approx([each.logprob for each in wanted[start - 1 :]], abs=1e-4)
    for index in range(1, len(sent)):
        best = told["top_logprobs"][index]
        assert told["tokens"][index] in best
        is_greedy = wanted[start - 2 + index].top[0][0] == sent[index]
        assert (told["token_logprobs"][index] == max(best.values())) == is_greedy


def test_a_bos_that_nobody_wants_is_left_out(server: Running) -> None:
    ids = server.model.tokenizer.encode(TEXT)[1:]
    wanted = server.model.generate([ids], max_tokens=1, prompt_logprobs=1, temperature=0)[0].prompt.logprobs
    with running(server.model, ServerOptions(names=("demo",), bos_for_token_prompts="never")) as plain:
        told = harness_request(plain, ids)
    assert told["token_logprobs"][1:-1] == pytest.approx([each.logprob for each in wanted], abs=1e-4)


def test_offsets_point_into_the_text(server: Running) -> None:
    found = ask(server, prompt="Über 東京 🙂 lamp", max_tokens=6, logprobs=0, echo=True)["choices"][0]
    told, text = found["logprobs"], found["text"]
    assert told["text_offset"] == sorted(told["text_offset"])
    for token, start in zip(told["tokens"], told["text_offset"], strict=True):
        if token != "<bos>" and "\ufffd" not in token:
            assert text[start:].startswith(token)


def test_echo_alone_computes_no_reply(server: Running) -> None:
    found = ask(server, prompt=TEXT, max_tokens=0, echo=True, logprobs=1)
    assert found["choices"][0]["text"] == TEXT
    assert found["usage"]["completion_tokens"] == 0
    assert len(found["choices"][0]["logprobs"]["tokens"]) == len(server.model.tokenizer.encode(TEXT))


def test_a_stream_brings_log_probabilities_and_usage(server: Running) -> None:
    whole = ask(server, prompt=TEXT, max_tokens=6, logprobs=2)
    body = {"model": "demo", "prompt": TEXT, "max_tokens": 6, "logprobs": 2, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    *frames, usage = [json.loads(line) for line in lines[:-1]]
    told = [each["choices"][0]["logprobs"] for each in frames if each["choices"][0]["logprobs"]]
    for name, wanted in whole["choices"][0]["logprobs"].items():
        assert [value for each in told for value in each[name]] == wanted
    assert usage["usage"] == whole["usage"]
    assert lines[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ""}, None),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 100}, "logprobs"),
        ({"echo": True, "stream": True}, "echo"),
        ({"prompt": ["a"] * 129}, "prompt"),
    ],
)
def test_what_is_refused_names_the_field(server: Running, change: dict[str, Any], param: str | None) -> None:
    answer = server.post("/v1/completions", {"model": "demo", "prompt": TEXT, **change})
    if param is None:  # an empty text is <bos> alone
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
