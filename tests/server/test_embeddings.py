"""/v1/embeddings and /v1/score: vectors are the states that the Python API returns, pooled."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
import torch

from gemcutter import native
from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running

# Of a state's element; levels that round rows to bfloat16 turn the last bits of a float32 into a last bit of that.
TOLERANCE = 1e-2 if native.level() in ("avx512_bf16", "amx", "neon_i8mm") else 1e-4
TEXTS = ["The lamp was lit.", "A storm came over the sea", "Who"]


def states(server: Running, text: str) -> torch.Tensor:
    done = server.model.generate([text], max_tokens=0, hidden_states=True)[0]
    return torch.cat(done.prompt.hidden_states).float()


def ask(server: Running, **body: Any) -> dict[str, Any]:
    answer = server.post("/v1/embeddings", {"model": "demo", **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def vectors(found: dict[str, Any]) -> torch.Tensor:
    assert [each["index"] for each in found["data"]] == list(range(len(found["data"])))
    return torch.tensor([each["embedding"] for each in found["data"]])


def test_vectors_are_pooled_states_of_the_final_norm(server: Running) -> None:
    for pooling in ("mean", "last"):
        found = vectors(ask(server, input=TEXTS, pooling=pooling, normalize=False))
        for vector, text in zip(found, TEXTS, strict=True):
            states_MD = states(server, text)
            wanted = states_MD[-1] if pooling == "last" else states_MD[1:].mean(0)
            torch.testing.assert_close(vector, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_all_forms_of_input_give_the_same_unit_vectors(server: Running) -> None:
    found = ask(server, input=TEXTS)
    wanted = vectors(found)
    torch.testing.assert_close(wanted.norm(dim=1), torch.ones(len(TEXTS)))
    ids = [server.model.tokenizer.encode(text, bos=True) for text in TEXTS]
    count = sum(map(len, ids))
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    torch.testing.assert_close(vectors(ask(server, input=ids)), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(vectors(ask(server, input=ids[0])), wanted[:1], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(vectors(ask(server, input=TEXTS[0])), wanted[:1], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_official_client_reads_base64(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    packed = client.embeddings.create(model="demo", input=TEXTS[0])  # the client asks for base64 by itself
    plain = client.embeddings.create(model="demo", input=TEXTS[0], encoding_format="float")
    np.testing.assert_allclose(packed.data[0].embedding, plain.data[0].embedding, rtol=1e-5, atol=1e-7)
    assert len(plain.data[0].embedding) == states(server, TEXTS[0]).shape[1]


def test_scores_are_cosines_of_vectors(server: Running) -> None:
    units = vectors(ask(server, input=TEXTS))
    one = server.post("/v1/score", {"model": "demo", "text_1": TEXTS[0], "text_2": TEXTS}).json()
    assert [each["object"] for each in one["data"]] == ["score"] * 3
    found = torch.tensor([each["score"] for each in one["data"]])
    torch.testing.assert_close(found, units @ units[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    pairs = server.post("/v1/score", {"model": "demo", "text_1": TEXTS[:2], "text_2": TEXTS[1:]}).json()
    wanted = (units[:2] * units[1:]).sum(1)
    torch.testing.assert_close(torch.tensor([each["score"] for each in pairs["data"]]), wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", 1]}, "input[1]"),
        ("/v1/embeddings", {"input": [[]]}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "pooling": "max"}, "pooling"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": [10**9]}, "prompt"),
        ("/v1/embeddings", {"input": "word " * 3000}, "input"),
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "a"}, "text_2"),
    ],
)
def test_bad_bodies_are_400s_that_name_the_field(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    answer = server.post(path, {"model": "demo", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param), answer.text


def test_unknown_models_and_batches_over_the_limit_are_refused(server: Running) -> None:
    assert server.post("/v1/embeddings", {"model": "other", "input": "a"}).status_code == 404
    with running(server.model, ServerOptions(names=("demo",), max_batch=2)) as small:
        answer = small.post("/v1/embeddings", {"model": "demo", "input": TEXTS})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
