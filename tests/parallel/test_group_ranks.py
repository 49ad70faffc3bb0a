"""Ranks that this program starts and that sum by torch.distributed, as on GPUs: on CPUs gloo stands in for NCCL.

Where there are two GPUs, the last tests run on them. Read `tests/triton/test_graphs_of_ranks.py` for the kernels and graphs of
ranks.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from gemcutter import native
from gemcutter.api import load_model
from gemcutter.errors import KernelError, RankError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import check_processes, on_device_of
from gemcutter.parallel import launch
from gemcutter.parallel.distributed_ranks import GLOO, NCCL, DistributedRanks, join_group, leave_group, open_store
from gemcutter.shard import Place
from tests.parallel.test_faults import followers_of, wait_until_gone
from tests.parallel.test_parity import answers, asked_of_one, compare, model

pytestmark = pytest.mark.skipif(
    native.missing() is not None or not dist.is_gloo_available(), reason="no native library, or no gloo"
)
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
SOON_S = 10.0


@pytest.fixture
def by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks of this host sum as GPUs do, by another part of torch.distributed."""
    monkeypatch.setattr(launch, "group_backend", lambda options: GLOO)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.usefixtures("by_gloo")
@pytest.mark.parametrize(("ranks", "stages", "kernels"), [(2, 1, "auto"), (2, 1, "reference"), (2, 2, "auto"), (1, 2, "auto")])
def test_replies_are_those_of_one_process(ranks: int, stages: int, kernels: str) -> None:
    requests, wanted = asked_of_one("demo", kernels=kernels)
    for _ in range(2):  # the same process may load another model afterwards
        with model("demo", ranks, pipeline_parallel=stages, kernels=kernels) as several:
            assert dist.get_backend() == GLOO
            compare(wanted, answers(several, requests))
        assert not dist.is_initialized()


@pytest.mark.usefixtures("by_gloo")
@pytest.mark.parametrize("stages", [1, 2])
def test_a_rank_that_is_killed_ends_the_request(stages: int) -> None:
    with model("demo", 2, pipeline_parallel=stages) as loaded:
        stream = loaded.stream([2, 9, 4], max_tokens=30_000, ignore_eos=True)
        next(stream)
        os.kill(followers_of(os.getpid())[-1], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(RankError, match=r"rank|stage"):
            list(stream)
        assert time.monotonic() - killed < SOON_S
        with pytest.raises(RankError):
            loaded.generate([[2, 9]], max_tokens=2)
    assert not followers_of(os.getpid())


@pytest.mark.usefixtures("by_gloo")
@pytest.mark.parametrize(("meeting", "problem"), [("gloo:1", "rank 1 did not come"), ("gloo:none", "exit code 1")])
def test_ranks_that_can_not_join_are_an_error(meeting: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of them, and the next load works."""
    start = launch._start

    def lost(place: Place, file: int, right: str, *more: object) -> object:
        return start(place, file, meeting, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "_start", lost)
    monkeypatch.setattr(launch, "COME_S", 1.0 if problem.endswith("come") else 60.0)
    with pytest.raises(RankError, match=problem), model("demo", 2):
        pass
    assert not followers_of(os.getpid())
    monkeypatch.undo()
    monkeypatch.setattr(launch, "group_backend", lambda options: GLOO)
    with model("demo", 2) as loaded:
        assert loaded.generate([[2, 9, 4]], max_tokens=3)


@pytest.mark.usefixtures("by_gloo")
def test_one_model_at_a_time_has_ranks_that_join_so() -> None:
    with model("demo", 2) as first:
        with pytest.raises(RankError, match="another model is loaded on several GPUs in this process; close it first"):
            load_model(LoadOptions(model="demo", tensor_parallel=2))
        assert first.generate([[2, 9, 4]], max_tokens=3)


@pytest.mark.usefixtures("by_gloo")
def test_a_model_that_nobody_holds_leaves_the_others() -> None:
    loaded = load_model(LoadOptions(model="demo", tensor_parallel=2))
    loaded.generate([[2, 9]], max_tokens=2)
    ranks = followers_of(os.getpid())
    loaded.loop.close()
    del loaded
    gc.collect()
    wait_until_gone(ranks)
    with model("demo", 2) as found:
        assert found.generate([[2, 9, 4]], max_tokens=3)


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    one = LoadOptions(model="demo", device="cuda", tensor_parallel=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(KernelError, match=r"4 processes sum by NCCL, which this build of torch lacks"):
        check_processes(one, 4)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    with pytest.raises(KernelError, match="4 processes need a GPU each, and this machine has 2"):
        check_processes(one, 4)
    with pytest.raises(KernelError, match=r"device cuda:1: 2 processes take a GPU each; use the device cuda"):
        check_processes(LoadOptions(model="demo", device="cuda:1", tensor_parallel=2), 2)
    check_processes(one, 2)  # of which two more run on another host
    assert launch.group_backend(one) == NCCL
    assert launch.group_backend(LoadOptions(model="demo", tensor_parallel=2)) is None


def test_every_process_has_a_gpu_of_its_own() -> None:
    assert on_device_of(LoadOptions(model="demo", device="cuda"), 3).device == "cuda:3"
    assert on_device_of(LoadOptions(model="demo"), 3).device == "cpu"


# ---- on GPUs ----


@pytest.fixture
def one_rank() -> Iterator[DistributedRanks]:
    """A group of one rank, which one GPU can have."""
    join_group(NCCL, 0, 1, open_store(1))
    yield DistributedRanks(Place(0))
    leave_group()


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
def test_exchanges_are_captured_in_a_graph(one_rank: DistributedRanks) -> None:
    assert one_rank.view is None
    x = torch.ones(3, 8, device="cuda", dtype=torch.bfloat16)
    one_rank.sum(x)
    one_rank.join(x.float(), [8])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = one_rank.join(one_rank.sum(x).float(), [8])
    x.fill_(2.0)
    graph.replay()
    assert found.tolist() == [[2.0] * 8] * 3


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
def test_a_group_that_has_ended_can_be_made_anew(one_rank: DistributedRanks) -> None:
    x = torch.ones(4, device="cuda")
    one_rank.sum(x)
    one_rank.end()
    leave_group()
    join_group(NCCL, 0, 1, open_store(1))
    assert DistributedRanks(Place(0)).sum(x).tolist() == [1.0] * 4


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("ranks", "stages"), [(2, 1), (1, 2)])
def test_two_gpus_reply_as_one(ranks: int, stages: int) -> None:
    requests, wanted = asked_of_one("demo", device="cuda")
    with model("demo", ranks, pipeline_parallel=stages, device="cuda") as several:
        compare(wanted, answers(several, requests))
