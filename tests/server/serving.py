"""Clients that leave, requests that fail: what tests of several routes need beside a server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from gemcutter.errors import RequestError


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


def failing(prompt: Any, reply: Any, logits: Any) -> Any:
    """Fail at the third token, as a logits processor: an error in the middle of a reply."""
    if len(reply) > 2:
        raise RequestError("the third token is too much")
    return logits
