"""What routing by prefix is worth: many short conversations before replicas on Ray, with each way to route in turn.

Owns the scene: replicas of a model on a Ray cluster of this machine's own, conversations of a few turns with so many at once, and
of each way to route the share of later turns' prompt tokens that a replica had cached, and the time of all. Refuses to know how
replicas are made. Read `conversations.py` for what is said, `docs/guide/replicas.md` for the numbers.

    python bench/ray_replicas.py --conversations 200 --replicas 2
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.ray_replicas` has it

from bench.conversations import hold_all
from bench.ratios import RESULTS, spell_machine
from gemcutter.benchmark.hardware import describe
from gemcutter.errors import GemcutterError
from gemcutter.ray import deployment
from gemcutter.ray.options import ROUTINGS

SEQUENCES = 4  # that run at once at each replica


def measure(url: str, routing: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return what one way to route gives, on replicas that know nothing yet."""
    from ray import serve

    load = {"model": chosen.model, "context": 2048, "max_num_seqs": SEQUENCES}
    serve.run(deployment({"load": load, "server": {"names": ["demo"]}, "replicas": chosen.replicas, "routing": routing}))
    started_s = time.perf_counter()
    counts = hold_all(url, range(chosen.conversations), chosen.turns, chosen.at_once)
    taken_s = time.perf_counter() - started_s
    serve.delete("default")
    return {"routing": routing, "prompt_tokens": counts.prompt, "cached_tokens": counts.cached, "seconds": round(taken_s, 2)}


def main() -> int:
    """Measure each way to route, print a table, and keep the numbers. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--no-keep", action="store_true", help="print the numbers without writing them into bench/results")
    chosen = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve

        ray.init(address="local", num_cpus=chosen.replicas, include_dashboard=False, log_to_driver=False, logging_level="error")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": logging.ERROR})
        rows = [measure(f"http://127.0.0.1:{port}", routing, chosen) for routing in reversed(ROUTINGS)]
        ray.shutdown()
    except (ImportError, GemcutterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'routing':10} {'cached share':>13} {'seconds':>9}")
    for row in rows:
        print(f"{row['routing']:10} {row['cached_tokens'] / max(row['prompt_tokens'], 1):13.1%} {row['seconds']:9.1f}")
    if not chosen.no_keep:
        keep(rows, chosen)
    return 0


def keep(rows: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    """Write the numbers into the file of this day and machine."""
    machine, day = describe(), date.today().isoformat()
    scene = {name: getattr(chosen, name) for name in ("model", "replicas", "conversations", "turns", "at_once")}
    path = RESULTS / f"replicas-{day}-{spell_machine(machine)}.json"
    path.write_text(json.dumps({"date": day, "machine": machine, "scene": scene, "rows": rows}, indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    sys.exit(main())
