"""Starts the ranks of one host: as many processes of this program as the leader needs beside itself.

Owns the processes, what they inherit (the shared memory, a connection to the leader), and how cores are shared among them. A
process dies with its leader, however that ends. Refuses to know models. Read `gemcutter/rank_process.py` for what such a process
runs, `monitor.py` for who watches it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING

import torch

from gemcutter import native
from gemcutter.errors import KernelError, RankError
from gemcutter.numa import cpus_of, memory_nodes
from gemcutter.parallel.leader import Leader
from gemcutter.parallel.messages import opening, receive
from gemcutter.parallel.monitor import Monitor
from gemcutter.parallel.shared_ranks import SharedRanks, new_segment
from gemcutter.shard import Shard

if TYPE_CHECKING:
    from gemcutter.load_options import LoadOptions

MOST_RANKS = 64


def launch(options: LoadOptions) -> tuple[SharedRanks, Leader]:
    """Start the other ranks, which begin to load their slices, and return this process's place among them and the way to them.

    Raises KernelError where this host can't run ranks.
    """
    world = options.tensor_parallel
    if reason := native.missing():
        raise KernelError(f"tensor_parallel {world}: ranks of one host sum with the native CPU kernels: {reason}")
    threads, before = max(1, torch.get_num_threads() // world), _Cores()
    torch.set_num_threads(threads)
    file = new_segment(world)
    ranks = SharedRanks(file, Shard(0, world))
    processes, connections = list[subprocess.Popen[bytes]](), list[socket.socket]()
    for rank in range(1, world):
        here, there = socket.socketpair()
        command = [sys.executable, "-m", "gemcutter.rank_process", str(there.fileno()), str(file), str(rank), str(world)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        given = (there.fileno(), file)  # in a session of its own: what a terminal interrupts is the leader's business
        processes.append(
            subprocess.Popen(command, pass_fds=given, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        )
        there.close()
        here.sendall(opening(options, cores_of(rank, world)))
        connections.append(here)
    os.close(file)
    leader = Leader(connections, Monitor(processes, connections, ranks.end, ranks.beats), before.use)
    weakref.finalize(leader, leader.monitor.close)
    if cores := cores_of(0, world):
        os.sched_setaffinity(0, cores)
    return ranks, leader


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
    """Wait until all ranks have loaded their slices. Raises RankError with what one of them could not do."""
    for index, connection in enumerate(leader.connections):
        found = receive(connection)
        if found is None or found[0] != "ready":
            why = "it has ended" if found is None else found[1]["error"]
            leader.monitor.end(f"tensor-parallel rank {index + 1} can't load its slice: {why}")
            raise RankError(leader.monitor.problem or why)


def cores_of(rank: int, world: int) -> list[int]:
    """Return the cores beside a rank's own memory node; none, which means all, where ranks and nodes do not match."""
    nodes = memory_nodes()
    if len(nodes) < 2 or world % len(nodes) or not hasattr(os, "sched_getaffinity"):
        return []
    node = nodes[rank * len(nodes) // world]
    return sorted(os.sched_getaffinity(0).intersection(cpus_of(node)))
