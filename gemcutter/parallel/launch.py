"""Starts the ranks of one host: as many processes of this program as the leader needs beside itself, each on a GPU of its own
where the model runs on GPUs.

Owns the processes, what they inherit (the shared memory of their stage, connections to the leader and to the stages beside
theirs), and how cores are shared among them. A process dies with its leader, however that ends. Refuses to know models. Read
`gemcutter/rank_process.py` for what such a process runs, `monitor.py` for who watches it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from gemcutter import native
from gemcutter.errors import KernelError, RankError
from gemcutter.numa import cpus_of, memory_nodes
from gemcutter.parallel.distributed_ranks import NCCL, DistributedRanks, has_come, is_joined, join_group, leave_group, open_store
from gemcutter.parallel.leader import Leader
from gemcutter.parallel.messages import opening, receive
from gemcutter.parallel.monitor import Monitor, end_all
from gemcutter.parallel.pipe import Pipe
from gemcutter.parallel.shared_ranks import SharedRanks, new_segment
from gemcutter.shard import Place, Shard

if TYPE_CHECKING:
    from gemcutter.load_options import LoadOptions

COME_S = 60.0  # that the others have to start
LOOK_S = 0.02  # between two looks for them


def launch(options: LoadOptions, stages: Sequence[range]) -> tuple[SharedRanks | DistributedRanks, Pipe | None, Leader]:
    """Start the other ranks, which begin to load what they hold.

    Returns this process's place among the ranks of its stage, its way to other stages where there are some, and the way to all
    ranks. Raises KernelError where this host can't run ranks, RankError where they can't join each other.
    """
    here = Place(0, options.tensor_parallel, options.pipeline_parallel)
    if reason := native.missing():
        raise KernelError(f"{here.count} processes: ranks of one host share memory by the native CPU kernels: {reason}")
    before, meeting = _Cores(), _Meeting(group_backend(options), here)
    torch.set_num_threads(max(1, torch.get_num_threads() // here.count))
    started = _start_others(options, stages, here, meeting)
    monitor = Monitor(
        started.processes,
        started.connections,
        lambda: end_all(*started.groups, meeting.ranks, started.pipe),
        lambda: [beat for group in started.groups for beat in group.beats()],
    )

    def give_back() -> None:
        before.use()
        meeting.leave()

    def close() -> None:
        monitor.close()
        meeting.leave()

    leader = Leader(started.connections, monitor, here.tensor_parallel - 1, give_back)
    weakref.finalize(leader, close)
    if cores := meeting.cores_of(0):
        os.sched_setaffinity(0, cores)
    try:
        meeting.join(monitor)
    except RankError:
        leader.close()
        raise
    return meeting.ranks or started.groups[0], started.pipe, leader


def group_backend(options: LoadOptions) -> str | None:
    """Return by what part of torch.distributed ranks sum; None where they do over shared memory: on CPUs."""
    return None if options.device == "cpu" else NCCL


@dataclass(slots=True)
class _Meeting:
    """Where ranks that sum by torch.distributed meet; nothing where they don't."""

    backend: str | None
    here: Place
    ranks: DistributedRanks | None = None
    _store: Any = field(init=False)

    def __post_init__(self) -> None:
        if self.backend is not None and is_joined():
            raise RankError("another model is loaded on several GPUs in this process; close it first")
        self._store = None if self.backend is None else open_store(self.here.count)

    def cores_of(self, number: int) -> list[int]:
        """Return the cores that a rank keeps to; none, which means all, where GPUs compute."""
        return [] if self.backend == NCCL else cores_of(number, self.here.count)

    @property
    def address(self) -> str:
        """Return what another rank needs to know to come: a backend and a port, or an empty text."""
        return "" if self._store is None else f"{self.backend}:{self._store.port}"

    def join(self, monitor: Monitor) -> None:
        """Wait for the others and join them. Raises RankError if one does not come.

        torch waits, too, but can't be used again in this process where it waited for nobody.
        """
        if self.backend is None:
            return
        until = time.monotonic() + COME_S
        for number in range(1, self.here.count):
            while not has_come(self._store, number):
                if monitor.problem is not None:
                    raise RankError(monitor.problem)
                if time.monotonic() > until:
                    raise RankError(f"rank {number} did not come within {COME_S:.0f} s")
                time.sleep(LOOK_S)
        join_group(self.backend, self.here.number, self.here.count, self._store)
        self.ranks = DistributedRanks(self.here)

    def leave(self) -> None:
        """Leave, once the others are gone."""
        if self.ranks is not None:
            self.ranks = None
            leave_group()


