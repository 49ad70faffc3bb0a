"""How many cores this process may keep busy: those that it may run on, or fewer where its control group has a quota.

Owns the reading of Linux's control groups, both versions; elsewhere there are none. More threads than that wait for each other's
turns: a container with the time of two cores on a machine of 64 is slower with 64 threads than with two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def core_count() -> int:
    """Return how many cores this process may keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, quota_cores() or allowed)


@cache
def quota_cores() -> int | None:
    """Return how many cores' time this process gets, begun ones counted as whole; None without a quota."""
    return read_quota(GROUPS, OWN)


def read_quota(groups: Path, own: Path) -> int | None:
    """Return the smallest quota of the groups that a process is in, in cores, rounded up; None where nothing limits it.

    `groups` is where control groups are mounted, `own` the file that lists the process's (man 7 cgroups).
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    found = [share for line in lines for share in _shares(groups, line)]
    return max(1, math.ceil(min(found))) if found else None


def _shares(groups: Path, line: str) -> Iterator[float]:
    """Yield the quotas, in cores, of the group that a line names and of those around it."""
    _, _, rest = line.partition(":")
    controllers, _, name = rest.partition(":")
    if controllers and "cpu" not in controllers.split(","):
        return
    top = groups if not controllers else groups / "cpu"
    place = top / name.lstrip("/")
    for folder in (place, *place.parents):
        if folder == top or top in folder.parents:
            share = _share(folder, is_first_version=bool(controllers))
            if share is not None:
                yield share


def _share(folder: Path, *, is_first_version: bool) -> float | None:
    with suppress(OSError, ValueError, LookupError, ZeroDivisionError):
        if is_first_version:
            quota, period = (int((folder / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
            return quota / period if quota > 0 else None
        words = (folder / "cpu.max").read_text().split()
        return int(words[0]) / int(words[1])  # "max" is no number, and no limit
    return None
