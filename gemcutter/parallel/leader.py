"""How rank 0 leads: it tells the other ranks of every step before it takes part itself.

Owns the commands and what becomes of a group in which something went wrong: it ends, since ranks that are not in the same place
would wait for each other. Refuses to know how ranks are started. Read `follower.py` for the other side, `messages.py` for how
commands are spelled.

    pool        number, counts [pages, tokens] by group, dtype   make a cache
    drop        number                                           let go of it
    copy_page   number, group, source, target                    copy one of its pages
    forward     number, step                                     run a step over it, or begin it where it comes back
    finish                                                       finish the oldest step that was begun
    logits      states                                           run the head
    load_adapter     name, path, ignore                          let steps ask for an adapter
    unload_adapter   name                                        forget it
    draft       number, ids, states, step, count                 draft so many tokens, or the logits of one
    capture     number, shape                                    capture a static step
    static_step number, shape, numbers                           run it over these numbers

A connection that is closed ends the others. What concerns the head, and rows that have come back through a pipeline, is told to
the ranks of the leader's own stage alone.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, finalize

from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.errors import RankError
from gemcutter.ops.step import KVCache, Step
from gemcutter.ops.types import StaticShape
from gemcutter.parallel.messages import encode, step_content
from gemcutter.parallel.monitor import Monitor
from gemcutter.plan import GroupId
from gemcutter.quant.packed import dtype_name


class Leader:
    """The way to the other ranks: steps by one thread at a time, adapters by any.

    The first `own` connections lead to the ranks of the leader's own stage. `give_back` is called once all are gone: this process
    may use the cores that they had. `settle` is called before pages are copied here: it finishes what was begun.
    """

    def __init__(
        self,
        connections: Sequence[socket.socket],
        monitor: Monitor,
        own: int,
        give_back: Callable[[], None] = lambda: None,
    ) -> None:
        self.connections, self.monitor, self._own, self._give_back = connections, monitor, own, give_back
        self.settle: Callable[[], None] = lambda: None
        self._numbers = WeakKeyDictionary[PagedKVCache, int]()  # of caches that the other ranks have, too
        self._new_number, self._dropped, self._telling = count(), deque[int](), threading.Lock()

    @property
    def problem(self) -> str | None:
        """Return why the group has ended, None while it runs."""
        return self.monitor.problem

    def tell(self, command: str, **content: Any) -> None:
        """Send a command to all other ranks. Raises RankError if one is gone."""
        self._send(self.connections, command, content)

    @property
    def _own_connections(self) -> Sequence[socket.socket]:
        """Return the ways to the other ranks of this stage."""
        return self.connections[: self._own]

    def _send(self, connections: Sequence[socket.socket], command: str, content: Mapping[str, Any]) -> None:
        if self.monitor.problem is not None:
            raise RankError(self.monitor.problem)
        if not connections:
            return
        message = encode(command, content)
        try:
            with self._telling:
                for connection in connections:
                    connection.sendall(message)
        except OSError as error:
            self.monitor.end(f"a rank is gone: {error}")
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
    def _lead(self, connections: Sequence[socket.socket], command: str, **content: Any) -> Iterator[None]:
        """Send the other ranks a command and take part in it. Raises RankError if a rank is gone."""
        self._send(connections, command, content)
        with self._together():
            yield

    def step(self, step: Step, cache: KVCache) -> AbstractContextManager[None]:
        """Let all ranks run a step over their part of a cache. Raises RankError if a rank is gone."""
        return self._lead(self.connections, "forward", number=self._number_of(cache), step=step_content(step))

    def finish(self) -> AbstractContextManager[None]:
        """Let the ranks of this stage finish the oldest step that was begun. Raises RankError if a rank is gone."""
        return self._lead(self._own_connections, "finish")

    def head(self, h_RD: Tensor) -> AbstractContextManager[None]:
        """Let the ranks of this stage run the head. Raises RankError if a rank is gone."""
        return self._lead(self._own_connections, "logits", states=h_RD)

    def drafts(
        self, ids_S: Tensor, states_ST: Tensor, step: Step, cache: KVCache, count: int | None
    ) -> AbstractContextManager[None]:
        """Let the ranks of this stage draft. Raises RankError if a rank is gone."""
        content = {"ids": ids_S, "states": states_ST, "step": step_content(step), "count": count}
        return self._lead(self._own_connections, "draft", number=self._number_of(cache), **content)

    def capture(self, static: StaticShape, cache: KVCache) -> AbstractContextManager[None]:
        """Let all ranks capture a static step as a graph. Raises RankError if a rank is gone."""
        return self._lead(self.connections, "capture", number=self._number_of(cache), shape=asdict(static))

    def static_step(self, static: StaticShape, cache: KVCache, numbers: Tensor) -> AbstractContextManager[None]:
        """Let all ranks run a static step over these bytes. Raises RankError if a rank is gone."""
        content = {"shape": asdict(static), "numbers": numbers}
        return self._lead(self.connections, "static_step", number=self._number_of(cache), **content)

    def load_adapter(self, name: str, path: str, ignore: Sequence[str]) -> None:
        """Let all ranks load an adapter. Raises RankError if a rank is gone."""
        self.tell("load_adapter", name=name, path=path, ignore=ignore)

    def unload_adapter(self, name: str) -> None:
        """Let all ranks forget an adapter. Raises RankError if a rank is gone."""
        self.tell("unload_adapter", name=name)

    def watch(self, watcher: Callable[[str], None]) -> None:
        """Let somebody know, in any thread, when the group ends because of a problem, and of which."""
        self.monitor.watch(watcher)

    def copy_page(self, pool: PagedKVCache, group: GroupId, source: int, target: int) -> None:
        """Let all ranks copy a page, and see that no step that was begun writes into either here."""
        self.settle()
        self.tell("copy_page", number=self._number_of(pool), group=group, source=source, target=target)

    def _number_of(self, cache: KVCache) -> int:
        """Return by what number the other ranks know a cache; they make their parts of one that is new."""
        assert isinstance(cache, PagedKVCache)
        known = self._numbers.get(cache)
        if known is not None:
            return known
        number = self._numbers[cache] = next(self._new_number)
        while self._dropped:
            self.tell("drop", number=self._dropped.popleft())
        sizes = {group: [size.pages, size.tokens] for group, size in cache.counts.items()}
        self.tell("pool", number=number, counts=sizes, dtype=dtype_name(cache.dtype))
        cache.mirror = self
        finalize(cache, self._dropped.append, number)
        return number

    def close(self) -> None:
        """Let the other ranks end, with what was begun behind them, and use again what was shared with them."""
        with suppress(RankError):
            self.settle()
        self.monitor.close()
        self._give_back()