@dataclass(frozen=True, slots=True)
class _Started:
    """The other ranks, connections with them, and this process's place in each stage's memory and between the stages."""

    processes: list[subprocess.Popen[bytes]]
    connections: list[socket.socket]
    groups: list[SharedRanks]
    pipe: Pipe | None


def _start_others(options: LoadOptions, stages: Sequence[range], here: Place, meeting: _Meeting) -> _Started:
    """Start the processes of all ranks but the first, and tell them what to load."""
    files = [new_segment(here.tensor_parallel) for _ in stages]
    groups = [SharedRanks(file, Shard(0, here.tensor_parallel)) for file in files]
    ways = [socket.socketpair() for _ in range(here.count)] if len(stages) > 1 else []  # out of the rank of this number
    processes, connections = list[subprocess.Popen[bytes]](), list[socket.socket]()
    for number in range(1, here.count):
        place = replace(here, number=number)
        found, there = _start(place, files[number // here.tensor_parallel], meeting.address, ways, torch.get_num_threads())
        processes.append(found)
        there.sendall(opening(options, stages, meeting.cores_of(number)))
        connections.append(there)
    for file in files:
        os.close(file)
    return _Started(processes, connections, groups, _own_pipe(here, ways) if ways else None)


def _start(
    place: Place, file: int, meeting: str, ways: Sequence[tuple[socket.socket, socket.socket]], threads: int
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the process of a place, which inherits its ends of connections; return it and the way to it."""
    here, there = socket.socketpair()
    rows = [ways[place.previous][1].fileno(), ways[place.number][0].fileno()] if ways else []
    numbers = (there.fileno(), file, place.number, place.tensor_parallel, place.pipeline_parallel, *rows)
    found = subprocess.Popen(
        [sys.executable, "-m", "gemcutter.rank_process", meeting, *map(str, numbers)],
        pass_fds=(there.fileno(), file, *rows),
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # what a terminal interrupts is the leader's business
    )
    there.close()
    return found, here


def _own_pipe(here: Place, ways: Sequence[tuple[socket.socket, socket.socket]]) -> Pipe:
    """Return the leader's own pipe; all other ends are the other processes' alone, so that they end with these."""
    for number, way in enumerate(ways):
        for end, holder in zip(way, (number, replace(here, number=number).next), strict=True):
            if holder != here.number:
                end.close()
    return Pipe(ways[here.previous][1], ways[here.number][0])


class _Cores:
    """What this process computed with before it shared its cores with other ranks."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()

    def use(self) -> None:
        """Compute with it again."""
        torch.set_num_threads(self._threads)
        if self._allowed:
            os.sched_setaffinity(0, self._allowed)


def await_ranks(leader: Leader) -> None:
    """Wait until all ranks have loaded what they hold. Raises RankError with what one of them could not do."""
    for index, connection in enumerate(leader.connections):
        found = receive(connection)
        if found is None or found[0] != "ready":
            why = "it has ended" if found is None else found[1]["error"]
            leader.monitor.end(f"rank {index + 1} can't load what it holds: {why}")
            raise RankError(leader.monitor.problem or why)


def cores_of(rank: int, world: int) -> list[int]:
    """Return the cores beside a rank's own memory node; none, which means all, where ranks and nodes do not match."""
    nodes = memory_nodes()
    if len(nodes) < 2 or world % len(nodes) or not hasattr(os, "sched_getaffinity"):
        return []
    node = nodes[rank * len(nodes) // world]
    return sorted(os.sched_getaffinity(0).intersection(cpus_of(node)))
