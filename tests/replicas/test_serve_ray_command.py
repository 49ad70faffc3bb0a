"""`gemcutter serve --ray` as a process: it serves, a signal ends it, and no process of its cluster is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.processes import descendants
from tests.replicas.conftest import until

pytest.importorskip("ray.serve", reason="replicas need Ray: pip install 'gemcutter[ray]'")

ROOT = Path(__file__).parents[2]
END_S = 90.0


def test_it_serves_and_a_signal_ends_all_of_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "gemcutter.cli", "serve", "demo", "--ray", "--replicas", "2", "--threads", "1"]
    command += ["--port", str(port), "--context", "2048"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    found = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert found.stderr is not None
    started = set[int]()
    try:
        url = next(served[1] for line in found.stderr if (served := re.search(r"serving on (\S+) as demo", line)))
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        assert httpx.post(f"{url}/chat/completions", json=body, timeout=60).status_code == 200
        started = descendants(found.pid)
        assert len(started) > 4
        found.send_signal(signal.SIGTERM)
        assert found.wait(END_S) == 0
    finally:
        if found.poll() is None:
            found.kill()
        found.wait(END_S)
        found.stderr.close()
    until(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()])
