"""Tensor-parallel ranks on the Triton kernels: the replies of one process, step by step and over static memory.

Both ranks are threads of this process, under Triton's interpreter, and add over memory that they share: what is tested is which
steps the leader tells of, and what the kernels make of a slice. Read `tests/parallel` for ranks that are processes.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime import interpreter

from gemcutter.engine.cuda_graphs import CapturedStep, CapturedSteps
from gemcutter.engine.engine import Engine
from gemcutter.engine.memory import make_pool
from gemcutter.engine.request import Request
from gemcutter.engine.runner import StepResult
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.errors import RankError
from gemcutter.model.text import Decoder
from gemcutter.ops.types import Param
from gemcutter.parallel.follower import EngineParts, Follower
from gemcutter.parallel.leader import Leader
from gemcutter.parallel.monitor import Monitor
from gemcutter.param_spec import ParamSpec
from gemcutter.quant import Weight
from gemcutter.shard import Shard
from tests.triton.decoders import draw_params, plan_of, prompt

CPU, WORLD, CONTEXT, SOON_S = torch.device("cpu"), 2, 40, 60.0
DRAWN = SamplingParams(temperature=1.0, top_k=8, top_p=0.9, seed=5)
REQUESTS = [Request(prompt(13), max_tokens=8), Request(prompt(5, 1), DRAWN, 3)]

pytestmark = [
    pytest.mark.usefixtures("plain_products", "one_kernel_at_a_time"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="threads of one process can't add in the middle of a graph"),
]


@pytest.fixture
def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs in one thread."""
    turn, run = threading.Lock(), interpreter.GridExecutor.__call__

    def alone(self: Any, *arguments: Any, **constants: Any) -> Any:
        with turn:
            return run(self, *arguments, **constants)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", alone)


