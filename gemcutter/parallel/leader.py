"""How rank 0 leads: it tells the other ranks of every step before it takes part itself.

Owns the commands and what becomes of a group in which something went wrong: it ends, since ranks that are not in the same place
would wait for each other. Refuses to know how ranks are started. Read `follower.py` for the other side, `messages.py` for how
commands are spelled.

    pool        counts [pages, tokens] by group, dtype   the cache to write to from now on
    copy_page   group, source, target                    copy one page of it
    forward     step                                      run a step
    logits      states                                    run the head
    close                                                 end
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gemcutter.cache.kv_cache import PoolSize
from gemcutter.errors import RankError
from gemcutter.ops.step import Step
from gemcutter.parallel.messages import encode, step_content
from gemcutter.parallel.monitor import Monitor
from gemcutter.plan import GroupId
from gemcutter.quant.packed import dtype_name


class Leader:
    """The way to the other ranks; one thread at a time."""

    def __init__(self, connections: Sequence[socket.socket], monitor: Monitor) -> None:
        self.connections, self.monitor = connections, monitor

    def tell(self, command: str, **content: Any) -> None:
        """Send a command to all other ranks. Raises RankError if one is gone."""
        if self.monitor.problem is not None:
            raise RankError(self.monitor.problem)
        message = encode(command, content)
        try:
            for connection in self.connections:
                connection.sendall(message)
        except OSError as error:
            self.monitor.end(f"a tensor-parallel rank is gone: {error}")
            raise RankError(self.monitor.problem or "") from error

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Do what all ranks do after a command. Whatever goes wrong here ends the group, whose other ranks have gone on."""
        try:
            yield
        except RankError as error:
            self.monitor.end(str(error))
            raise RankError(self.monitor.problem or str(error)) from error
        except BaseException as error:
            self.monitor.end(f"rank 0 failed in a step: {type(error).__name__}: {error}")
            raise

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Let all ranks run a step. Raises RankError if a rank is gone."""
        self.tell("forward", step=step_content(step))
        with self._together():
            yield

    @contextmanager
    def head(self, h_RD: Tensor) -> Iterator[None]:
        """Let all ranks run the head. Raises RankError if a rank is gone."""
        self.tell("logits", states=h_RD)
        with self._together():
            yield

    def new_pool(self, counts: Mapping[GroupId, PoolSize], dtype: torch.dtype) -> None:
        """Let all ranks make a cache of as many pages as the leader's."""
        sizes = {group: [size.pages, size.tokens] for group, size in counts.items()}
        self.tell("pool", counts=sizes, dtype=dtype_name(dtype))

    def copy_page(self, group: GroupId, source: int, target: int) -> None:
        """Let all ranks copy a page."""
        self.tell("copy_page", group=group, source=source, target=target)

    def close(self) -> None:
        """Let the other ranks end."""
        self.monitor.close()
