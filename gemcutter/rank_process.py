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
from gemcutter.loading import open_rank
from gemcutter.ops.types import Ranks
from gemcutter.parallel.messages import encode, opened, receive
from gemcutter.parallel.pipe import Pipe
from gemcutter.parallel.rendezvous import follow
from gemcutter.parallel.shared_ranks import SharedRanks
from gemcutter.shard import Place

BEAT_S = 0.2


def main(connection: int, file: int, number: int, tensor_parallel: int, pipeline_parallel: int, *rows: int) -> int:
    """Run a rank that a leader of this host started until it closes the connection; return the process's exit code."""
    place = Place(number, tensor_parallel, pipeline_parallel)
    ranks = SharedRanks(file, place.shard)
    os.close(file)
    threading.Thread(target=_beat, args=(ranks, os.getppid()), daemon=True).start()
    inward_outward = [socket.socket(fileno=each) for each in rows]
    return serve(socket.socket(fileno=connection), place, ranks, Pipe(*inward_outward) if rows else None)


def follow_torchrun(number: int, count: int) -> int:
    """Run one of the ranks that torchrun started until its leader closes the connection; return the process's exit code."""
    place, ranks, pipe, way = follow(number, count)
    return serve(way, place, ranks, pipe)


def serve(way: socket.socket, place: Place, ranks: Ranks, pipe: Pipe | None) -> int:
    """Load what the leader says, and do what it tells; return the process's exit code."""
    try:
        return _obey(way, place, ranks, pipe)
    finally:
        if pipe is not None:
            pipe.end()


def _obey(way: socket.socket, place: Place, ranks: Ranks, pipe: Pipe | None) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    found = receive(way)
    if found is None:
        return 0
    options, stages, cpus = opened(found[1])
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        follower = open_rank(options, stages, place, ranks, pipe)
    except GemcutterError as error:
        way.sendall(encode("failed", {"error": str(error)}))
        return 1
    way.sendall(encode("ready", {}))
    try:
        follower.serve(way)
    except RankError:  # the leader says which
        return 1
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
    sys.exit(main(*map(int, sys.argv[1:])))
