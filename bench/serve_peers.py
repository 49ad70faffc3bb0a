"""One load on several servers, one after the other: gemcutter's, llama.cpp's, and any whose address is given.

Owns the load (prompts in groups that share their beginning, as `gemcutter bench-serve` makes them), the rounds and the README's
table. Every round goes over all servers with the same prompts, in turned order, so that a noisy minute hits all alike; ratios are
medians of the rounds' own. Refuses to know how requests are sent and measured: that is `gemcutter/bench_serve/`, the same client
for all. Read `streams.py` for the servers' processes.

    python bench/serve_peers.py --preset E2B --quant q4_0 -t 2 --llama-server PATH

Prompts are token ids. The weights of a preset are synthetic and most ids of its vocabulary have no text, so a bias makes every
token of a reply the same word, on all servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.serve_peers` has it

from bench.ratios import RESULTS, put_between, spell_machine, wrapped
from bench.streams import REST_S, Server
from bench.synthetic import FILE_TYPES, write_model
from gemcutter.bench_serve.client import Target, normal_url
from gemcutter.bench_serve.generated import SharedPrefixes, TextSource, shared_prefixes
from gemcutter.bench_serve.report import Settings, load_fields, sglang_fields
from gemcutter.bench_serve.session import Plan, bench, choose_model, problems_of
from gemcutter.benchmark import hardware
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.remote.hub import locate
from gemcutter.checkpoint.write.synth import SIZES
from gemcutter.errors import GemcutterError
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text_assets import read_tokenizer

BEGIN, END = "<!-- serve-peers:begin -->", "<!-- serve-peers:end -->"
OURS = "gemcutter"
BIAS = 100.0  # beyond any logit of a preset, whose head is capped at 30
FIGURES = ("output_throughput", "total_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "median_e2e_latency_ms")


@dataclass(frozen=True, slots=True)
class Peer:
    """A server by name: one to start, or the address of one that runs."""

    name: str
    server: Server | None = None
    url: str = ""

    @contextmanager
    def address(self) -> Iterator[str]:
        """Give the server's address while it runs. Raises RuntimeError where it does not come up."""
        if self.server is None:
            yield self.url
        else:
            with self.server.running() as port:
                yield f"http://127.0.0.1:{port}"


def list_peers(options: argparse.Namespace, model: Path) -> list[Peer]:
    """List the servers: ours, llama.cpp's where its program is named, and those whose addresses are given."""
    threads, most = str(options.threads), options.concurrency
    room = options.system + options.question + options.output + 64
    found = list[Peer]()
    if not options.only_urls:
        own = (sys.executable, "-m", "gemcutter", "serve", str(model), "--threads", threads, "--dtype", "bfloat16")
        own += ("--max-num-seqs", str(most), "--max-model-len", str(room), "--served-model-name", "bench")
        found.append(Peer(OURS, Server(OURS, own, "/ready")))
    if options.llama_server:
        other = (options.llama_server, "-m", str(model), "-t", threads, "-tb", threads, "-np", str(most), "-c", str(room * most))
        other += ("--no-webui", "--flash-attn", "on", "--no-jinja", "--alias", "bench")
        other += ("--swa-full",)  # without it, shared beginnings are computed anew in models with sliding windows
        found.append(Peer("llama.cpp", Server("llama.cpp", other, "/health")))
    return found + [Peer(name, url=normal_url(url)) for name, _, url in (each.partition("=") for each in options.url)]


def measure(options: argparse.Namespace, peers: Sequence[Peer], tokenizer: Tokenizer, bias: int | None) -> list[dict[str, Any]]:
    """Run all rounds; return a row for each server and number of groups, with the figures of every round."""
    rows = {
        (peer.name, groups): {"server": peer.name, "groups": groups, "rounds": list[dict[str, Any]]()}
        for groups in options.groups
        for peer in peers
    }
    for number in range(options.rounds):
        turn = number % len(peers)
        for peer in (*peers[turn:], *peers[:turn]):
            with peer.address() as url:
                for groups in options.groups:
                    time.sleep(REST_S)
                    found = run_once(options, url, groups, number, tokenizer, bias)
                    rows[peer.name, groups]["rounds"].append(found)
                    print(
                        f"round {number + 1}, {groups} groups, {peer.name}: {found['total_throughput']:.1f} tokens/s",
                        file=sys.stderr,
                    )
    return [row | medians(row["rounds"]) for row in rows.values()]


