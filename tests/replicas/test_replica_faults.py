"""What becomes of requests when a replica is lost, and of replicas that can't serve: nothing is lost that had not begun."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gemcutter import native
from tests.processes import descendants, runs
from tests.replicas.conftest import MODEL, Deployed, deployed, until

LONG = {"model": "demo", "temperature": 0, "max_tokens": 600, "ignore_eos": True}
STREAMS, WHOLE = 6, 8
STREAM_TOKENS = 3000  # so many that the first stream still runs once the last one has begun


def chat(number: int, **more: object) -> dict[str, object]:
    """Return a body that no other request begins as."""
    return {**LONG, "messages": [{"role": "user", "content": f"{number * 7919} lanterns: what are they?"}], **more}


def read_stream(url: str, number: int, begun: threading.Semaphore) -> list[dict[str, Any] | str]:
    """Return the events of a stream, and say when it has begun."""
    found: list[dict[str, Any] | str] = []
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=chat(number, stream=True, max_tokens=STREAM_TOKENS), timeout=120
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]")
                if len(found) == 3:
                    begun.release()
    return found


def ongoing(found: Deployed) -> dict[str, int]:
    """Return how many requests each replica has."""
    import ray

    return {name: ray.get(actor.get_num_ongoing_requests.remote()) for name, actor in found.replicas().items()}


def lose_one(found: Deployed) -> str:
    """Kill a replica, as a machine that fails would, and return its name."""
    import ray

    name, actor = sorted(found.replicas().items())[0]
    ray.kill(actor, no_restart=True)
    return name


def test_requests_outlive_their_replica_unless_they_have_begun(cluster: str) -> None:
    model = {**MODEL, "context": 2 * STREAM_TOKENS}
    with (
        deployed(cluster, "faults", replicas=2, load=model, routing="balanced") as two,
        ThreadPoolExecutor(STREAMS + WHOLE) as pool,
    ):
        begun, streams = threading.Semaphore(0), list[Future[list[dict[str, Any] | str]]]()
        for number in range(STREAMS):  # one after the other, so that each goes to the shorter queue
            streams.append(pool.submit(read_stream, two.url, number, begun))
            assert begun.acquire(timeout=60)
        assert min(ongoing(two).values()) > 0
        whole = [pool.submit(two.post, "/v1/chat/completions", chat(100 + number)) for number in range(WHOLE)]
        lost = lose_one(two)
        ends = [each.result() for each in streams]
        for answer in (each.result() for each in whole):
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == LONG["max_tokens"]
        broken = [events for events in ends if isinstance(events[-2], dict) and "error" in events[-2]]
        assert all(events[-1] == "[DONE]" for events in ends)
        assert 0 < len(broken) < STREAMS
        for events in broken:
            assert events[-2]["error"]["type"] == "service_unavailable_error"  # type: ignore[index]
        for events in ends:
            if events not in broken:
                assert events[-2]["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
        until(lambda: len(two.replicas()) == 2 and lost not in two.replicas())


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_a_replica_that_lost_a_rank_is_replaced(cluster: str) -> None:
    model = {**MODEL, "dtype": "float32", "tensor_parallel": 2}
    with deployed(cluster, "ranks", replicas=1, load=model, threads=2) as one:
        (before,) = one.replicas()
        os.kill(rank_process(), signal.SIGKILL)
        until(lambda: before not in one.replicas() and one.running() == 1)
        answer = one.post("/v1/chat/completions", chat(1, max_tokens=4))
        assert answer.status_code == 200, answer.text


def rank_process() -> int:
    """Return the one process of a second rank that belongs to this program."""
    for pid in descendants(os.getpid()):
        if runs(pid, "gemcutter.rank_process"):
            return pid
    raise AssertionError("there is no second rank")


def test_replicas_come_with_requests(cluster: str) -> None:
    scaling = {"replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1.0, "upscale_delay_s": 0.0}
    with deployed(cluster, "scaling", **scaling) as found, ThreadPoolExecutor(6) as pool:
        assert found.running() == 1
        ended = threading.Event()

        def ask(number: int) -> list[int]:
            codes = list[int]()
            while not ended.is_set():
                codes.append(found.post("/v1/chat/completions", chat(number, max_tokens=1000)).status_code)
            return codes

        asked = [pool.submit(ask, number) for number in range(6)]
        try:
            until(lambda: found.running() == 2)
        finally:
            ended.set()
        assert {code for each in asked for code in each.result()} == {200}


def test_an_update_loses_no_request(cluster: str) -> None:
    from ray import serve

    from gemcutter.ray import deployment

    with deployed(cluster, "update", replicas=2) as two, ThreadPoolExecutor(4) as pool:
        before, ended, codes = set(two.replicas()), threading.Event(), list[int]()

        def ask(number: int) -> None:
            while not ended.is_set():
                codes.append(two.post("/v1/chat/completions", chat(number, max_tokens=48)).status_code)

        asked = [pool.submit(ask, number) for number in range(4)]
        try:
            changed = {"load": {**MODEL, "max_num_seqs": 3}, "replicas": 2, "health_check_period_s": 1.0}
            serve.run(deployment(changed), name="update", route_prefix="/update")
            until(lambda: two.running() == 2 and not before & set(two.replicas()))
            until(lambda: len(codes) > 20)  # how soon, the machine decides
        finally:
            ended.set()
        for each in asked:
            each.result()
        assert set(codes) == {200}
        assert len(codes) > 20
