"""Sums and rows side by side over processes that share memory: the same on each, and over when a rank is gone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

import pytest
import torch

from gemcutter import native
from gemcutter.errors import RankError
from gemcutter.parallel.shared_ranks import SLOT_FLOATS, SharedRanks, new_segment
from gemcutter.shard import Shard

pytestmark = pytest.mark.skipif(
    native.missing() is not None or not hasattr(os, "memfd_create"), reason="no native library, or no such memory"
)

SIZES = [1, 15, 16, 1000, 40_000, SLOT_FLOATS, 2 * SLOT_FLOATS + 333]
OTHER = """
import hashlib, sys, time, torch, random
from gemcutter.parallel.shared_ranks import SharedRanks
from gemcutter.shard import Shard
file, rank, world = map(int, sys.argv[1:4])
torch.set_num_threads(rank + 1)
ranks, draw = SharedRanks(file, Shard(rank, world)), random.Random(rank)
sizes, widths = eval(sys.argv[4]), eval(sys.argv[5])
seen = hashlib.sha256()
for size in sizes:
    time.sleep(draw.random() / 50)
    x = torch.randn(size, generator=torch.Generator().manual_seed(size + rank))
    seen.update(ranks.sum(x).numpy().tobytes())
for rows in (1, 3, 70):
    time.sleep(draw.random() / 50)
    x = torch.randn(rows, widths[rank], generator=torch.Generator().manual_seed(rows + rank))
    seen.update(ranks.join(x, widths).numpy().tobytes())
print(seen.hexdigest())
"""


def start(program: str, file: int, rank: int, world: int, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(file), str(rank), str(world), *map(repr, more)]
    return subprocess.Popen(command, pass_fds=(file,), stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("world", [2, 3])
def test_sums_and_rows_of_all_ranks(world: int) -> None:
    """Every rank gets the same numbers, bit for bit: the sums in the order of ranks, the rows side by side."""
    widths = [70_000, 30_000, 48][:world]
    file = new_segment(world)
    others = [start(OTHER, file, rank, world, SIZES, widths) for rank in range(1, world)]
    ranks, seen = SharedRanks(file, Shard(0, world)), hashlib.sha256()
    os.close(file)
    for size in SIZES:
        parts = [torch.randn(size, generator=torch.Generator().manual_seed(size + rank)) for rank in range(world)]
        wanted = parts[0].clone()
        for part in parts[1:]:
            wanted += part
        found = ranks.sum(parts[0])
        assert torch.equal(found, wanted)
        seen.update(found.numpy().tobytes())
    for rows in (1, 3, 70):
        drawn = [torch.randn(rows, widths[rank], generator=torch.Generator().manual_seed(rows + rank)) for rank in range(world)]
        found = ranks.join(drawn[0], widths)
        assert torch.equal(found, torch.cat(drawn, dim=1))
        seen.update(found.numpy().tobytes())
    for other in others:
        assert other.communicate(timeout=60)[0].strip() == seen.hexdigest()


def test_a_wait_is_over_when_the_group_ends() -> None:
    file = new_segment(2)
    waiting = start(
        """
import sys, torch
from gemcutter.errors import RankError
from gemcutter.parallel.shared_ranks import SharedRanks
from gemcutter.shard import Shard
ranks = SharedRanks(int(sys.argv[1]), Shard(1, 2))
ranks.beat()
try:
    ranks.sum(torch.ones(5))
except RankError as error:
    print(error)
""",
        file,
        1,
        2,
    )
    ranks = SharedRanks(file, Shard(0, 2))
    os.close(file)
    until = time.monotonic() + 60
    while not ranks.beats()[1] and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    assert waiting.poll() is None  # asleep, since nobody else has come
    assert not ranks.has_ended
    ranks.end()
    assert "a rank is gone" in waiting.communicate(timeout=10)[0]
    with pytest.raises(RankError, match="is gone"):
        ranks.sum(torch.ones(5))
    with pytest.raises(RankError, match="is gone"):
        ranks.join(torch.ones(1, 2), (2, 2))
