"""One benchmark from the first question to the server to its outcome.

Owns the order: a warm-up, the cache emptied where that is wanted, what the server counts, the load, and the counts again. Refuses
to know the command line and what an outcome looks like. Read `load.py` for the load itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gemcutter.bench_serve.arrivals import arrival_times
from gemcutter.bench_serve.client import Client, Target, request_body
from gemcutter.bench_serve.load import run_load
from gemcutter.bench_serve.reply import Reply
from gemcutter.bench_serve.report import Outcome, Settings
from gemcutter.bench_serve.server_counts import ask_counts
from gemcutter.bench_serve.workload import Workload
from gemcutter.errors import RequestError


@dataclass(frozen=True, slots=True)
class Plan:
    """How a workload is sent: the settings that results carry, and what they do not."""

    settings: Settings
    seed: int = 0
    warmup_requests: int = 1
    exact_rate: bool = False
    flushes_cache: bool = False


async def choose_model(target: Target) -> Target:
    """Return the target with the first model that the server lists, where none is named. Raises RequestError if it lists none."""
    if target.model:
        return target
    client = Client(target)
    try:
        names = await client.models()
    finally:
        await client.close()
    if not names:
        raise RequestError(f"{target.url} lists no model; give its name with --model")
    return replace(target, model=names[0])


async def bench(
    target: Target,
    workload: Workload,
    plan: Plan,
    count: Callable[[str], int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Send a workload and return what came of it; failed requests are part of the outcome.

    Raises RequestError for requests that the API can't carry, and where the server fails before the load has begun.
    """
    how = plan.settings
    for request in (workload.warmup, *workload.requests):
        request_body(target, request.turns[0], request.history)
        if len(request.turns) > 1 and target.api != "chat":
            raise RequestError("--api completions takes one prompt; images and conversations go to --api chat")
    client = Client(target)
    try:
        for _ in range(plan.warmup_requests):
            reply = Reply()
            await client.send(workload.warmup.turns[0], workload.warmup.history, reply)
            if reply.error:
                raise RequestError(f"the warm-up request to {target.url} failed: {reply.error}")
        if plan.flushes_cache:
            await client.flush()
        before = await ask_counts(client)
        arrivals_s = arrival_times(
            len(workload.requests), how.request_rate, how.burstiness, plan.seed, exact_rate=plan.exact_rate
        )
        run = await run_load(client, workload, arrivals_s, how.max_concurrency, progress)
        return Outcome(how, run, workload.turns, before, await ask_counts(client), count)
    finally:
        await client.close()


def problems_of(outcome: Outcome) -> Iterator[str]:
    """Yield what went wrong in a run, so that nobody takes its numbers for those of one that went well."""
    errors = [each.error for each in outcome.failed]
    for error in dict.fromkeys(errors):
        yield f"{errors.count(error)} x {error}"
    if unsent := outcome.planned_turns - len(outcome.run.replies):
        yield f"{unsent} turns of conversations were not sent, since the one before failed"
