"""The way of rows through a pipeline: out of the stage before, into the next one.

Owns two connections and a thread for each, so that no stage waits until another one has time to read: rows that arrive lie ready,
rows that leave are written while the next ones are computed. Refuses to know steps and layers. Read `model/pipeline.py` for who
sends what, `messages.py` for how rows are spelled.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from queue import SimpleQueue

from torch import Tensor

from gemcutter.errors import RankError
from gemcutter.parallel.messages import encode, receive

FAREWELL_S = 2.0  # that threads have to end
GONE = "the pipeline is broken: a stage is gone, and the steps of the whole group end with it"


class Pipe:
    """This process's connections with the stages before and after it; rows arrive in the order in which they were sent."""

    def __init__(self, inward: socket.socket, outward: socket.socket) -> None:
        self._connections = (inward, outward)
        self._received, self._leaving = SimpleQueue[list[Tensor] | None](), SimpleQueue[bytes | None]()
        self._threads = (
            threading.Thread(target=_read, args=(inward, self._received), name="gemcutter-rows-in", daemon=True),
            threading.Thread(target=_write, args=(outward, self._leaving), name="gemcutter-rows-out", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    def send(self, rows: Sequence[Tensor]) -> None:
        """Let the next stage have some tensors; returns before they are there."""
        self._leaving.put(encode("rows", {"rows": rows}))

    def receive(self) -> list[Tensor]:
        """Wait for the next tensors of the stage before. Raises RankError once a stage is gone."""
        found = self._received.get()
        if found is None:
            self._received.put(None)  # for who asks next
            raise RankError(GONE)
        return found

    def end(self) -> None:
        """Close both ways: whoever waits for rows, here or in another stage, gets an error.

        The threads end, too: at the end of the interpreter they would be torn out of torch's code, which ends the process.
        """
        self._leaving.put(None)
        self._received.put(None)
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(FAREWELL_S)


def _read(connection: socket.socket, received: SimpleQueue[list[Tensor] | None]) -> None:
    """Take rows off a connection until it ends."""
    with contextlib.suppress(RankError, OSError, ValueError):
        while (found := receive(connection)) is not None:
            received.put(found[1]["rows"])
    received.put(None)


def _write(connection: socket.socket, leaving: SimpleQueue[bytes | None]) -> None:
    """Write rows to a connection until it breaks; the stages after it find out by their end of it."""
    with contextlib.suppress(OSError):
        while (message := leaving.get()) is not None:
            connection.sendall(message)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
