"""A Ray cluster on this machine for the tests of replicas, which leaves no process behind; skipped where Ray is not installed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import descendants

CPUS = 8  # that Ray is told of: replicas that mostly wait share the real ones
SOON_S = 60.0
MODEL = {"model": "demo", "context": 2048, "max_num_seqs": 4}


class Deployed:
    """An application on the cluster."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url

    def post(self, path: str, body: object, **more: Any) -> httpx.Response:
        """Send a JSON body."""
        return httpx.post(self.url + path, json=body, timeout=SOON_S, **more)

    def get(self, path: str) -> httpx.Response:
        """Ask for a path."""
        return httpx.get(self.url + path, timeout=SOON_S)

    def replicas(self) -> dict[str, Any]:
        """Return the actors of the model's deployment that are there, by name."""
        import ray

        start, found = f"SERVE_REPLICA::{self.name}#gemcutter#", {}
        for each in ray.util.list_named_actors(all_namespaces=True):
            if each["name"].startswith(start):
                found[each["name"]] = ray.get_actor(each["name"], namespace=each["namespace"])
        return found

    def running(self) -> int:
        """Return how many replicas of the model run, as Serve says."""
        from ray import serve

        return int(serve.status().applications[self.name].deployments["gemcutter"].replica_states.get("RUNNING", 0))


def until(holds: Any, most_s: float = SOON_S) -> None:
    """Wait until something holds."""
    end = time.monotonic() + most_s
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Start a cluster and its HTTP proxy, and give the proxy's URL."""
    pytest.importorskip("ray.serve", reason="replicas need Ray: pip install 'gemcutter[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    before = descendants(os.getpid())
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, logging_level="warning")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    started = descendants(os.getpid()) - before
    serve.shutdown()
    ray.shutdown()
    until(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()])


@contextmanager
def deployed(cluster: str, name: str, **options: Any) -> Iterator[Deployed]:
    """Serve an application under a path of its own until the block ends."""
    from ray import serve

    from gemcutter.ray import deployment

    with_model = {"load": MODEL, "health_check_period_s": 1.0, **options}
    serve.run(deployment(with_model), name=name, route_prefix=f"/{name}")
    try:
        yield Deployed(name, f"{cluster}/{name}")
    finally:
        serve.delete(name)
