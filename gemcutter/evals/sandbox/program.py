"""A program and its tests, run where they can do little harm: in an interpreter of its own, in an empty folder.

Owns the child process, its environment and folder, and the last word on time. It is a guard against mistakes of a model, not
against an attacker: a program may read what its user may read. Read `child.py` for the limits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemcutter.errors import RequestError

CHILD = Path(__file__).with_name("child.py")
NOBODY = 65534  # the user and group that own nothing, on Linux
GRACE = 5.0  # seconds that a child has to start and to end beyond a program's own
MOST_TOLD = 1 << 16  # bytes of a child's report
PROBE = "import collections, hashlib, itertools, math, re, typing\nopen('written', 'w').write('x')"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use: seconds by the clock and of processor time, bytes of memory and of a file, processes."""

    seconds: float = 10.0
    memory: int = 2 << 30  # bytes of addresses, for each process
    file: int = 1 << 20
    files: int = 64  # open at a time
    processes: int = 32
    user: int | None = None  # that it runs as; None: as whoever runs this


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program: None as `error` where it ran to its end.

    `is_isolated` says whether it had no network and saw no other process, `is_read_only` whether only its folder was writable.
    """

    error: str | None
    is_isolated: bool = False
    is_read_only: bool = False


def usual_limits(seconds: float) -> tuple[Limits, Outcome]:
    """Return the limits of programs on this system, and how one that uses the standard library fares.

    Root's programs run as nobody, or where nobody can't read Python, as root on a file system that is read-only. Raises
    RequestError where none can run.
    """
    if os.name != "posix" or importlib.util.find_spec("resource") is None:
        raise RequestError("programs of a model are run on Linux and macOS alone, where the system can hold them to limits")
    own = Limits(seconds)
    for limits in [replace(own, user=NOBODY), own] if os.geteuid() == 0 else [own]:
        found = run_program(PROBE, limits)
        if found.error is None and (limits.user is not None or os.geteuid() != 0 or found.is_read_only):
            return limits, found
    told = found.error or "root's programs could write anywhere; run as another user"
    raise RequestError(f"programs of a model can't be run here: {told}")


def run_program(source: str, limits: Limits) -> Outcome:
    """Run a program to its end. Whatever it starts is dead once this returns, and its folder gone."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="gemcutter-eval-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o700)
        if limits.user is not None:
            os.chown(folder, limits.user, limits.user)
        task = {"source": source, "token": token, "folder": folder, **asdict(limits)}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            told = _hear(process, json.dumps(task).encode(), limits.seconds + GRACE)
        finally:
            _end(process)
    return _outcome(told, token)


def _hear(process: subprocess.Popen[bytes], task: bytes, seconds: float) -> bytes:
    """Return what the child says until it ends, says too much, or its time is up."""
    assert process.stdin is not None
    assert process.stdout is not None
    until, told = time.monotonic() + seconds, b""
    try:
        process.stdin.write(task)
        process.stdin.close()
    except BrokenPipeError:
        return told
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while len(told) < MOST_TOLD and (left := until - time.monotonic()) > 0:
            if not ready.select(min(left, 0.1)):
                if process.poll() is not None:  # a grandchild may hold the pipe
                    break
                continue
            if not (more := os.read(process.stdout.fileno(), MOST_TOLD)):
                break
            told += more
    return told


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child with its group. It has killed what has left the group, unless a limit of time beyond its own was needed."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _outcome(told: bytes, token: str) -> Outcome:
    """Read a child's report, of which only lines with the token are its own."""
    found = dict[str, Any]()
    for line in told.split(b"\n"):
        try:
            each = json.loads(line)
        except ValueError:
            continue
        if isinstance(each, dict) and each.pop("token", None) == token:
            found |= each
    error = found.get("error", "it ended before its tests had passed")
    return Outcome(error, bool(found.get("is_isolated")), bool(found.get("is_read_only")))
