"""A server over the demo model, on a free port of loopback, for all tests of a module.

With GEMCUTTER_TEST_RANKS=2 every model here runs on two tensor-parallel ranks, with GEMCUTTER_TEST_STAGES=2 in two stages of a
pipeline (`make ranks`): a client must not see it.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

import gemcutter
from gemcutter.api import Model
from gemcutter.server.app import create_app
from gemcutter.server.options import ServerOptions
from gemcutter.server.service import Service

START_S = 20.0
RANKS, STAGES = (int(os.environ.get(f"GEMCUTTER_TEST_{name}", "1")) for name in ("RANKS", "STAGES"))
if RANKS * STAGES > 1:
    gemcutter.load = functools.partial(gemcutter.load, tensor_parallel=RANKS, pipeline_parallel=STAGES)


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    url: str
    model: Model
    service: Service

    def post(self, path: str, body: object, **more: object) -> httpx.Response:
        """Send a JSON body."""
        return httpx.post(self.url + path, json=body, timeout=60, **more)  # type: ignore[arg-type]

    def get(self, path: str, **more: object) -> httpx.Response:
        """Ask for a path."""
        return httpx.get(self.url + path, timeout=60, **more)  # type: ignore[arg-type]

    def chat(self, text: str, **more: object) -> dict[str, object]:
        """Return a body of /v1/chat/completions, greedy."""
        return {"model": "demo", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16, **more}


@contextmanager
def running(model: Model, options: ServerOptions) -> Iterator[Running]:
    """Serve a model until the block ends."""
    app = create_app(model, options)
    taken = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
    thread.start()
    started = threading.Event()
    while not server.started:
        assert thread.is_alive()
        assert not started.wait(0.02)
    try:
        yield Running(f"http://127.0.0.1:{taken.getsockname()[1]}", model, app.state.service)
    finally:
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def demo() -> Iterator[Model]:
    with gemcutter.load("demo", context=2048, max_num_seqs=4) as model:
        yield model


@pytest.fixture(scope="module")
def server(demo: Model) -> Iterator[Running]:
    with running(demo, ServerOptions(names=("demo", "alias"))) as found:
        yield found
