"""Watches the processes of a group: where one dies or hangs, all end, within seconds, and nobody waits any longer.

Owns the thread that looks, and what it does: it notes the problem, lets every wait over shared memory end, and kills the
processes. Refuses to know commands. Read `launch.py` for who starts processes, `shared_ranks.py` for waits and beats.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

LOOK_S = 0.25  # between two looks
HANG_S = 6.0  # without a beat, after which a process counts as hung: it is stopped, or its machine is beyond help
FAREWELL_S = 3.0  # that processes have to end by themselves


class Ended(Protocol):
    """What others may wait for."""

    def end(self) -> None:
        """Let every wait end, now and later, with an error."""


def end_all(*parts: Ended | None) -> None:
    """End those that there are."""
    for part in parts:
        if part is not None:
            part.end()


def _has_ended(connection: socket.socket) -> bool:
    """Return whether the other side of a connection is gone."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


class Monitor:
    """Ranks 1, 2 ... of a group, as rank 0 sees them: the processes that it started, or else connections to others.

    `end_waits` lets the waits of all ranks end, `beats` returns a number for each rank that grows as long as its process runs.
    """

    def __init__(
        self,
        processes: Sequence[subprocess.Popen[bytes]],
        connections: Sequence[socket.socket],
        end_waits: Callable[[], None],
        beats: Callable[[], Sequence[int]],
    ) -> None:
        self.problem: str | None = None
        self._processes, self._connections = processes, connections
        self._end_waits, self._beats = end_waits, beats
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._watchers = list[Callable[[str], None]]()
        self._thread = threading.Thread(target=self._watch, name="gemcutter-ranks", daemon=True)
        self._thread.start()

    def end(self, problem: str) -> None:
        """Note a problem, the first one of several, and end the group; any thread may say so."""
        with self._lock:
            if self.problem is not None:
                return
            self.problem = problem
        self._end_waits()
        self._stop(0.0)
        for watcher in self._watchers:
            watcher(problem)

    def watch(self, watcher: Callable[[str], None]) -> None:
        """Let somebody know when the group ends with a problem; from whatever thread finds it."""
        self._watchers.append(watcher)

    def close(self) -> None:
        """End the group in good order."""
        self._closing.set()
        with self._lock:
            self.problem = self.problem or "the model is closed"
        self._stop(FAREWELL_S)
        self._end_waits()

    def _stop(self, patience_s: float) -> None:
        """Close the connections, which ends a rank that waits for commands, and kill what has not ended in time."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        until = time.monotonic() + patience_s
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        seen = [(beat, time.monotonic()) for beat in self._beats()]
        while not self._closing.wait(LOOK_S) and self.problem is None:
            now, beats = time.monotonic(), self._beats()
            for index, connection in enumerate(self._connections if not self._processes else ()):
                if _has_ended(connection):
                    return self.end(f"rank {index + 1} has ended; the whole group ends with it")
            for index, process in enumerate(self._processes):
                rank = index + 1
                if (code := process.poll()) is not None:
                    return self.end(f"rank {rank} ended with exit code {code}; the whole group ends with it")
                if beats[rank] != seen[rank][0]:
                    seen[rank] = beats[rank], now
                elif beats[rank] and now - seen[rank][1] > HANG_S:  # the first one comes once a process has begun
                    return self.end(f"rank {rank} has hung for {HANG_S:.0f} s; the whole group ends with it")
        return None
