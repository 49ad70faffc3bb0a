"""Two plain servers behind a router of somebody else's: its cache-aware policy works with our servers as they are.

Needs the wheels `sglang-router` or `vllm-router`; what is absent is skipped. Read `tests/replicas/` for replicas on Ray.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from bench.conversations import Counts, hold_all
from tests.server.test_serve_command import process, url_of

ROUTERS = ("sglang_router", "vllm_router")
START_S = 60.0
SERVER = ("--context", "2048", "--max-num-seqs", "4", "--threads", "1")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def router(package: str, policy: str, servers: list[str], folder: Path) -> Iterator[str]:
    """Start a router before servers and give its URL once it takes requests."""
    port, metrics = free_port(), free_port()
    command = [sys.executable, "-m", f"{package}.launch_router", "--worker-urls", *servers, "--policy", policy]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
    with (folder / f"{package}-{policy}.log").open("w") as log:
        found = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"NO_COLOR": "1"})
        try:
            wait_for(f"http://127.0.0.1:{port}/v1/models", found)
            yield f"http://127.0.0.1:{port}"
        finally:
            found.terminate()
            try:
                found.wait(15)
            except subprocess.TimeoutExpired:
                found.kill()
                found.wait(15)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, "the router has ended"
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{url} never answered")


@contextmanager
def servers() -> Iterator[list[str]]:
    """Start two servers, whose caches know of no other test."""
    with ExitStack() as stack:
        yield [url_of(stack.enter_context(process(*SERVER))[1]).removesuffix("/v1") for _ in range(2)]


def counted(url: str) -> int:
    """Return how many requests a server has answered."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(int(float(found)) for found in re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.MULTILINE))


def shared(package: str, policy: str, folder: Path, at_once: int) -> tuple[Counts, list[int]]:
    """Hold conversations behind a router; return what was cached of their later turns, and how many requests each server had."""
    with servers() as urls, router(package, policy, urls, folder) as url:
        return hold_all(url, range(12), 3, at_once), [counted(each) for each in urls]


@pytest.mark.parametrize("package", ROUTERS)
def test_conversations_stay_on_one_server(package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install {package.replace('_', '-')}")
    known, requests = shared(package, "cache_aware", tmp_path, at_once=3)  # what is new goes to the server with less to do
    assert sum(requests) == 36
    assert min(requests) >= 3, requests  # both serve
    unknown, _ = shared(package, "round_robin", tmp_path, at_once=1)  # so that turns alternate
    assert known.share > 0.65, (known.share, unknown.share, requests)
    assert known.share > unknown.share + 0.1, (known.share, unknown.share, requests)
