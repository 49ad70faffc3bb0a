"""The same load on our server by `gemcutter bench-serve` and by guidellm, in turns, and the medians of both beside each other.

Owns the two command lines and the names of one measure in two tools; guidellm runs in an environment of its own. What a client
measures must not depend on the client: medians should differ by no more than rounds of one client do among themselves.

    python bench/guidellm_agreement.py --model FILE.gguf --tokenizer demo --guidellm PATH/bin/guidellm
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.guidellm_agreement` has it

from bench.streams import Server
from gemcutter.checkpoint.remote.hub import locate

OURS, THEIRS = "bench-serve", "guidellm"
# Names of one measure, in milliseconds but for the last: ours (sglang's) and guidellm's.
MEASURES = {
    "TTFT (ms)": ("median_ttft_ms", "time_to_first_token_ms"),
    "TPOT (ms)": ("median_tpot_ms", "inter_token_latency_ms"),  # theirs leaves the first token out of it, as ours does
    "E2E (ms)": ("median_e2e_latency_ms", "request_latency"),
    "output tokens/s": ("output_throughput", "output_tokens_per_second"),
}


def ask_ours(options: argparse.Namespace, port: int, seed: int, folder: Path) -> dict[str, float]:
    """Run `gemcutter bench-serve`; give its measures."""
    path = folder / f"ours-{seed}.json"
    words = ["--tokenizer", options.tokenizer, "--api", "completions", "--dataset-name", "random", "--seed", str(seed)]
    words += ["--random-input-len", str(options.input), "--random-output-len", str(options.output)]
    words += ["--num-prompts", str(options.requests), "--max-concurrency", str(options.streams), "--output-file", str(path)]
    _run([sys.executable, "-m", "gemcutter", "bench-serve", f"http://127.0.0.1:{port}", *words])
    found = json.loads(path.read_text().splitlines()[-1])["sglang"]
    return {name: float(found[ours]) for name, (ours, _) in MEASURES.items()}


def ask_theirs(options: argparse.Namespace, port: int, seed: int, folder: Path) -> dict[str, float]:
    """Run guidellm; give its measures."""
    path = folder / f"theirs-{seed}.json"
    tokenizer = str(locate(options.tokenizer))
    backend = f"kind=openai_http,target=http://127.0.0.1:{port},model={tokenizer},request_format=/v1/completions"
    words = ["--backend", backend, "--profile", f"kind=concurrent,streams={options.streams}"]
    words += ["--constraint", f"kind=max_requests,count={options.requests}", "--seed", f"kind=static,value={seed}"]
    words += ["--data", f"kind=synthetic_text,prompt_tokens={options.input},output_tokens={options.output}"]
    words += ["--output", f"kind=json,path={path}", "--disable-console"]
    _run([options.guidellm, "run", *words])
    metrics: dict[str, Any] = json.loads(path.read_text())["benchmarks"][0]["metrics"]
    found = {name: float(metrics[theirs]["successful"]["median"]) for name, (_, theirs) in MEASURES.items()}
    found["E2E (ms)"] *= 1e3  # theirs is in seconds
    found["output tokens/s"] = float(metrics["output_tokens_per_second"]["successful"]["mean"])
    return found


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{(done.stderr or done.stdout)[-3000:]}")


def table(rounds: dict[str, list[dict[str, float]]]) -> str:
    """Lay the medians of all rounds out, with the least and the largest beside them."""
    lines = [f"| | {OURS} | {THEIRS} | ratio |", "|---|---|---|---|"]
    for name in MEASURES:
        cells, medians = list[str](), list[float]()
        for found in (rounds[OURS], rounds[THEIRS]):
            values = sorted(each[name] for each in found)
            medians.append(statistics.median(values))
            cells.append(f"{medians[-1]:.1f} ({values[0]:.1f} to {values[-1]:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} | {medians[0] / medians[1]:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Compare what bench-serve and guidellm measure of our server.")
    parser.add_argument("--model", required=True, help="what is served")
    parser.add_argument("--tokenizer", default="demo", help="its tokenizer (default: %(default)s)")
    parser.add_argument("--guidellm", default="guidellm", help="the command of guidellm 0.8 (default: %(default)s)")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output", type=int, default=24, help="tokens of a reply (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=8, help="of a round (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=1, help="requests at a time (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="of the server; leave cores to the clients (default: 1)")
    parser.add_argument("-r", "--rounds", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    name = str(locate(options.tokenizer))  # which guidellm loads a tokenizer by
    command = (sys.executable, "-m", "gemcutter", "serve", options.model, "--served-model-name", name)
    command += ("--threads", str(options.threads))
    rounds: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    with tempfile.TemporaryDirectory() as scratch, Server(OURS, command, "/ready").running() as port:
        for seed in range(1, options.rounds + 1):
            rounds[OURS].append(ask_ours(options, port, seed, Path(scratch)))
            rounds[THEIRS].append(ask_theirs(options, port, seed, Path(scratch)))
    print(table(rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
