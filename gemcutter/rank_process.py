"""The process of a rank other than the first: `python -m gemcutter.rank_process`, which a leader starts.

Owns its life: it dies with the leader, beats while it lives, ignores interrupts, which are the leader's business, and tells the
leader when its weights are loaded, or why they can't be. Read `parallel/launch.py` for who starts it, `parallel/follower.py` for
what it does then.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from gemcutter.errors import GemcutterError, RankError
from gemcutter.loading import on_device_of, open_rank
from gemcutter.ops.types import Ranks
from gemcutter.parallel.distributed_ranks import DistributedRanks, come_to_store, join_group, leave_group
from gemcutter.parallel.messages import encode, opened, receive
from gemcutter.parallel.pipe import Pipe
from gemcutter.parallel.rendezvous import follow, number_on_host
from gemcutter.parallel.shared_ranks import SharedRanks
from gemcutter.shard import Place

BEAT_S = 0.2


def main(meeting: str, connection: int, file: int, number: int, tensor_parallel: int, pipeline_parallel: int, *rows: int) -> int:
    """Run a rank that a leader of this host started until it closes the connection; return the process's exit code.

    `meeting` says where ranks join that sum by torch.distributed and not over shared memory: a backend and a port.
    """
    place = Place(number, tensor_parallel, pipeline_parallel)
    ranks = SharedRanks(file, place.shard)
    os.close(file)
    threading.Thread(target=_beat, args=(ranks, os.getppid()), daemon=True).start()
    inward_outward = [socket.socket(fileno=each) for each in rows]
    try:
        joined = join(meeting, place) if meeting else ranks
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return serve(socket.socket(fileno=connection), place, joined, Pipe(*inward_outward) if rows else None, number)


def join(meeting: str, place: Place) -> DistributedRanks:
    """Join the others where the leader waits. Raises RankError if that can't be done."""
    backend, port = meeting.rsplit(":", 1)
    join_group(backend, place.number, place.count, come_to_store(int(port), place.number, place.count))
    return DistributedRanks(place)


def follow_torchrun(number: int, count: int) -> int:
    """Run one of the ranks that torchrun started until its leader closes the connection; return the process's exit code."""
    place, ranks, pipe, way = follow(number, count)
    return serve(way, place, ranks, pipe, number_on_host())


def serve(way: socket.socket, place: Place, ranks: Ranks, pipe: Pipe | None, gpu: int) -> int:
    """Load what the leader says, on a GPU of this host if that is where it runs, and do what it tells.

    Returns the process's exit code.
    """
    try:
        return _obey(way, place, ranks, pipe, gpu)
    finally:
        if pipe is not None:
            pipe.end()


def _obey(way: socket.socket, place: Place, ranks: Ranks, pipe: Pipe | None, gpu: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    found = receive(way)
    if found is None:
        return 0
    options, stages, cpus = opened(found[1])
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        follower = open_rank(on_device_of(options, gpu), stages, place, ranks, pipe)
    except GemcutterError as error:
        way.sendall(encode("failed", {"error": str(error)}))
        return 1
    way.sendall(encode("ready", {}))
    try:
        follower.serve(way)
    except RankError:  # the leader says which
        return 1
    leave_group()
    return 0


def _beat(ranks: SharedRanks, leader: int) -> None:
    """Count as long as the leader lives, and end this process when it does not, whatever else it is doing.

    The kernel would do that, too, but asks for the thread that started a process, and models are loaded in threads that end.
    """
    while os.getppid() == leader:
        ranks.beat()
        time.sleep(BEAT_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
