"""The process that holds a model's program: it gives up rights, sets limits, runs the program in a child and ends all of it.

A script of its own, that imports nothing of the package: it reads its task as JSON from the standard input and reports lines of
JSON. Owns limits and name spaces. On Linux a program gets no network, sees no other process, and dies with all its children;
where the system forbids that, and on other systems, the group of processes is killed, and what has left it where it can be found.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
import types
from typing import Any

MS_REC_PRIVATE, MS_BIND = 0x4000 | 0x40000, 0x1000
MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY = 442, 0x8000, 1  # a system call with one number everywhere, since Linux 5.12
NEW_SPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000  # user, network, process, IPC and mount name spaces
SET_PARENT_DEATH, SET_DUMPABLE, SET_SUBREAPER, SET_NO_NEW_PRIVILEGES = 1, 4, 36, 38  # of prctl
NICE = 10
TICK = 0.005  # seconds
MOST_TOLD = 300  # characters of an error


class MountAttributes(ctypes.Structure):
    """What mount_setattr reads."""

    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("space", ctypes.c_uint64),
    )


def main() -> None:
    """Run a task."""
    task = json.load(sys.stdin)
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.chdir(task["folder"])
    if task["user"] is not None:
        os.setgroups([])
        os.setgid(task["user"])
        os.setuid(task["user"])
    proc = os.open("/proc", os.O_RDONLY) if os.path.isdir("/proc/self/task") else None
    libc = ctypes.CDLL(None)
    is_isolated = sys.platform.startswith("linux") and _isolate(libc)
    _tell(report, task, {"is_isolated": is_isolated, "is_read_only": is_isolated and _protect_files(libc, task["folder"])})
    _limit(task, is_isolated)
    child = os.fork()
    if child == 0:
        if proc is not None:
            os.close(proc)
        _run(task, report)
    error = _watch(child, task, proc)
    if error is not None:
        _tell(report, task, {"error": error})


def _tell(report: int, task: dict[str, Any], found: dict[str, Any]) -> None:
    os.write(report, json.dumps({"token": task["token"], **found}).encode() + b"\n")


def _isolate(libc: ctypes.CDLL) -> bool:
    """Enter name spaces of the program's own; return whether the system allows it."""
    libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self is root's after a change of user
    libc.prctl(SET_SUBREAPER, 1, 0, 0, 0)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_SPACES):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _protect_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Hide /proc, and make all files read-only but those of a folder; return whether the system allows it."""
    own = folder.encode()
    steps = (
        libc.mount(None, b"/", None, MS_REC_PRIVATE, None),
        libc.mount(own, own, None, MS_BIND, None),
        libc.mount(b"none", b"/proc", b"tmpfs", 0, b"size=4k,mode=555"),
        _set_mount(libc, b"/", AT_RECURSIVE, MountAttributes(set=READ_ONLY)),
        _set_mount(libc, own, 0, MountAttributes(clear=READ_ONLY)),
    )
    os.chdir(folder)  # through the mount that may be written
    return not any(steps)


def _set_mount(libc: ctypes.CDLL, place: bytes, flags: int, attributes: MountAttributes) -> int:
    found: int = libc.syscall(MOUNT_SETATTR, -100, place, flags, ctypes.byref(attributes), ctypes.sizeof(attributes))
    return found


def _limit(task: dict[str, Any], is_isolated: bool) -> None:
    """Set what the program may use, of which it can get back nothing."""
    others = 0 if is_isolated else _processes_of(os.getuid())
    for kind, most in (
        (resource.RLIMIT_CPU, int(task["seconds"]) + 1),
        (resource.RLIMIT_AS, task["memory"]),
        (resource.RLIMIT_FSIZE, task["file"]),
        (resource.RLIMIT_NOFILE, task["files"]),
        (resource.RLIMIT_NPROC, others + task["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of addresses
            resource.setrlimit(kind, (most, most))


def _processes_of(user: int) -> int:
    """Return how many threads a user runs, which count against the limit of processes."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _run(task: dict[str, Any], report: int) -> None:
    """Run the program as a module, tell what became of it, and end at once, whatever it has left behind."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    os.nice(NICE)  # who watches comes first
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    error = None
    try:
        exec(compile(task["source"], "<program>", "exec"), module.__dict__)
    except BaseException as problem:  # SystemExit, too: a program that leaves has not passed its tests
        error = f"{type(problem).__name__}: {problem}".rstrip(": ")[:MOST_TOLD]
    _tell(report, task, {"error": error})
    os._exit(0)


def _watch(child: int, task: dict[str, Any], proc: int | None) -> str | None:
    """Wait for the program and end what it has started; return an error where it did not end by itself."""
    until, error = time.monotonic() + task["seconds"], None
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            error = f"it ran longer than {task['seconds']:g} s"
        elif len(_descendants(proc, child, task["processes"])) > task["processes"]:  # root is held to no limit by the system
            error = f"it started more than {task['processes']} processes"
        if error is not None:
            os.kill(child, signal.SIGKILL)  # the first of its name space: all others die with it
            os.waitpid(child, 0)
            break
        time.sleep(TICK)
    _end_orphans(proc)
    return error


def _descendants(proc: int | None, pid: int, most: int = 1 << 16) -> list[int]:
    """Return the processes that one has started, and those that these have, until there are more than `most`."""
    found, unread = list[int](), [pid]
    while unread and proc is not None and len(found) <= most:
        pid = unread.pop()
        with contextlib.suppress(OSError):
            tasks = os.open(f"{pid}/task", os.O_RDONLY, dir_fd=proc)
            try:
                for thread in os.listdir(tasks):
                    with open(os.open(f"{thread}/children", os.O_RDONLY, dir_fd=tasks)) as file:
                        unread += (new := [int(each) for each in file.read().split()])
                        found += new
            finally:
                os.close(tasks)
    return found


def _end_orphans(proc: int | None) -> None:
    """Kill and collect what the program has left, which is this process' own now."""
    until = time.monotonic() + 1
    while time.monotonic() < until:
        for pid in _descendants(proc, os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0 if proc is not None else os.WNOHANG)
        except ChildProcessError:
            return


if __name__ == "__main__":
    main()
