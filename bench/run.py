"""Measures one model on this machine: load time, memory, prefill and decode speed, each beside its physical limit.

Owns the measuring; the limits are the plan's counts (bytes held, bytes read, operations) over what this machine is measured to do
with the same number of threads. Drives the engine directly, so no tokenizer and no command line is in the numbers.
Run `python bench/run.py demo`, or `python bench/run.py --help`; `bench/README.md` says what each number means.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gemcutter
from gemcutter.api import DTYPES
from gemcutter.checkpoint.hub import locate
from gemcutter.checkpoint.load import load_params
from gemcutter.checkpoint.match import open_checkpoint
from gemcutter.checkpoint.synth import SIZES, write_checkpoint
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.errors import GemcutterError
from gemcutter.model.text import Decoder
from gemcutter.ops import WORDS
from gemcutter.ops.bind import CHOICES, explain
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight

TINY = "tiny:"
STREAM_BYTES = 512 << 20  # of the buffer that is summed: larger than any cache
MATMUL_SIZE = 2048
TRIES = 5  # of a machine measurement, the best of which counts
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of this process as the kernel counts them: `anon` is its own, `file` is mapped and can be read again."""

    anon: int
    file: int
    peak: int  # of both together, since `forget_peak`

    @classmethod
    def now(cls) -> Memory | None:
        """Read /proc; None on systems without it."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        found = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
        return cls(found["RssAnon"], found["RssFile"], found["VmHWM"])


def forget_peak() -> None:
    """Let the peak begin anew, so that the imports' own does not count; where that can't be done it stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of one request: until its first token, and for the others."""

    first_s: float
    decode_s: float


@contextmanager
def folder_of(model: str) -> Iterator[Path]:
    """Give the path of a model; `tiny:E2B` is written for the occasion and removed afterwards."""
    if not model.startswith(TINY):
        yield locate(model)
        return
    with tempfile.TemporaryDirectory(prefix="gemcutter-bench-") as folder:
        write_checkpoint(model.removeprefix(TINY), Path(folder))
        yield Path(folder)


def run_once(engine: Engine, prompt: tuple[int, ...], tokens: int) -> Run:
    """Prefill a prompt and decode `tokens` tokens greedily."""
    started = time.perf_counter()
    engine.submit(Request(prompt, max_tokens=tokens))
    first = 0.0
    while engine.has_work:
        if engine.step() and not first:
            first = time.perf_counter()
    return Run(first - started, time.perf_counter() - first)


def best_seconds(work: Callable[[], object]) -> float:
    """Give the shortest of a few times that `work` takes."""
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def read_bandwidth() -> float:
    """Measure the bytes per second that a sum over a large buffer reads."""
    buffer = torch.ones(STREAM_BYTES // 4)
    return STREAM_BYTES / best_seconds(buffer.sum)


def matmul_rate() -> float:
    """Measure the float32 operations per second of a large matrix product."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE).unbind()
    return 2 * MATMUL_SIZE**3 / best_seconds(lambda: a @ b)


def cpu_name() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Describe where the numbers come from."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemcutter": gemcutter.__version__,
    }


def resident_itemsize(decoder: Decoder) -> float:
    """Give the bytes of one weight as it is held: mapped as stored, or copied as computed."""
    weights = [param for param in decoder.params.values() if isinstance(param, Weight)]
    return sum(weight.nbytes for weight in weights) / sum(math.prod(part.shape) for weight in weights for part in weight.parts)


