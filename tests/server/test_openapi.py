"""The OpenAPI document against the server: what schemathesis draws from it, and what it says of errors.

Two ways for each route: bodies as the document allows them, most of which are refused, and the same bodies around a conversation
that can be served, so that all other fields reach the engine.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.server.conftest import Running

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")

# Of each route's body, what makes it one that can be served.
SERVED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "max_completion_tokens": 2},
    "/v1/completions": {"prompt": "A lamp", "max_tokens": 2},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 16, "previous_response_id": None},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "A lamp", "messages": None},
    "/detokenize": {"tokens": [5, 6]},
    "/apply-template": {"messages": [{"role": "user", "content": "Hi"}], "prompt": None},
    "/v1/embeddings": {"input": "A lamp"},
    "/v1/score": {"text_1": "A lamp", "text_2": "A light"},
}
ROUTES = sorted(SERVED)
FORMS = ["/v1/audio/transcriptions", "/v1/audio/translations"]  # with a file: this model hears nothing
DRAWN = 12  # bodies a route, so that the file takes seconds
quick = settings(
    max_examples=DRAWN, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


def check(answer: httpx.Response, path: str) -> None:
    """Fail unless an answer is one that the document tells of: no 5xx, and errors in the API's own shape."""
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        return
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    if path.startswith("/v1/messages"):
        assert set(answer.json()) == {"type", "error", "request_id"}
        assert set(error) == {"type", "message"}
    else:
        assert set(error) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_drawn_from_the_document_never_end_in_a_5xx(server: Running, document: Any, path: str) -> None:
    @seed(1)
    @quick
    @given(case=document[path]["POST"].as_strategy(), is_served=st.booleans())
    def run(case: Any, is_served: bool) -> None:
        body = case.body
        if is_served and isinstance(body, dict):
            body = {**body, "model": "demo", "n": 1, **SERVED[path]}
        check(server.post(path, body), path)

    run()


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_called_served_here_is_served(server: Running, path: str) -> None:
    answer = server.post(path, {"model": "demo", **SERVED[path]})
    assert answer.status_code == 200, answer.text


def test_the_document_tells_of_the_errors_that_are_sent(server: Running) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method in methods.values():
            assert "422" not in method["responses"], path
            shape = method["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"]
            assert shape.endswith("/AnthropicErrorBody" if path.startswith("/v1/messages") else "/OpenAIErrorBody")


def test_the_document_covers_every_route_with_a_body(server: Running) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert sorted(path for path, methods in paths.items() if "requestBody" in methods.get("post", {})) == sorted(
        [*ROUTES, *FORMS]
    )


@pytest.mark.parametrize("path", FORMS)
def test_forms_drawn_at_random_never_end_in_a_5xx(server: Running, path: str) -> None:
    names = (
        "model",
        "language",
        "to_language",
        "prompt",
        "response_format",
        "temperature",
        "stream",
        "timestamp_granularities[]",
    )
    words = st.sampled_from(["demo", "en", "json", "text", "verbose_json", "word", "0.5", "true", ""]) | st.text(max_size=8)

    @seed(1)
    @quick
    @given(fields=st.dictionaries(st.sampled_from(names), words), file=st.none() | st.binary(max_size=40))
    def run(fields: dict[str, str], file: bytes | None) -> None:
        files = {"file": ("a", b"" if file is None else file)}
        check(httpx.post(server.url + path, data=fields, files=files if file is not None else None, timeout=60), path)

    run()
