"""What a server gives to 1, 8 and 32 streams at once: gemcutter's, and llama.cpp's beside it on the same file.

Owns the two servers' command lines, the clients (one thread a stream, plain HTTP, events read as they come) and the table.
Servers run one after the other, so that each has the machine to itself, and go round again for every repeat. Refuses to know
text: prompts are ids, replies have a fixed length. Read `gemcutter/benchmark/report.py` for the ceiling.

    python bench/streams.py --preset E2B --quant q4_0 -t 2 --streams 1 8 32 --llama-server PATH

The ceiling of N streams is the lower one of two: the bytes that a step must read, shared by N tokens, over the read bandwidth;
and the best rate of products over a token's operations.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.streams` has it

from bench.ratios import spell_machine
from bench.synthetic import FILE_TYPES, write_model
from gemcutter.benchmark import hardware, roofline
from gemcutter.benchmark.harness import BenchCase
from gemcutter.benchmark.report import best_products, ceiling
from gemcutter.benchmark.target import BenchTarget, from_file
from gemcutter.cache.kv_cache import scale_bytes
from gemcutter.checkpoint.write.synth import SIZES
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions

RESULTS = Path(__file__).parent / "results"
LOAD_S, REPLY_S = 600.0, 3600.0
WARM_UP = 8  # tokens of a reply before anything is timed
REST_S = 0.5  # before a turn


@dataclass(frozen=True, slots=True)
class Server:
    """A server's name, its command line, without the port, and the path that answers 200 once it is loaded."""

    name: str
    command: tuple[str, ...]
    ready: str

    @contextmanager
    def running(self) -> Iterator[int]:
        """Run the server; give its port. Raises RuntimeError where it does not come up."""
        port = free_port()
        with tempfile.TemporaryFile("w+") as noise:
            process = subprocess.Popen([*self.command, "--port", str(port)], stdout=noise, stderr=subprocess.STDOUT)
            try:
                self._wait(process, port, noise)
                yield port
            finally:
                process.terminate()
                process.wait(60)

    def _wait(self, process: subprocess.Popen[bytes], port: int, noise: Any) -> None:
        until = time.monotonic() + LOAD_S
        while time.monotonic() < until and process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", self.ready)
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        noise.seek(0)
        raise RuntimeError(f"{self.name} does not serve: {noise.read()[-2000:]}")


@dataclass(frozen=True, slots=True)
class Reply:
    """When one stream began, when its events came, and the tokens that it counted in the end."""

    started_s: float
    came_s: tuple[float, ...]
    tokens: int


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def ask(port: int, prompt: Sequence[int], tokens: int, start: Barrier) -> Reply:
    """Stream one reply."""
    body = {"model": "bench", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REPLY_S)
    connection.connect()
    start.wait()
    started_s, came_s, counted = time.perf_counter(), list[float](), 0
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.read(2000)!r}")
    for line in answer:
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[5:])
        if "error" in event:
            raise RuntimeError(f"a stream failed: {event['error']}")
        came_s.append(time.perf_counter())
        counted = (event.get("usage") or {}).get("completion_tokens", counted)
    connection.close()
    return Reply(started_s, tuple(came_s), counted)


def play(port: int, streams: int, prompt: int, tokens: int) -> dict[str, float]:
    """Run so many streams at once. `tok_s` counts all tokens from the first request to the last event, prompts included."""
    start = Barrier(streams)
    prompts = [[5 + (7 * place + 131 * stream) % 1000 for place in range(prompt)] for stream in range(streams)]
    with ThreadPoolExecutor(streams) as pool:
        replies = list(pool.map(lambda ids: ask(port, ids, tokens, start), prompts))
    short = [reply.tokens for reply in replies if reply.tokens != tokens]
    if short:
        raise RuntimeError(f"a reply has {short[0]} tokens, {tokens} were asked for")
    began, ended = min(reply.started_s for reply in replies), max(reply.came_s[-1] for reply in replies)
    firsts = [reply.came_s[0] - reply.started_s for reply in replies]
    steady = max(reply.came_s[0] for reply in replies)  # from here on all streams decode
    decoded = sum(1 for reply in replies for came in reply.came_s if came > steady)
    return {
        "tok_s": streams * tokens / (ended - began),
        "decode_tok_s": decoded / (ended - steady),
        "ttft_s": statistics.median(firsts),
    }


