"""Who shares cached prefixes with whom: requests of one salt, and where the operator wants it, of one key."""

from __future__ import annotations

from gemcutter.api import Model
from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running

QUESTION = "Tell me, at some length, what you know of lamps and of those who tend them by the sea."


def cached(server: Running, key: str = "", **more: object) -> int:
    """Return how many tokens of the question's prompt were found."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = server.post("/v1/chat/completions", server.chat(QUESTION, max_tokens=1, **more), headers=headers)
    assert answer.status_code == 200, answer.text
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_requests_of_one_salt_share_prefixes(server: Running) -> None:
    cached(server)
    most = cached(server)
    assert most > 10
    assert [cached(server, cache_salt=salt) for salt in ("a", "a", "b", "a")] == [0, most, 0, most]
    completion = {"model": "demo", "prompt": QUESTION, "max_tokens": 1, "cache_salt": "c"}
    found = [server.post("/v1/completions", completion).json()["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] > 0 for usage in found] == [False, True]
    refused = server.post("/v1/chat/completions", server.chat("Hi", cache_salt=""))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "cache_salt"
    metrics = server.get("/metrics").text
    counts = dict(line.split() for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_") and "{" in line)
    queries, hits = (next(float(count) for name, count in counts.items() if word in name) for word in ("queries", "hits"))
    assert queries > hits > 0


def test_requests_of_one_key_share_prefixes(demo: Model) -> None:
    with running(demo, ServerOptions(names=("demo",), api_keys=("one", "two"), prefix_cache_salt_per_key=True)) as server:
        counts = [cached(server, key) for key in ("one", "two", "one", "two")]
        assert counts[:2] == [0, 0]
        assert counts[2] == counts[3] > 10
        assert [cached(server, "one", cache_salt="s") for _ in range(2)] == [0, counts[2]]
    with running(demo, ServerOptions(names=("demo",), api_keys=("one", "two"))) as server:
        assert cached(server, "one") <= cached(server, "two") == counts[2], "by default all keys share"
