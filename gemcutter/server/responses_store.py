"""Conversations kept for `previous_response_id`, bounded in number, bytes and time.

Owns what is remembered of a response: all items up to and with its output. Refuses to know HTTP and the engine. It may be used
from several threads. Read `routes/responses.py` for who asks.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it was sent, and the conversation that ends in it; `size` is that of its JSON in bytes."""

    response: Item
    items: tuple[Item, ...]
    size: int
    expires_s: float


class ResponsesStore:
    """The last responses by id: the oldest are forgotten first, where the bounds of bytes and number demand it.

    Items that conversations share are held once and counted for each of them, so that the bytes are an upper bound.
    """

    def __init__(
        self, max_bytes: int, *, max_responses: int = 10_000, ttl_s: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._max_responses, self._ttl_s, self._clock = max_bytes, max_responses, ttl_s, clock
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of responses that are kept."""
        return len(self._stored)

    @property
    def bytes(self) -> int:
        """Return the size of what is kept."""
        return self._bytes

    def get(self, id: str) -> StoredResponse | None:
        """Return a response, None if it is not kept, or no more."""
        with self._lock:
            self._expire()
            return self._stored.get(id)

    def put(self, response: Item, earlier: Sequence[Item], input: Sequence[Item]) -> bool:
        """Keep a response after the items of its conversation. Return False for one that is larger than the whole store."""
        items = (*earlier, *input, *response["output"])
        size = len(json.dumps([response, items]).encode())
        with self._lock:
            self._expire()
            if size > self._max_bytes:
                return False
            self._stored[response["id"]] = StoredResponse(response, items, size, self._clock() + self._ttl_s)
            self._bytes += size
            while self._bytes > self._max_bytes or len(self._stored) > self._max_responses:
                self._forget(next(iter(self._stored)))
            return True

    def delete(self, id: str) -> bool:
        """Forget a response. Return whether there was one."""
        with self._lock:
            self._expire()
            if id not in self._stored:
                return False
            self._forget(id)
            return True

    def _expire(self) -> None:
        """Forget what is too old; the oldest stand first."""
        now = self._clock()
        while self._stored and next(iter(self._stored.values())).expires_s <= now:
            self._forget(next(iter(self._stored)))

    def _forget(self, id: str) -> None:
        self._bytes -= self._stored.pop(id).size