def run_once(
    options: argparse.Namespace, url: str, groups: int, number: int, tokenizer: Tokenizer, bias: int | None
) -> dict[str, Any]:
    """Put one load on a server; return sglang's figures and the tokens that it had cached. Raises RuntimeError for failures."""
    source = TextSource(tokenizer, 1000 * number + groups, as_ids=True)
    per_group = max(options.requests // groups, 2)
    workload = shared_prefixes(source, SharedPrefixes(groups, per_group, options.system, options.question, options.output))
    body = {} if bias is None else {"logit_bias": {str(bias): BIAS}, "watchdog": False}
    rate = options.rate
    how = Settings(
        "bench", "completions", "generated-shared-prefix", len(workload.requests), rate, max_concurrency=options.concurrency
    )

    async def play() -> dict[str, Any]:
        target = await choose_model(Target(url, "", "completions", body=body))
        outcome = await bench(target, workload, Plan(how, seed=number))
        if problems := list(problems_of(outcome)):
            raise RuntimeError("; ".join(problems))
        told = load_fields(outcome)
        if told["other_length_than_asked"]:
            raise RuntimeError(f"{told['other_length_than_asked']} replies are not {options.output} tokens long")
        figures = {name: value for name, value in sglang_fields(outcome).items() if name in FIGURES or name == "duration"}
        return figures | {"requests": len(workload.requests), "cached_tokens": told["cached_tokens"]}

    return asyncio.run(play())


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the medians of the figures over rounds."""
    return {name: statistics.median(each[name] for each in rounds) for name in FIGURES}


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> float:
    """Return how many times theirs ours is: the median of the rounds' own ratios."""
    pairs = zip(ours["rounds"], theirs["rounds"], strict=True)
    return statistics.median(one[name] / other[name] for one, other in pairs)


def table(run: Mapping[str, Any]) -> str:
    """Lay one run out: a row a server and number of groups; behind a peer's throughput how many times as fast ours is."""
    head = ["groups", "server", "output tokens/s", "all tokens/s", "TTFT median", "p99", "TPOT median", "cached prompt tokens"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    ours = {row["groups"]: row for row in run["rows"] if row["server"] == OURS}
    for row in run["rows"]:
        own = ours.get(row["groups"])
        throughputs = []
        for name in ("output_throughput", "total_throughput"):
            behind = f" ({ratio(own, row, name):.2g}x)" if own is not None and own is not row else ""
            throughputs.append(f"{row[name]:.1f}{behind}")
        cached = [each["cached_tokens"] for each in row["rounds"]]
        told = "-" if None in cached else f"{statistics.median(cached):,.0f}"
        cells = [str(row["groups"]), row["server"], *throughputs]
        cells += [f"{row['median_ttft_ms'] / 1000:.2f} s", f"{row['p99_ttft_ms'] / 1000:.2f} s"]
        cells += [f"{row['median_tpot_ms']:.0f} ms", told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def block(run: Mapping[str, Any]) -> str:
    """Lay a run out for the README."""
    here, load = run["machine"], run["load"]
    features = f" ({', '.join(here['features'])})" if here["features"] else ""
    requests = ", ".join(f"{each['rounds'][0]['requests']} in {each['groups']}" for each in first_rows(run))
    when = "all at once" if load["rate"] == "inf" else f"{load['rate']:g} a second"
    heading = (
        f"Measured on {run['date']} by `bench/serve_peers.py` on {here['cpu']}, {here['cores']} cores{features}: {run['model']}, "
        f"{run['threads']} threads, the same file and the same client for all servers, one after the other, medians of "
        f"{run['rounds']} rounds. Prompts are {load['system']} tokens that a group shares and {load['question']} of their own, "
        f"replies {load['output']} tokens; requests ({requests} groups) come {when}, {load['concurrency']} are served at a time. "
        "Behind a peer's throughput stands how many times as fast gemcutter is."
    )
    return wrapped(f"{heading}\n\n{table(run)}")


def first_rows(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of the first server, one for each number of groups."""
    return [row for row in run["rows"] if row["server"] == run["rows"][0]["server"]]


def newest(folder: Path = RESULTS) -> dict[str, Any] | None:
    """Read the file of the latest day; None if there is none."""
    paths = sorted(folder.glob("serve-*.json"))
    return json.loads(paths[-1].read_text()) if paths else None


def keep(options: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write a run into its file."""
    machine, day = hardware.describe(), date.today().isoformat()
    load = {key: getattr(options, key) for key in ("system", "question", "output", "concurrency")}
    found = {
        "date": day,
        "machine": machine,
        "model": name,
        "threads": options.threads,
        "rounds": options.rounds,
        "load": load | {"rate": "inf" if math.isinf(options.rate) else options.rate},
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path: Path = options.results / f"serve-{day}-{spell_machine(machine)}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(SIZES), default="E2B", help="geometry of a synthetic model")
    parser.add_argument("--quant", choices=tuple(FILE_TYPES), default="q4_0")
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("--model", help="a model that all servers load, in place of a synthetic one")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=16, help="of a load, at least two a group (default: %(default)s)")
    parser.add_argument("--system", type=int, default=500, help="tokens that a group shares (default: %(default)s)")
    parser.add_argument("--question", type=int, default=500, help="tokens of a prompt's own (default: %(default)s)")
    parser.add_argument("--output", type=int, default=80, help="tokens of a reply (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=math.inf, help="requests a second (default: all at once)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--llama-server", metavar="PROGRAM", help="llama.cpp's server (default: not compared)")
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="a server that runs, such as vLLM's; repeatable"
    )
    parser.add_argument("--only-urls", action="store_true", help="start no server")
    parser.add_argument("--workdir", type=Path, help="keep the written file there (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    parser.add_argument(
        "--write", action="store_true", help="put the table of the newest result into the README, and measure nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure as the command line says."""
    options = parse(arguments)
    if options.write:
        found = newest()
        if found is None:
            print("there is no result yet; run bench/serve_peers.py without --write", file=sys.stderr)
            return 1
        put_between(BEGIN, block(found), END)
        return 0
    with ExitStack() as stack:
        folder = options.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemcutter-serve-")))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            name, model, is_synthetic = model_of(options, folder)
            tokenizer = read_tokenizer(Source.open(model))
            bias = tokenizer.encode_plain(" the")[0] if is_synthetic else None
            rows = measure(options, list_peers(options, model), tokenizer, bias)
        except (GemcutterError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    path = keep(options, name, rows)
    print(table(json.loads(path.read_text())))
    print(path)
    return 0


def model_of(options: argparse.Namespace, folder: Path) -> tuple[str, Path, bool]:
    """Return the model's name and path, and whether its weights are synthetic, written unless they are there already."""
    if options.model:
        return Path(options.model).name, locate(options.model), False
    cut = f", the first {options.layers} layers" if options.layers else ""
    path = folder / (f"{options.preset}-{options.quant}" + (f"-{options.layers}" if options.layers else "") + ".gguf")
    if not path.exists():
        write_model(path, options.preset, options.quant, options.layers)
    return f"{options.preset}{cut}, {options.quant}", path, True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
