"""Ranks that find each other over TCP, as torchrun starts them on any number of hosts: here all of them on this one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed

from bench.links import rank_environment
from gemcutter import native

pytestmark = pytest.mark.skipif(
    native.missing() is not None or not torch.distributed.is_gloo_available(), reason="no native library, or no gloo"
)

ROOT = Path(__file__).parents[2]
RUN = ["-m", "gemcutter", "run", "demo", "What is a lantern?", "-n"]
PLAIN = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
SOON_S = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def rank_of(rank: int, world: int, port: int, *command: str) -> subprocess.Popen[str]:
    """Start a rank with the environment that torchrun would give it."""
    environment = PLAIN | rank_environment(rank, "127.0.0.1", port, world) | {"GLOO_SOCKET_IFNAME": "lo"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(("ranks", "options"), [(2, []), (2, ["--pp", "2"]), (4, ["--pp", "2"]), (3, ["--pp", "3"])])
def test_torchrun_starts_a_command_on_several_ranks(ranks: int, options: list[str]) -> None:
    plain = subprocess.run([sys.executable, *RUN, "24"], cwd=ROOT, env=PLAIN, capture_output=True, text=True, check=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    both = subprocess.run(
        [sys.executable, *torchrun, *RUN, "24", *options], cwd=ROOT, env=PLAIN, capture_output=True, text=True, timeout=120
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout == plain.stdout
    assert plain.stdout


def test_three_ranks_are_too_many_for_four_heads() -> None:
    port = free_port()
    ranks = [rank_of(rank, 3, port, *RUN, "8") for rank in range(3)]
    assert "4 query heads can't be shared evenly" in ranks[0].communicate(timeout=SOON_S)[1]
    assert ranks[0].returncode == 1
    for rank in ranks[1:]:  # which wait for the first until torchrun ends them
        rank.kill()
        rank.communicate()


def test_stages_that_can_not_have_equally_many_ranks_are_refused() -> None:
    port = free_port()
    ranks = [rank_of(rank, 3, port, *RUN, "8", "--pp", "2") for rank in range(3)]
    assert "torchrun started 3 ranks, which so many stages can't share evenly" in ranks[0].communicate(timeout=SOON_S)[1]
    assert ranks[0].returncode == 1
    for rank in ranks[1:]:
        rank.kill()
        rank.communicate()


@pytest.mark.parametrize("options", [[], ["--pp", "2"]], ids=["ranks", "stages"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(victim: int, options: list[str]) -> None:
    port = free_port()
    ranks = [rank_of(rank, 2, port, *RUN, "30000", "--ignore-eos", *options) for rank in range(2)]
    assert ranks[0].stdout is not None
    assert ranks[0].stdout.read(20)  # the reply has begun
    os.kill(ranks[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    said = ranks[1 - victim].communicate(timeout=SOON_S)[1]
    assert time.monotonic() - killed < SOON_S
    if victim == 0:  # whose end looks like any other to a rank that waits for commands
        assert ranks[1].returncode in (0, 1)
    else:
        assert ranks[0].returncode == 1
        assert "error:" in said
        assert "rank" in said or "stage" in said
    ranks[victim].communicate()


def test_ranks_leave_the_group_before_the_interpreter_ends() -> None:
    """torch's threads would still be there otherwise, and have ended processes by SIGABRT after their text was printed."""
    script = (
        "import runpy, sys, torch.distributed\n"
        "sys.argv = ['gemcutter', *sys.argv[1:]]\n"
        "try: runpy.run_module('gemcutter', run_name='__main__')\n"
        "except SystemExit: print('joined:', torch.distributed.is_initialized())\n"
    )
    port = free_port()
    ranks = [rank_of(rank, 2, port, "-c", script, *RUN[2:], "4") for rank in range(2)]
    for rank in ranks:
        said, problem = rank.communicate(timeout=SOON_S)
        assert said.splitlines()[-1:] == ["joined: False"], problem
        assert rank.returncode == 0
