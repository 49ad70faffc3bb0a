"""How ranks that torchrun started, on any number of hosts, find each other.

Owns what torchrun's environment says, and the connections: those on which rank 0 sends commands, and those between the stages of
a pipeline. Who listens lets the others know where, and by what word it will know them, and takes no one else. Refuses to know
models. Read `launch.py` for ranks of one host that need no torchrun, `distributed_ranks.py` for the sums.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from gemcutter.errors import RankError
from gemcutter.parallel.distributed_ranks import BOTH, GLOO, DistributedRanks, join_group, leave_group
from gemcutter.parallel.leader import Leader
from gemcutter.parallel.messages import encode, opening, receive
from gemcutter.parallel.monitor import Monitor, end_all
from gemcutter.parallel.pipe import Pipe
from gemcutter.shard import Place

if TYPE_CHECKING:
    from gemcutter.load_options import LoadOptions

JOIN_S = 60.0  # that the others have to connect


def torchrun_rank() -> tuple[int, int] | None:
    """Return which of how many ranks torchrun started this process as; None where it did not, or started one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    number, count = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return (number, count) if count > 1 else None


def number_on_host() -> int:
    """Return which of its host's ranks torchrun started this process as; 0 where it did not."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_on_host() -> int:
    """Return how many ranks torchrun started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _backend() -> str:
    """Return what sums: gloo on CPUs, and NCCL on GPUs where torch has it. Only the leader knows where the model runs."""
    return BOTH if torch.cuda.is_available() and dist.is_nccl_available() else GLOO


def lead(options: LoadOptions, stages: Sequence[range]) -> tuple[DistributedRanks, Pipe | None, Leader]:
    """Join the others as rank 0 and connect with each of them. Raises RankError if one does not come."""
    place = Place(0, options.tensor_parallel, options.pipeline_parallel)
    join_group(_backend(), place.number, place.count)
    dist.broadcast_object_list([place.pipeline_parallel], src=0)
    ranks = DistributedRanks(place)
    word = secrets.token_hex(16)
    with _listen() as listener:
        listener.settimeout(JOIN_S)
        dist.broadcast_object_list([(os.environ["MASTER_ADDR"], listener.getsockname()[1], word)], src=0)
        connections = _await_connections(listener, word, range(1, place.count), place.number)
    for connection in connections:
        connection.sendall(opening(options, stages))
    pipe = _join_stages(place)
    monitor = Monitor([], connections, lambda: end_all(ranks, pipe), list)
    # torch's threads, were they still there as the interpreter ends, could take the process with them.
    return ranks, pipe, Leader(connections, monitor, place.tensor_parallel - 1, leave_group)


def follow(number: int, count: int) -> tuple[Place, DistributedRanks, Pipe | None, socket.socket]:
    """Join the others as a rank that follows, and connect with rank 0. Raises RankError if that can't be done."""
    join_group(_backend(), number, count)
    stages = [1]
    dist.broadcast_object_list(stages, src=0)
    place = Place(number, count // stages[0], stages[0])
    ranks = DistributedRanks(place)
    where: list[tuple[str, int, str]] = [("", 0, "")]
    dist.broadcast_object_list(where, src=0)
    connection = _connect(place.number, 0, *where[0])
    return place, ranks, _join_stages(place), connection


def _connect(number: int, to: int, host: str, port: int, word: str) -> socket.socket:
    """Connect with another rank and let it know who this is. Raises RankError if it can't be reached."""
    try:
        connection = socket.create_connection((host, port), timeout=JOIN_S)
    except OSError as error:
        raise RankError(f"rank {number} can't connect to rank {to} at {host}:{port}: {error.strerror or error}") from error
    connection.settimeout(None)
    keep_alive(connection)
    connection.sendall(encode("join", {"rank": number, "word": word}))
    return connection


def _join_stages(place: Place) -> Pipe | None:
    """Connect with the ranks whose rows this one gets, and which get its own; None where there is one stage alone.

    All ranks call this at the same time. Raises RankError if one does not come.
    """
    if place.pipeline_parallel == 1:
        return None
    with _listen() as listener:
        listener.settimeout(JOIN_S)
        own, every = (_own_host(), listener.getsockname()[1], secrets.token_hex(16)), [("", 0, "")] * place.count
        dist.all_gather_object(every, own)
        outward = _connect(place.number, place.next, *every[place.next])
        (inward,) = _await_connections(listener, own[2], [place.previous], place.number)
    return Pipe(inward, outward)


def _await_connections(listener: socket.socket, word: str, wanted: Sequence[int], here: int) -> list[socket.socket]:
    """Return the connections of the wanted ranks, in their order. Raises RankError if one does not come in time.

    Who does not know the word, or is not wanted, is sent away.
    """
    found = dict[int, socket.socket]()
    while len(found) < len(wanted):
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            missing = [rank for rank in wanted if rank not in found]
            raise RankError(f"ranks {missing} did not connect to rank {here} within {JOIN_S:.0f} s") from None
        rank = _greeted(connection, word)
        if rank is None or rank not in wanted:
            connection.close()
            continue
        keep_alive(connection)
        found[rank] = connection
    return [found[rank] for rank in wanted]


def _own_host() -> str:
    """Return the address by which others reach this host: that from which it reaches the first one."""
    family, _, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect(address)
        return str(probe.getsockname()[0])


def keep_alive(connection: socket.socket) -> None:
    """Let the system find out within seconds when the other host is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listen() -> socket.socket:
    """Return a socket that takes connections on a free port of all addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _greeted(connection: socket.socket, word: str) -> int | None:
    """Return the rank of whoever has connected; None unless it knows the word."""
    connection.settimeout(JOIN_S)
    try:
        found = receive(connection)
    except (RankError, ValueError, OSError):
        return None
    connection.settimeout(None)
    if found is None or found[0] != "join" or not hmac.compare_digest(str(found[1].get("word")), word):
        return None
    return int(found[1]["rank"])
