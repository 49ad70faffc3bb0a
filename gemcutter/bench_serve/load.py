"""Keeps to the arrival times: sends every request when it is due, whether earlier ones have been answered or not.

Owns the clock of a run and the limit on concurrency. What the client itself adds is measured and not hidden: how late its loop
came to a request, and how long that then waited for the limit, are kept apart from the server's times. Refuses to know HTTP and
statistics. Read `client.py` for how one request is sent, `metrics.py` for what is made of the replies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from gemcutter.bench_serve.reply import Reply
from gemcutter.bench_serve.workload import BenchRequest, Turn, Workload


class Sender(Protocol):
    """Sends one turn; `Client` is one."""

    async def send(self, turn: Turn, history: Sequence[Mapping[str, Any]], reply: Reply) -> None:
        """Fill `reply`."""


@dataclass(frozen=True, slots=True)
class Run:
    """One load and what came of it: `replies` in the order of arrival, those of a conversation behind each other.

    `arrivals_s` are the times that were planned, `started_s` and `ended_s` those of the whole run.
    """

    replies: tuple[Reply, ...]
    arrivals_s: tuple[float, ...]
    started_s: float
    ended_s: float

    @property
    def duration_s(self) -> float:
        """Return how long the whole run took."""
        return self.ended_s - self.started_s


async def run_load(
    sender: Sender,
    workload: Workload,
    arrivals_s: Sequence[float],
    max_concurrency: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Send a workload's requests at their times and wait for all replies."""
    done = 0
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    started_s = time.perf_counter()

    async def play(request: BenchRequest, due_s: float) -> list[Reply]:
        nonlocal done
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        found, history = list[Reply](), list(request.history)
        for number, turn in enumerate(request.turns):
            reply = Reply(prompt_len=turn.prompt_len, wanted_len=turn.output_len, num_images=len(turn.images), turn=number)
            reply.dispatched_s = time.perf_counter()
            reply.due_s = reply.dispatched_s if number else due_s  # a later turn is due when the reply before it is there
            async with slots or nullcontext():
                await sender.send(turn, history, reply)
            found.append(reply)
            done += 1
            progress(done, workload.turns)
            if reply.error:
                break  # what comes after it was never asked
            history += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": reply.content}]
        return found

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(play(request, started_s + due_s))
            for request, due_s in zip(workload.requests, arrivals_s, strict=True)
        ]
    ended_s = time.perf_counter()
    replies = [reply for task in tasks for reply in task.result()]
    return Run(tuple(replies), tuple(arrivals_s), started_s, ended_s)
