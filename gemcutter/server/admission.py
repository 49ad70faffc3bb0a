"""Who may come in: requests and prompt tokens that wait are bounded, so that nobody waits for ever.

Owns the two counts and the answer to a request too many. Refuses to know the engine, which queues whatever it is given. Runs on
the event loop alone. Read `service.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gemcutter.server.errors import ApiError

BYTES_A_TOKEN = 4  # of a body, roughly: good enough to turn a flood away before anything is encoded


class Admission:
    """Counts requests, and the prompt tokens whose first reply token has not come."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = self.rejected = 0
        self.is_draining = False

    def check(self, requests: int, body_bytes: int = 0) -> None:
        """Raise ApiError (429 or 503) where that many more requests can't be taken, judged by the size of their body."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down; ask another one, or later")
        if self.requests + requests > self.max_requests:
            self._reject(f"{self.requests} requests run or wait, and {self.max_requests} may")
        self._check_tokens(body_bytes // BYTES_A_TOKEN)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count a request whose prompt takes long to encode, until it is let in or refused."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def enter(self, tokens: int) -> Ticket:
        """Let a request in. Raises ApiError (429) where its prompt is one too many."""
        self._check_tokens(tokens)
        return Ticket(self, tokens)

    def _check_tokens(self, tokens: int) -> None:
        if self.tokens and self.tokens + tokens > self.max_tokens:
            self._reject(f"{self.tokens} prompt tokens wait, and {self.max_tokens} may")

    def _reject(self, reason: str) -> None:
        self.rejected += 1
        raise ApiError(429, f"too much is waiting already: {reason}; try again in a moment")


class Ticket:
    """One request that was let in."""

    def __init__(self, admission: Admission, tokens: int) -> None:
        self._admission, self._tokens, self._is_open = admission, tokens, True
        admission.requests += 1
        admission.tokens += tokens

    def computed(self) -> None:
        """Count the prompt as computed; a second time changes nothing."""
        self._admission.tokens -= self._tokens
        self._tokens = 0

    def leave(self) -> None:
        """Count the request as ended; a second time changes nothing."""
        if self._is_open:
            self._is_open = False
            self.computed()
            self._admission.requests -= 1