def ceiling_of(target: BenchTarget, streams: int, prompt: int, tokens: int, rates: dict[str, float]) -> dict[str, Any]:
    """Return the most tokens per second that memory and products allow to so many streams."""
    case = BenchCase("tg", tokens, prompt, streams)
    reads = roofline.token_bytes(target.plan, target.decoder.params, streams)
    memory = ceiling(target.plan, reads, target.kv_dtype.itemsize, case, rates, scale_bytes(target.kv_dtype))["ceiling_tok_s"]
    seen = prompt + tokens // 2
    products = rates[best_products(rates)] / (target.plan.flops(seen + 1) - target.plan.flops(seen, wanted=0))
    return {"ceiling_tok_s": min(memory, products), "bound_by": "memory" if memory < products else "products"}


def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Run every server with every number of streams, in turn; return what was found."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for server in servers(options, model):
        found[server.name] = {streams: [] for streams in options.streams}
    for _ in range(options.rounds):
        for server in servers(options, model):
            with server.running() as port:
                play(port, 1, options.prompt, WARM_UP)
                for streams in options.streams:
                    time.sleep(REST_S)
                    found[server.name][streams].append(play(port, streams, options.prompt, options.tokens))
    torch.set_num_threads(options.threads)
    target = from_file(LoadOptions(model=str(model), dtype="bfloat16"))
    rates = hardware.measure_rates()
    if native := hardware.native_rate(target.decoder):
        rates["native_flops_per_s"] = native
    limits = {count: ceiling_of(target, count, options.prompt, options.tokens, rates) for count in options.streams}
    rows = [
        {"server": name, "streams": count, **limits[count], **_medians(runs)}
        for name, by_count in found.items()
        for count, runs in by_count.items()
    ]
    about = {"model": model.stem, "prompt": options.prompt, "tokens": options.tokens, "threads": options.threads}
    return about | {"rounds": options.rounds, "rates": rates, "machine": hardware.describe(), "rows": rows}


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    speeds = [run["decode_tok_s"] for run in runs]
    return found | {"decode_tok_s_min": min(speeds), "decode_tok_s_max": max(speeds)}


def servers(options: argparse.Namespace, model: Path) -> list[Server]:
    """List the servers to compare; llama.cpp's only where its program is named."""
    most, threads = max(options.streams), str(options.threads)
    room = options.prompt + options.tokens + 64
    own = (sys.executable, "-m", "gemcutter", "serve", str(model), "--threads", threads, "--dtype", "bfloat16")
    own += ("--max-num-seqs", str(most), "--max-model-len", str(room), "--served-model-name", "bench")
    found = [Server("gemcutter", own, "/ready")]
    if options.llama_server:
        other = (options.llama_server, "-m", str(model), "-t", threads, "-tb", threads, "-np", str(most), "-c", str(room * most))
        other += ("--no-webui", "--flash-attn", "on", "--no-jinja", "--alias", "bench", "--cache-ram", "0")
        found.append(Server("llama.cpp", other, "/health"))
    return found


def table(run: dict[str, Any]) -> str:
    """Return the rows as a table: ratios to one stream, and shares of the ceiling."""
    head = ["server", "streams", "all tokens/s", "decoding", "to one stream", "ceiling", "share", "first token"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    one = {row["server"]: row["decode_tok_s"] for row in run["rows"] if row["streams"] == 1}
    for row in run["rows"]:
        ratio = f"{row['decode_tok_s'] / one[row['server']]:.2f}" if row["server"] in one else ""
        share = f"{row['decode_tok_s'] / row['ceiling_tok_s']:.0%}"
        limit = f"{row['ceiling_tok_s']:.0f} ({row['bound_by']})"
        cells = [row["server"], str(row["streams"]), f"{row['tok_s']:.1f}", f"{row['decode_tok_s']:.1f}"]
        cells += [ratio, limit, share, f"{row['ttft_s']:.2f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(SIZES), default="E2B", help="geometry of a synthetic model")
    parser.add_argument("--quant", choices=tuple(FILE_TYPES), default="q4_0")
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("-p", "--prompt", type=int, default=32)
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--llama-server", metavar="PROGRAM", help="llama.cpp's server (default: not compared)")
    parser.add_argument("--workdir", type=Path, help="keep the written file there (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemcutter-streams-")))
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / (f"{options.preset}-{options.quant}" + (f"-{options.layers}" if options.layers else "") + ".gguf")
        try:
            if not model.exists():
                write_model(model, options.preset, options.quant, options.layers)
            run = measure(options, model)
        except (GemcutterError, RuntimeError) as error:
            sys.exit(f"error: {error}")
    path = options.results / f"streams-{date.today().isoformat()}-{spell_machine(run['machine'])}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(table(run))
    print(path)


if __name__ == "__main__":
    main()
