"""What sums over tensor-parallel ranks cost: by size over shared memory and over gloo, beside the memory's limit.

Owns the processes and the clock. A step of a model with L layers and D columns sums 2 L times D floats for each row, and L times
as many more with experts. Every rank copies its part into shared memory and reads all parts: the floor is world + 1 times the
bytes at the memory's rate, unless they stay in a cache. Refuses to know models; for those run `gemcutter bench MODEL --tp N`.

    python bench/ranks.py --world 2 --json bench/results/ranks.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from gemcutter.benchmark.hardware import describe, read_rate
from gemcutter.parallel.distributed_ranks import GLOO, DistributedRanks, come_to_store, join_group, leave_group, open_store
from gemcutter.parallel.shared_ranks import SharedRanks, new_segment
from gemcutter.shard import Place, Shard

SIZES = (1536, 12_288, 98_304, 786_432, 6_291_456)  # floats: one row of E2B, and 8, 64, 512, 4096
LEAST_RUNS, LEAST_S = 20, 0.4


def median_s(sum_once: Callable[[], object], runs: int) -> float:
    """Return the median time of a sum, after a tenth of the runs that do not count."""
    times = list[float]()
    for index in range(runs + runs // 10):
        started = time.perf_counter()
        sum_once()
        if index >= runs // 10:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(ranks: SharedRanks | DistributedRanks) -> list[float]:
    """Sum every size as often on each rank; return the medians."""
    found = list[float]()
    for size in SIZES:
        x = torch.randn(size)
        runs = max(LEAST_RUNS, min(2000, int(LEAST_S * 4e9 / (16 * size))))
        found.append(median_s(lambda x=x: ranks.sum(x), runs))
    return found


def both(file: int, rank: int, world: int, store: TCPStore) -> dict[str, list[float]]:
    """Measure both ways to sum as one of the ranks, which meet at a store."""
    torch.set_num_threads(1)
    shared = measure(SharedRanks(file, Shard(rank, world)))
    join_group(GLOO, rank, world, store)
    gloo = measure(DistributedRanks(Place(rank, world)))
    leave_group()  # its threads may not outlive the process's own
    return {"shared": shared, "gloo": gloo}


def main() -> int:
    """Start the other ranks, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        both(given.file, given.rank, given.world, come_to_store(given.port, given.rank, given.world))
        return 0
    rate, file, store = read_rate(), new_segment(given.world), open_store(given.world)
    command = [sys.executable, __file__, "--world", str(given.world), "--port", str(store.port), "--file", str(file), "--rank"]
    others = [subprocess.Popen([*command, str(rank)], pass_fds=(file,)) for rank in range(1, given.world)]
    found = both(file, 0, given.world, store)
    os.close(file)
    for other in others:
        other.wait(60)
    rows = list[dict[str, Any]]()
    print(f"{'floats':>10} {'bytes':>10} {'shared us':>10} {'gloo us':>10} {'ratio':>6} {'limit us':>9}")
    for index, size in enumerate(SIZES):
        shared, gloo, limit = found["shared"][index], found["gloo"][index], 4 * size * (given.world + 1) / rate
        rows.append({"floats": size, "shared_s": shared, "gloo_s": gloo, "limit_s": limit})
        print(f"{size:10} {4 * size:10} {1e6 * shared:10.1f} {1e6 * gloo:10.1f} {gloo / shared:6.1f} {1e6 * limit:9.1f}")
    if given.json:
        about = {"date": str(date.today()), "world": given.world, "machine": describe(), "read_bytes_per_s": rate}
        given.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
