"""A rank that dies or hangs: every request ends once, with an error, soon; nothing is left behind, and the next start works."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gemcutter import native
from gemcutter.api import Model, load_model
from gemcutter.cli.app import main
from gemcutter.engine.request import FinishReason, Request, RequestEvent
from gemcutter.errors import RankError
from gemcutter.load_options import LoadOptions
from tests.processes import descendants, runs

pytestmark = [
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
    pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc are Linux'"),
]

SOON_S = 10.0
REQUESTS = 6
ROUNDS = int(os.environ.get("GEMCUTTER_CASES", "3"))


RANKS = {"tensor_parallel": 2}
STAGES = {"pipeline_parallel": 3}


def load(**how: int) -> Model:
    """Load the demo on two ranks, or on several processes as given."""
    return load_model(LoadOptions(model="demo", dtype="float32", max_num_seqs=3, **(how or RANKS)))  # type: ignore[arg-type]


def followers_of(pid: int) -> list[int]:
    """Return the ranks that a process has started and that still run."""
    return [child for child in descendants(pid) if runs(child, "gemcutter.rank_process")]


def wait_until_gone(pids: list[int]) -> None:
    until = time.monotonic() + SOON_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until, "a rank is left"
        time.sleep(0.05)


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*gemcutter*")}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Let no test change what others compute with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("how", [RANKS, STAGES], ids=["ranks", "stages"])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_end_once_with_an_error(fault: signal.Signals, how: dict[str, int]) -> None:
    before, draw = shared_files(), random.Random(5)
    for _ in range(ROUNDS if fault == signal.SIGKILL else 1):
        model = load(**how)
        assert model.problem is None
        ranks = sorted(followers_of(os.getpid()))
        rank = draw.choice(ranks)
        ends, errors = Counter[int](), list[Exception | None]()

        def take(event: RequestEvent, ends: Counter[int] = ends, errors: list[Exception | None] = errors) -> None:
            if event.finish is not None:
                ends[event.request] += 1
                errors.append(event.error if event.finish is FinishReason.ERROR else None)

        prompts = [tuple(range(5, 5 + 40 * (index + 1))) for index in range(REQUESTS)]
        numbers = [model.loop.submit(Request(prompt, max_tokens=10_000), take) for prompt in prompts]
        time.sleep(draw.random())
        os.kill(rank, fault)
        broken = time.monotonic()
        while len(ends) < REQUESTS:
            assert time.monotonic() - broken < SOON_S
            time.sleep(0.02)
        time.sleep(0.1)
        assert dict(ends) == dict.fromkeys(numbers, 1)
        said = str(model.problem)
        assert re.match(r"rank \d (ended|has hung)|a rank is gone|the pipeline is broken", said), said
        assert all(isinstance(error, RankError) and str(error) == said for error in errors)
        wait_until_gone(ranks)
        with pytest.raises(RankError, match=re.escape(said)):  # whoever asks now is told, too
            model.generate("A lantern", max_tokens=4)
        model.close()
    with load(**how) as again:
        assert again.generate("A lantern", max_tokens=4).text
    assert shared_files() == before


@pytest.mark.parametrize("how", [RANKS, STAGES], ids=["ranks", "stages"])
def test_closing_a_model_ends_its_ranks(how: dict[str, int]) -> None:
    threads = torch.get_num_threads()
    model = load(**how)
    (count,) = how.values()
    assert torch.get_num_threads() == max(1, threads // count)
    model.loop.submit(Request((5, 6, 7), max_tokens=10_000), lambda event: None)  # closed in the middle of it
    ranks = followers_of(os.getpid())
    assert len(ranks) == count - 1
    model.close()
    wait_until_gone(ranks)
    assert torch.get_num_threads() == threads


def test_ranks_outlive_the_thread_that_loaded_the_model() -> None:
    with ThreadPoolExecutor(1) as threads:
        model = threads.submit(load).result()
    time.sleep(0.5)
    with model:
        assert model.generate("A lantern", max_tokens=4).text


def test_a_model_that_nobody_holds_ends_its_ranks() -> None:
    model = load()
    ranks = followers_of(os.getpid())
    model.loop.close()
    del model
    import gc

    gc.collect()
    wait_until_gone(ranks)


@pytest.mark.parametrize(
    "words",
    [
        "verify demo --tokens 64 --tp 2",
        "verify demo --tokens 64 --pp 2",
        f"score demo {__file__} --window 256 --tp 2",
        "bench demo -p 16 -n 2 -r 1 --tp 2",
        "bench demo -p 16 -n 2 -r 1 --pp 2",
    ],
)
def test_a_command_that_a_program_calls_ends_its_ranks(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 0, capsys.readouterr().err
    assert followers_of(os.getpid()) == []


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_ranks_end_with_their_leader(end: signal.Signals | None) -> None:
    program = """
import gemcutter, sys, time, torch
torch.set_num_threads(1)
model = gemcutter.load("demo", tensor_parallel=2, pipeline_parallel=2, dtype="float32")
print("loaded", flush=True)
sys.stdin.readline()
"""
    leader = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    assert leader.stdin is not None
    assert leader.stdout.readline() == "loaded\n"
    ranks = followers_of(leader.pid)
    assert len(ranks) == 3
    if end is None:
        print(file=leader.stdin, flush=True)
    else:
        leader.send_signal(end)
    leader.communicate(timeout=30)
    wait_until_gone(ranks)


def test_a_model_that_can_not_be_shared_is_refused_before_a_process_starts() -> None:
    with pytest.raises(Exception, match="over 3 ranks: 4 query heads can't be shared evenly"):
        load(tensor_parallel=3)
    assert followers_of(os.getpid()) == []
