"""A server of the demo model on a free port, with the routes under test alone."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; it fails after a minute, which nothing here takes."""
    for _ in range(6_000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to be")


def left(url: str, path: str, body: object, once: Callable[[], bool]) -> None:
    """Send a request, and go away without having read anything as soon as something holds."""
    host, data = urlsplit(url), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host.hostname or "", host.port or 0)) as connection:
        connection.sendall(head.encode() + data)
        until(once)