class ThreadRanks:
    """One of the ranks of this process."""

    view = None

    def __init__(self, rank: int, barrier: threading.Barrier, brought: list[Tensor]) -> None:
        self.shard, self._barrier, self._brought = Shard(rank, WORLD), barrier, brought

    def _exchange(self, x: Tensor, use: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        try:
            self._brought[self.shard.rank] = x
            self._barrier.wait(SOON_S)
            found = use(self._brought)
            self._barrier.wait(SOON_S)
        except threading.BrokenBarrierError as error:
            raise RankError("a rank is gone") from error
        return found

    def sum(self, x: Tensor) -> Tensor:
        return self._exchange(x, lambda brought: torch.stack(list(brought)).sum(0))

    def join(self, x_RV: Tensor, widths: Sequence[int]) -> Tensor:
        assert x_RV.shape[1] == widths[self.shard.rank]
        return self._exchange(x_RV, lambda brought: torch.cat(list(brought), dim=1))


def share_of(spec: ParamSpec, param: Param) -> Param:
    """Return what a rank holds of a parameter: experts' parts stay side by side in one stack."""
    if not spec.slices:
        return param
    if isinstance(param, Tensor):
        (taken,) = spec.slices
        return param.narrow(taken.axis, taken.start, taken.size)
    whole, axis, offset, kept = torch.cat(param.parts, dim=-2), spec.slices[0].axis, 0, list[Tensor]()
    for taken in spec.slices:
        kept.append(whole.narrow(axis, offset + taken.start, taken.size))
        offset += taken.of
    mine = torch.cat(kept, dim=axis).contiguous()
    parts = mine.split([rows for _, rows in spec.parts] or [mine.shape[-2]], dim=-2)
    return Weight(parts if mine.ndim == 3 else tuple(part.clone() for part in parts), param.names)


def rank_of(name: str, ranks: ThreadRanks, leader: Leader | None = None) -> Decoder:
    """Build a rank's decoder over its slices of a small model."""
    whole, plan = plan_of(name), plan_of(name).shard(ranks.shard.rank, WORLD, cuts_ple=True)
    params = draw_params(whole, torch.float32, CPU)
    mine = {spec.name: share_of(spec, params[spec.name]) for spec in plan.params()}
    return Decoder(plan, mine, torch.float32, CPU, "triton", ranks=ranks, leader=leader)


class TwoRanks:
    """A leader and a rank that follows it, in a thread; `commands` are what this one was told."""

    def __init__(self, name: str) -> None:
        self.barrier, brought = threading.Barrier(WORLD), [torch.empty(0)] * WORLD
        here, there = socket.socketpair()
        self.leader = Leader([here], Monitor([], [here], self.barrier.abort, list), 1)
        self.decoder = rank_of(name, ThreadRanks(0, self.barrier, brought), self.leader)
        follower = Follower(
            rank_of(name, ThreadRanks(1, self.barrier, brought)), None, EngineParts(make_pool, CapturedSteps), _no
        )
        self.commands = list[str]()
        self._listen(follower)
        self._thread = threading.Thread(target=follower.serve, args=(there,))
        self._thread.start()

    def _listen(self, follower: Follower) -> None:
        for name in [name for name in dir(follower) if name.startswith("do_")]:
            setattr(follower, name, self._noting(name.removeprefix("do_"), getattr(follower, name)))

    def _noting(self, command: str, do: Callable[..., None]) -> Callable[..., None]:
        def noted(**content: Any) -> None:
            self.commands.append(command)
            do(**content)

        return noted

    def close(self) -> None:
        """End both."""
        self.leader.close()
        self._thread.join(SOON_S)
        assert not self._thread.is_alive()


def _no(name: str, path: str, ignore: Sequence[str]) -> Any:
    raise AssertionError("nobody loads an adapter here")


@pytest.fixture(params=["readers", "experts"])
def two(request: pytest.FixtureRequest) -> Iterator[tuple[str, TwoRanks]]:
    """Two ranks of a small model, and its name."""
    found = TwoRanks(request.param)
    yield request.param, found
    found.close()


def replies(engine: Engine, requests: Sequence[Request] = REQUESTS) -> list[list[int]]:
    """Run requests, submitted one a step, and give each one's reply."""
    found, waiting = dict[int, list[int]](), list(requests)
    with torch.inference_mode():
        while waiting or engine.has_work:
            if waiting:
                found[engine.submit(waiting.pop(0))] = []
            for event in engine.step():
                assert event.error is None
                found[event.request] += [] if event.token is None else [event.token]
    return list(found.values())


def engine_of(decoder: Decoder, graphs: bool) -> Engine:
    return Engine(decoder, CONTEXT, max_batched_tokens=16, max_num_seqs=3, graphs=graphs)


@cache
def alone(name: str) -> list[list[int]]:
    """Return the replies of one process."""
    plan = plan_of(name)
    return replies(engine_of(Decoder(plan, draw_params(plan, torch.float32, CPU), torch.float32, CPU, "triton"), graphs=False))


@pytest.mark.parametrize("graphs", [False, True])
def test_two_ranks_reply_as_one_process(two: tuple[str, TwoRanks], graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, beyond the window and beside others; tokens drawn and the likeliest ones."""
    name, ranks = two
    followed, result = list[tuple[str, bool]](), CapturedStep.result

    def listed(self: CapturedStep) -> StepResult:
        followed.append((self.source.value, self.is_followed))
        return result(self)

    monkeypatch.setattr(CapturedStep, "result", listed)
    assert ranks.decoder.kernel_names == {"triton"}
    assert replies(engine_of(ranks.decoder, graphs)) == alone(name)
    assert ("static_step" in ranks.commands) == graphs
    if graphs:
        assert ("greedy", True) in followed  # ids that only the ranks know
        assert ("sampled", False) in followed
        assert ("sampled", True) not in followed  # the leader tells which token was drawn


def test_a_rank_that_is_gone_spoils_the_step_under_way(two: tuple[str, TwoRanks], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU gives once the others are gone looks like any result: its tokens reach nobody."""
    _, ranks = two
    engine, result = engine_of(ranks.decoder, graphs=True), CapturedStep.result

    def ends(self: CapturedStep) -> StepResult:
        found = result(self)
        ranks.leader.monitor.end("rank 1 is gone")
        return found

    monkeypatch.setattr(CapturedStep, "result", ends)
    engine.submit(Request(prompt(4), max_tokens=6))
    with torch.inference_mode():
        events = [*engine.step(), *engine.step()]
        assert not engine.has_work
    assert [event.token for event in events if event.token is not None] == [events[0].token]
    assert "rank 1 is gone" in str(events[-1].error)
