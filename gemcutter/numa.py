"""Memory nodes of this machine: which there are, and memory spread over them.

A processor reads the memory beside it faster than that of another node, and one node's memory alone gives threads of all nodes
a part of the machine's bandwidth. So weights that threads of several nodes read are interleaved, page by page. Linux only; where
the system has one node, or no such call, nothing is done. Refuses to know what is stored. Read `quant/hugepage_arena.py` for its
first user.
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

NODES = Path("/sys/devices/system/node")
_MBIND = {"x86_64": 237, "aarch64": 235}  # numbers of the system call
_INTERLEAVE = 3  # MPOL_INTERLEAVE of linux/mempolicy.h
_MOST_NODES = 1024


@cache
def memory_nodes(folder: Path = NODES) -> tuple[int, ...]:
    """Return the numbers of the nodes that have memory, ascending; none where the system does not tell."""
    return read_list(folder / "has_memory")


def read_list(path: Path) -> tuple[int, ...]:
    """Read a file that lists numbers as Linux does, "0-3,8"; none where it is missing or says something else."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        for word in path.read_text().strip().split(","):
            first, _, last = word.partition("-")
            found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def cpus_of(node: int, folder: Path = NODES) -> tuple[int, ...]:
    """Return the processors that lie beside a node's memory."""
    return read_list(folder / f"node{node}" / "cpulist")


def _own_nodes() -> tuple[int, ...]:
    """Return the nodes with memory beside which this process may run."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    return tuple(node for node in memory_nodes() if allowed.intersection(cpus_of(node)))


def interleave(address: int, nbytes: int, nodes: tuple[int, ...] | None = None) -> bool:
    """Spread pages that nobody has written yet over `nodes`, or over all whose processors this process may use; return whether
    that was done.

    `address` is a multiple of a page's size. One node needs nothing, unless it is asked for: a process that was bound to one
    gets its memory there.
    """
    asked = _own_nodes() if nodes is None else nodes
    number = _MBIND.get(platform.machine())
    if number is None or os.name != "posix" or (nodes is None and len(asked) < 2) or max(asked, default=-1) >= _MOST_NODES:
        return False
    words = [0] * (_MOST_NODES // 64)
    for node in asked:
        words[node // 64] |= 1 << node % 64
    mask = (ctypes.c_uint64 * len(words))(*words)
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return bool(
        call(
            ctypes.c_long(number),
            ctypes.c_void_p(address),
            ctypes.c_ulong(nbytes),
            ctypes.c_int(_INTERLEAVE),
            mask,
            ctypes.c_ulong(_MOST_NODES + 1),
            ctypes.c_uint(0),
        )
        == 0
    )
