"""How ranks that torchrun started, on any number of hosts, find each other.

Owns what torchrun's environment says, and the connections on which rank 0 sends commands: it listens, lets the others know where
and by what word it will know them, and takes no one else. Refuses to know models. Read `launch.py` for ranks of one host that
need no torchrun, `distributed_ranks.py` for the sums.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from typing import TYPE_CHECKING

import torch.distributed as dist

from gemcutter.errors import RankError
from gemcutter.parallel.distributed_ranks import DistributedRanks
from gemcutter.parallel.leader import Leader
from gemcutter.parallel.messages import encode, opening, receive
from gemcutter.parallel.monitor import Monitor
from gemcutter.shard import Shard

if TYPE_CHECKING:
    from gemcutter.load_options import LoadOptions

JOIN_S = 60.0  # that the others have to connect
ENVIRONMENT = "env://"


def torchrun_shard() -> Shard | None:
    """Return which of how many ranks torchrun started this process as; None where it did not, or started one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return Shard(rank, world) if world > 1 else None


def lead(options: LoadOptions, shard: Shard) -> tuple[DistributedRanks, Leader]:
    """Join the others as rank 0 and connect with each of them. Raises RankError if one does not come."""
    ranks = DistributedRanks("gloo", ENVIRONMENT, shard)
    word = secrets.token_hex(16)
    with _listen() as listener:
        listener.settimeout(JOIN_S)
        dist.broadcast_object_list([(os.environ["MASTER_ADDR"], listener.getsockname()[1], word)], src=0)
        found: dict[int, socket.socket] = {}
        while len(found) < shard.world - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, shard.world)) - found.keys())
                raise RankError(f"ranks {missing} did not connect to rank 0 within {JOIN_S:.0f} s") from None
            rank = _greeted(connection, word)
            if rank is not None and 0 < rank < shard.world:
                found[rank] = connection
            else:
                connection.close()
    connections = [found[rank] for rank in sorted(found)]
    for connection in connections:
        keep_alive(connection)
        connection.sendall(opening(options))
    return ranks, Leader(connections, Monitor([], connections, ranks.end, list))


def follow(shard: Shard) -> tuple[DistributedRanks, socket.socket]:
    """Join the others as a rank that follows, and connect with rank 0. Raises RankError if that can't be done."""
    ranks = DistributedRanks("gloo", ENVIRONMENT, shard)
    place: list[tuple[str, int, str]] = [("", 0, "")]
    dist.broadcast_object_list(place, src=0)
    host, port, word = place[0]
    try:
        connection = socket.create_connection((host, port), timeout=JOIN_S)
    except OSError as error:
        raise RankError(f"rank {shard.rank} can't connect to rank 0 at {host}:{port}: {error.strerror or error}") from error
    connection.settimeout(None)
    keep_alive(connection)
    connection.sendall(encode("join", {"rank": shard.rank, "word": word}))
    return ranks, connection


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
