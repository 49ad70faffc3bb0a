"""Two hosts of one machine: a model on a rank in each of two network namespaces, over a link with delay and loss.

    python bench/links.py --delays 0 1 10 --loss 0 1

The link is a pair of TUN devices between which this program carries packets, each of them as many milliseconds late as asked, and
lost with the chance asked: TCP itself does all else, as between real hosts. Needs Linux, root, and /dev/net/tun. Of every way to
share a model, tensor parallelism over gloo and a pipeline, replies and prompts are timed at every delay, the replies are compared
with those of one process, and the times beside those that the count of exchanges predicts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from gemcutter.benchmark.hardware import describe

ROOT = Path(__file__).parents[1]
NETNS = Path("/var/run/netns")
TUN = Path("/dev/net/tun")
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x4000_0000, 0x4004_54CA, 0x1, 0x1000
PACKET, MTU, QUEUE = 1 << 16, 9000, 1000
WAYS = ("tensor", "pipeline")
TESTS = ("reply_s", "replies_s", "prompt_s")
QUESTION, TOKENS, BATCH, PROMPT, CHUNK = "What is a lantern?", 24, 4, 1024, 512
JOIN_S = 300
PORT = 29_555  # of the first host: in a namespace of its own every port is free


def can_link() -> bool:
    """Return whether this process may make namespaces and links."""
    if sys.platform != "linux" or os.geteuid() != 0 or not TUN.exists():
        return False
    probe = f"gemcutter-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return made.returncode == 0


class Link:
    """Two namespaces, at 10.77.0.1 and 10.77.0.2, and what carries packets between them until the link is closed.

    `delay_s` is that of one direction, `loss` the chance of each packet to get lost.
    """

    def __init__(self, delay_s: float = 0.0, loss: float = 0.0, seed: int = 1) -> None:
        self.delay_s, self.loss, self.carried, self.lost = delay_s, loss, 0, 0
        self.names = tuple(f"gemcutter-{os.getpid()}-{side}" for side in "ab")
        self.hosts, self._draw = ("10.77.0.1", "10.77.0.2"), random.Random(seed)
        self._is_closing = threading.Event()
        self._devices = [self._make(name, host) for name, host in zip(self.names, self.hosts, strict=True)]
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def __enter__(self) -> Link:
        """Use the link for some time."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take namespaces and devices away."""
        self._is_closing.set()
        self._thread.join()
        for device, name in zip(self._devices, self.names, strict=True):
            os.close(device)
            subprocess.run(["ip", "netns", "delete", name], check=True)

    def start(self, side: int, *command: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a program of this Python on one of the two hosts."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[side], sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _make(self, name: str, host: str) -> int:
        """Make a namespace with an address; return what carries the packets of its device."""
        subprocess.run(["ip", "netns", "add", name], check=True)
        with _inside(name):
            device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"wire", IFF_TUN | IFF_NO_PI))
        for words in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{host}/24", "dev", "wire"],
            ["link", "set", "dev", "wire", "mtu", str(MTU), "txqueuelen", str(QUEUE), "up"],
        ):
            subprocess.run(["ip", "-n", name, *words], check=True)
        return device

    def _carry(self) -> None:
        """Carry packets from each device to the other, late, and lose some."""
        others = dict(zip(self._devices, reversed(self._devices), strict=True))
        waiting = list[tuple[float, int, int, bytes]]()
        while not self._is_closing.is_set():
            patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.05
            for device in select.select(self._devices, [], [], min(patience, 0.05))[0]:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        packet = os.read(device, PACKET)
                        self.carried += 1
                        if self._draw.random() < self.loss:
                            self.lost += 1
                            continue
                        heapq.heappush(waiting, (time.monotonic() + self.delay_s, self.carried, others[device], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                with contextlib.suppress(BlockingIOError):  # a full queue loses packets, as on any link
                    os.write(waiting[0][2], waiting[0][3])
                heapq.heappop(waiting)


@contextlib.contextmanager
def _inside(name: str) -> Iterator[None]:
    """Let this thread be in a namespace."""
    library = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net", "rb") as before, open(NETNS / name, "rb") as there:
        if library.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter the namespace {name}")
        try:
            yield
        finally:
            library.setns(before.fileno(), CLONE_NEWNET)


def rank_environment(rank: int, host: str, port: int = PORT, world: int = 2) -> dict[str, str]:
    """Return what torchrun would tell a rank."""
    given = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    return given | {"TORCHELASTIC_RUN_ID": "links"}


def run_on(link: Link, leader: Sequence[str]) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Start a program as the first rank on one host, and on the other the rank that follows."""
    first = link.start(0, *leader, environment=rank_environment(0, link.hosts[0]))
    other = link.start(1, "-m", "gemcutter", "run", "any", environment=rank_environment(1, link.hosts[0]))
    return first, other


# ---- what is measured ----


def lead(model: str, way: str, rounds: int) -> dict[str, Any]:
    """Time a model as the first of two ranks, or alone where `way` is "alone"."""
    import gemcutter

    stages = 2 if way == "pipeline" else 1
    with gemcutter.load(model, dtype="float32", pipeline_parallel=stages, prefix_cache_bytes=0, max_num_seqs=BATCH) as loaded:
        prompt = loaded.tokenizer.encode(QUESTION)
        text = loaded.generate(QUESTION, max_tokens=TOKENS, temperature=0.0, ignore_eos=True).text
        long = [5 + index % 900 for index in range(PROMPT)]
        times = {
            "reply_s": _times(loaded, [prompt], TOKENS, rounds),
            "replies_s": _times(loaded, [prompt] * BATCH, TOKENS, rounds),
        }
        times["prompt_s"] = _times(loaded, [long], 1, rounds)
        return {name: statistics.median(each) for name, each in times.items()} | {
            "text": text,
            "layers": len(loaded.plan.layers),
            "whole_layers": loaded.plan.num_full_layers,
        }


def _times(loaded: Any, prompts: list[list[int]], tokens: int, rounds: int) -> list[float]:
    """Return how long prompts and their replies take together, in each of some rounds."""
    from gemcutter.engine.request import Request

    found = list[float]()
    for _ in range(rounds):
        started = time.perf_counter()
        loaded.loop.complete([Request(tuple(prompt), max_tokens=tokens) for prompt in prompts])
        found.append(time.perf_counter() - started)
    return found


def predicted(alone: dict[str, Any], way: str, delay_s: float, test: str) -> float:
    """Return how much longer a test takes than without a delay, by the number of packets that it waits for, one after the other.

    Rows of a pipeline go to the other host and come back, for each token, or once for the chunks of a prompt, which follow each
    other. Ranks wait for each other at two sums a layer, the embedding and the head: for two packets a sum of few numbers, which
    are gathered, and for four a sum of many, which gloo scatters and gathers. The rows of a prompt but its last one end where the
    last keys and values are written.
    """
    if way == "pipeline":
        return delay_s * 2 * (1 if test == "prompt_s" else TOKENS)
    layers, whole = alone["layers"], alone["whole_layers"]
    if test != "prompt_s":
        return delay_s * TOKENS * 2 * (2 * layers + 2)
    return delay_s * (-(-PROMPT // CHUNK) * 4 * (2 * whole + 1) + 2 * (2 * (layers - whole) + 1))


def measure(model: str, way: str, delay_s: float, loss: float, rounds: int) -> dict[str, Any]:
    """Measure one way over one link."""
    with Link(delay_s, loss) as link:
        program = [__file__, "--lead", way, "--model", model, "--rounds", str(rounds)]
        first, other = run_on(link, program)
        try:
            said, problem = first.communicate(timeout=JOIN_S)
            other.communicate(timeout=30)
        finally:
            for each in (first, other):
                each.kill()
        if first.returncode:
            raise SystemExit(f"{way}, {delay_s * 1e3:g} ms: {problem}")
        return json.loads(said.splitlines()[-1]) | {"packets": link.carried, "lost": link.lost}


def main() -> int:
    """Measure everything, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 1.0, 10.0], metavar="MS", help="of one direction")
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 1.0], metavar="PERCENT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lead", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.lead:
        print(json.dumps(lead(given.model, given.lead, given.rounds)))
        return 0
    if not can_link():
        parser.error("needs Linux, root, `ip` and /dev/net/tun")
    program = [sys.executable, __file__, "--lead", "alone", "--model", given.model, "--rounds", str(given.rounds)]
    plain = subprocess.run(program, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    alone, rows = json.loads(plain.stdout.splitlines()[-1]), list[dict[str, Any]]()
    base: dict[str, dict[str, Any]] = {}
    print("| way | delay | loss | reply | as predicted | 4 replies | as predicted | prompt | as predicted | same text |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    plain_cells = " | | ".join(f"{alone[name] * 1e3:.0f} ms" for name in TESTS)
    print(f"| one process | | | {plain_cells} | | |")
    for way in WAYS:
        for loss in given.loss:
            for delay in given.delays:
                found = measure(given.model, way, delay / 1e3, loss / 100, given.rounds)
                base.setdefault(way, found)
                row = {
                    "way": way,
                    "delay_ms": delay,
                    "loss_percent": loss,
                    "is_same_text": found["text"] == alone["text"],
                    **found,
                }
                row["predicted"] = {name: base[way][name] + predicted(alone, way, delay / 1e3, name) for name in TESTS}
                rows.append(row)
                cells = [f"{row[name] * 1e3:.0f} ms | {row['predicted'][name] * 1e3:.0f} ms" for name in row["predicted"]]
                same = "yes" if row["is_same_text"] else "NO"
                print(f"| {way} | {delay:g} ms | {loss:g} % | {' | '.join(cells)} | {same} |", flush=True)
    if given.json:
        found = {"date": str(date.today()), "machine": describe(), "alone": alone, "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row["is_same_text"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