def limits(plan: ModelPlan, itemsize: float, kv_itemsize: int, prompt: int, tokens: int) -> dict[str, float]:
    """Give what no implementation can beat here: the bytes that must be held, and the speeds that the machine allows."""
    bandwidth, rate = read_bandwidth(), matmul_rate()
    read = plan.read_bytes(prompt + tokens // 2, itemsize, kv_itemsize)
    return {
        "bandwidth_bytes_per_s": bandwidth,
        "matmul_flops_per_s": rate,
        "weight_bytes": plan.weight_bytes(itemsize, rows_access=False),
        "kv_bytes": plan.kv_bytes(prompt + tokens, kv_itemsize),
        "read_bytes_per_token": read,
        "decode_tokens_per_s": bandwidth / read,
        "prefill_flops": plan.flops(prompt),
        "prefill_tokens_per_s": prompt * rate / plan.flops(prompt),
    }


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load a model and run it; give everything that was measured, sizes in bytes and times in seconds."""
    forget_peak()
    memory: dict[str, Memory | None] = {"start": Memory.now()}
    started = time.perf_counter()
    checkpoint = open_checkpoint(path)
    if checkpoint.plan.is_drafter:
        raise GemcutterError(f"{options.model} is an assistant, which can't run alone; measure its target instead")
    dtype_name = options.dtype or checkpoint.config.dtype
    if dtype_name not in DTYPES:
        raise GemcutterError(f"the checkpoint computes in {dtype_name}; pass --dtype float32 or bfloat16")
    plan, dtype = checkpoint.plan, DTYPES[dtype_name]
    decoder = Decoder(plan, load_params(checkpoint, dtype, torch.device("cpu")), dtype, "cpu", options.kernels)
    engine = Engine(decoder, context=options.prompt + options.tokens)
    load_s = time.perf_counter() - started
    memory["loaded"] = Memory.now()

    prompt = tuple(random.Random(0).choices(range(plan.vocab), k=options.prompt))
    runs = [run_once(engine, prompt, options.tokens) for _ in range(options.repeats + 1)]
    memory["done"] = Memory.now()
    cold, warm = runs[0], runs[1:]
    stored = next(param.stored for param in decoder.params.values() if isinstance(param, Weight))
    choices = explain(plan, "cpu", str(dtype)[6:], stored, options.kernels)
    return {
        "model": options.model,
        "params": plan.num_params(),
        "dtype": str(dtype)[6:],
        "stored": stored,
        "kernels": {choice.site.verb: choice.provider.name for choice in choices if choice.site.verb in WORDS},
        "prompt": options.prompt,
        "tokens": options.tokens,
        "repeats": options.repeats,
        "load_s": load_s,
        "cold_first_token_s": cold.first_s,
        "first_token_s": statistics.median(run.first_s for run in warm),
        "prefill_tokens_per_s": statistics.median(options.prompt / run.first_s for run in warm),
        "decode_tokens_per_s": statistics.median((options.tokens - 1) / run.decode_s for run in warm),
        "pool_bytes": engine.pool.nbytes,
        "memory": {name: asdict(found) if found else None for name, found in memory.items()},
        # Last, because the buffers of these measurements would count as the model's memory.
        "limits": limits(plan, resident_itemsize(decoder), dtype.itemsize, options.prompt, options.tokens),
        "machine": machine(),
    }


def table(found: dict[str, Any]) -> str:
    """Lay the numbers out, each beside its limit."""
    limit, memory = found["limits"], found["memory"]
    rows = [("", "measured", "limit", "share", "")]
    for name, why in (("prefill", "float32 products"), ("decode", "reading weights, keys and values")):
        speed, bound = found[f"{name}_tokens_per_s"], limit[f"{name}_tokens_per_s"]
        rows.append((f"{name}, tokens/s", f"{speed:.1f}", f"{bound:.1f}", f"{speed / bound:.0%}", why))
    rows.append(("first token, s", f"{found['first_token_s']:.3f}", "", "", f"cold: {found['cold_first_token_s']:.3f}"))
    rows.append(("load, s", f"{found['load_s']:.3f}", "", "", ""))
    if memory["done"]:
        grown = memory["done"]["peak"] - memory["start"]["anon"] - memory["start"]["file"]
        floor = limit["weight_bytes"] + limit["kv_bytes"]
        rows.append(
            ("memory, MiB", _mib(grown), _mib(floor), f"{grown / floor:.0%}", "peak above Python and torch; weights and cache")
        )
        for name, label in (("start", "Python and torch"), ("loaded", "after loading"), ("done", "after the runs")):
            at = memory[name]
            rows.append(
                (f"  {label}", _mib(at["anon"] + at["file"]), "", "", f"{_mib(at['anon'])} own, {_mib(at['file'])} mapped")
            )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:4], widths[1:], strict=True)), row[4]]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [*heading(found), "", *lines])


def heading(found: dict[str, Any]) -> list[str]:
    """Name the model, the machine and the machine's measured rates."""
    limit, here = found["limits"], found["machine"]
    kernels = ", ".join(f"{verb} {name}" for verb, name in found["kernels"].items())
    return [
        f"{found['model']}: {found['params'] / 1e9:.3f} B parameters, stored {found['stored']}, computed {found['dtype']}",
        f"kernels: {kernels}",
        f"prompt {found['prompt']}, {found['tokens']} new tokens, median of {found['repeats']}",
        f"{here['cpu']}, {here['cores']} cores, torch {here['torch']}, Python {here['python']}, gemcutter {here['gemcutter']}",
        f"torch threads: {here['threads']}; reads {limit['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"multiplies {limit['matmul_flops_per_s'] / 1e9:.1f} GFLOP/s in float32",
    ]


def _mib(count: float) -> str:
    return f"{count / MIB:,.1f}"


def at_least(low: int) -> Callable[[str], int]:
    """Make a reader of integers from `low` on."""

    def read(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"expected {low} or more, found {text}")
        return int(text)

    return read


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure one model on this machine, each number beside its physical limit.")
    parser.add_argument("model", help=f"a checkpoint, 'demo', or a small random one: {', '.join(TINY + like for like in SIZES)}")
    parser.add_argument("-p", "--prompt", type=at_least(1), default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("-n", "--tokens", type=at_least(2), default=64, help="new tokens (default: %(default)s)")
    parser.add_argument(
        "-r", "--repeats", type=at_least(1), default=3, help="measured runs, after a cold one (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: the checkpoint's)")
    parser.add_argument("--kernels", choices=CHOICES, default="auto", help="(default: %(default)s)")
    parser.add_argument("--threads", type=at_least(1), default=None, help="threads of torch (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="print the last line, the JSON object, only")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure and print."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with folder_of(options.model) as path:
            found = measure(path, options)
    except GemcutterError as error:
        print(error, file=sys.stderr)
        return 1
    if not options.json:
        print(table(found), end="\n\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
