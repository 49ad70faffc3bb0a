"""Runs gemcutter and the engines that are installed beside it on one geometry, in turns, and keeps what each of them reached.

Owns the order of turns (every test goes round all engines before it is repeated, so that a noisy minute hits all alike), the
budget of a turn, and the JSON in `bench/results/`. An engine that is not installed, or fails, is named there with the reason.
Refuses to know how an engine is called (`engines/run_*.py`, each in its own process) and how a table looks (`ratios.py`).

    python bench/peers.py --preset E2B --quant q4_0 -t 2 -p 512 2048 -n 64 --depth 0 16384

The interpreter of an engine is this one, or the one that PEER_LLAMA_CPP, PEER_TRANSFORMERS or PEER_MLX_LM names; PYTHONPATH and
LD_LIBRARY_PATH reach it as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from threading import Timer
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.peers` has it

from bench.ratios import RESULTS, keep, table
from bench.synthetic import FILE_TYPES, write_model
from gemcutter.benchmark import hardware
from gemcutter.benchmark.cold_start import first_token_s
from gemcutter.benchmark.harness import BenchCase, list_cases
from gemcutter.benchmark.report import ceiling
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.remote.hub import locate
from gemcutter.checkpoint.write.synth import SIZES, spell_config
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions
from gemcutter.plan import ModelPlan

HERE = Path(__file__).parent
NAMES = ("gemcutter", "llama.cpp", "transformers bfloat16", "transformers float32", "mlx-lm")
PROBE_TOKENS = {"pp": 64, "tg": 4}  # tell how long a turn will take
PATIENCE, LOAD_S = 4, 600.0  # how many budgets a turn may take, and the longest load
ENDED = ""  # among problems: that of the engine itself
REST_S = 0.5  # before a turn: threads of the one before have stopped spinning by then


@dataclass(slots=True)
class Engine:
    """One way to run the model: a script, its arguments, the variable that names its interpreter; and what it reached."""

    name: str
    script: str
    arguments: tuple[str, ...]
    variable: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # by test, as are the next two
    speeds: dict[str, list[float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    peak_bytes: int | None = None

    @contextmanager
    def started(self) -> Iterator[Process | None]:
        """Run the engine's process while this lasts; None if it can't be loaded."""
        interpreter = os.environ.get(self.variable) or sys.executable
        with Process([interpreter, str(HERE / "engines" / self.script), *self.arguments]).running() as process:
            said = process.answer(LOAD_S)
            if "about" in said:
                self.about = said["about"]
                yield process
            else:
                self.problems[ENDED] = said["error"]
                yield None

    def turn(self, process: Process, test: BenchCase, budget_s: float) -> None:
        """Run a test, with fewer tokens where all of them would take longer than `budget_s`, and note what it reached."""
        if test.name in self.problems or ENDED in self.problems:
            return
        if test.name not in self.tokens:
            probe = self._speed(process, test, min(test.tokens, PROBE_TOKENS[test.kind]), budget_s)
            if probe is None:
                return
            self.tokens[test.name] = min(test.tokens, max(PROBE_TOKENS[test.kind], int(probe * budget_s)))
        speed = self._speed(process, test, self.tokens[test.name], PATIENCE * budget_s)
        if speed is not None:
            self.speeds.setdefault(test.name, []).append(speed)

    def _speed(self, process: Process, test: BenchCase, tokens: int, limit_s: float) -> float | None:
        said = process.ask(limit_s, kind=test.kind, tokens=tokens, depth=test.depth)
        if "seconds" not in said:
            what = f"{test.name} with {tokens} tokens: {said['error']}"
            self.problems[ENDED if said["is_end"] else test.name] = what
            return None
        self.peak_bytes = said["peak_bytes"]
        speed: float = tokens / said["seconds"]
        return speed

    def as_object(self) -> dict[str, Any]:
        """Return everything that was found."""
        rows = [
            {
                "test": name,
                "tokens": self.tokens[name],
                "tok_s": statistics.median(speeds),
                "tok_s_min": min(speeds),
                "tok_s_max": max(speeds),
            }
            for name, speeds in self.speeds.items()
        ]
        return {"about": self.about, "peak_bytes": self.peak_bytes, "rows": rows, "problems": self.problems}


class Process:
    """A worker of `engines/turns.py`: questions and answers, one a line."""

    def __init__(self, command: Sequence[str]) -> None:
        self.noise = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise, text=True, bufsize=1
        )

    @contextmanager
    def running(self) -> Iterator[Process]:
        """End the process afterwards."""
        with self.noise, self.process:
            yield self
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def ask(self, limit_s: float, **question: Any) -> dict[str, Any]:
        """Let the threads of others fall asleep, ask, and give the answer."""
        time.sleep(REST_S)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            print(json.dumps(question), file=self.process.stdin)
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Read one answer; a process that gives none in time is ended, and what one that has ended said last is an error."""
        assert self.process.stdout is not None
        alarm = Timer(limit_s, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        is_late = not alarm.is_alive()
        alarm.cancel()
        if line:
            found: dict[str, Any] = json.loads(line)
            return {"is_end": False} | found
        self.noise.seek(0)
        said = self.noise.read().strip().splitlines()
        why = f"no answer within {limit_s:.0f} s" if is_late else said[-1] if said else f"exit code {self.process.wait()}"
        return {"error": why, "is_end": True}


def compare(engines: Sequence[Engine], tests: Sequence[BenchCase], rounds: int, budget_s: float, *, serial: bool) -> None:
    """Run every engine in its turns. With `serial` only one is loaded at a time, for models of which no two fit."""
    if serial:
        for _ in range(rounds):
            for engine in engines:
                with engine.started() as process:
                    for test in tests if process else ():
                        assert process is not None
                        engine.turn(process, test, budget_s)
        return
    with ExitStack() as stack:
        started = [(engine, stack.enter_context(engine.started())) for engine in engines]
        for _ in range(rounds):
            for test in tests:
                take_turns(started, test, budget_s)


def take_turns(started: Iterable[tuple[Engine, Process | None]], test: BenchCase, budget_s: float) -> None:
    """Run one test on every engine that has a process."""
    for engine, process in started:
        if process is not None:
            engine.turn(process, test, budget_s)


def list_engines(
    options: argparse.Namespace, model: Path, config: Path | None, plan: ModelPlan, tests: Sequence[BenchCase]
) -> list[Engine]:
    """List the ways to run a file that were asked for, and those to run a config where there is one."""
    threads, window = options.threads, max((layer.window or 0 for layer in plan.layers), default=0)
    context = max(test.context for test in tests) + 64
    found = [
        Engine("gemcutter", "run_gemcutter.py", (str(model), str(threads))),
        Engine("llama.cpp", "run_llama_cpp.py", (str(model), *map(str, (threads, context, window))), "PEER_LLAMA_CPP"),
    ]
    if config is not None:
        for dtype in ("bfloat16", "float32"):
            arguments = (str(config), str(threads), dtype)
            found.append(Engine(f"transformers {dtype}", "run_transformers.py", arguments, "PEER_TRANSFORMERS"))
        found.append(Engine("mlx-lm", "run_mlx_lm.py", (str(config), str(threads)), "PEER_MLX_LM"))
    return [engine for engine in found if engine.name in options.engines]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare all engines on one model, and put gemcutter's rows beside their ceilings."""
    model, config = files_of(options, folder)
    plan = open_checkpoint(model).plan
    tests = list_cases(options.prompt, options.tokens, options.depth)
    engines = list_engines(options, model, config, plan, tests)
    compare(engines, tests, options.rounds, options.budget, serial=options.serial)
    torch.set_num_threads(options.threads)
    found = {engine.name: engine.as_object() for engine in engines}
    ours = found["gemcutter"]
    rates = hardware.measure_rates()
    if ours["about"].get("native_flops_per_s"):
        rates["native_flops_per_s"] = ours["about"]["native_flops_per_s"]
    about = ours["about"]
    for row, test in ((row, test) for row in ours["rows"] for test in tests if test.name == row["test"]):
        row |= ceiling(plan, about["token_bytes"], about["kv_itemsize"], test, rates)
        row["share"] = row["tok_s"] / row["ceiling_tok_s"]
    run = {
        "model": name_of(options),
        "quant": options.quant if options.preset else about["quant"],
        "layers": len(plan.layers),
        "threads": options.threads,
        "rounds": options.rounds,
        "rates": rates,
        "engines": found,
    }
    try:
        plain, cached = (LoadOptions(model=str(model), repack_cache=keeps) for keeps in (False, True))
        run["first_token_s"], run["first_text_s"] = first_token_s(plain, options.threads, options.rounds)
        run["first_token_cached_s"], _ = first_token_s(cached, options.threads, options.rounds)
    except GemcutterError as error:
        run["first_token_problem"] = str(error)
    return run


def name_of(options: argparse.Namespace) -> str:
    """Format what was run: a file's name, or a size, of which perhaps some layers only."""
    cut = f", the first {options.layers} layers" if options.layers else ""
    return options.preset + cut if options.preset else Path(options.model).name


def files_of(options: argparse.Namespace, folder: Path) -> tuple[Path, Path | None]:
    """Return the GGUF file to run, and the config of the same geometry; a preset's are written unless they are there already."""
    if options.model:
        return locate(options.model), None
    stem = f"{options.preset}-{options.quant}" + (f"-{options.layers}" if options.layers else "")
    model, config = folder / f"{stem}.gguf", folder / f"{stem}.json"
    if not model.exists():
        write_model(model, options.preset, options.quant, options.layers, options.vocabulary)
    if options.layers:
        return model, None  # a cut model has no config that other libraries would read alike
    config.write_text(json.dumps(spell_config(SIZES[options.preset])))
    return model, config


def options_of(description: str) -> argparse.ArgumentParser:
    """Make the parser of what a comparison of engines takes."""
    parser = argparse.ArgumentParser(description=description)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", choices=tuple(SIZES), help="geometry of a synthetic model")
    which.add_argument("--model", help="a GGUF file")
    parser.add_argument("--quant", choices=tuple(FILE_TYPES), default="q4_0", help="of a preset (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="a preset's first layers only; no config is made of them for other libraries")
    parser.add_argument(
        "--vocabulary", type=Path, metavar="GGUF", help="file whose vocabulary a preset gets (default: the demo's)"
    )
    parser.add_argument("-p", "--prompt", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("-n", "--tokens", type=int, nargs="*", default=[64])
    parser.add_argument("--depth", type=int, nargs="*", default=[0])
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-r", "--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--engines", nargs="*", default=NAMES, choices=NAMES, help="(default: all)")
    parser.add_argument("--budget", type=float, default=90.0, metavar="S", help="longest turn; slower engines get fewer tokens")
    parser.add_argument("--serial", action="store_true", help="load one engine at a time, for models of which no two fit")
    parser.add_argument("--workdir", type=Path, help="keep the written files there (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    return parser


def measured(options: argparse.Namespace, measure: Callable[[argparse.Namespace, Path], dict[str, Any]]) -> dict[str, Any]:
    """Measure with a folder for the files that are written. Ends the program with a message where that can't be done."""
    with ExitStack() as stack:
        folder = options.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemcutter-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return measure(options, folder)
        except GemcutterError as error:
            raise SystemExit(str(error)) from error


def main(arguments: Sequence[str]) -> int:
    """Compare, keep the result, and print its table."""
    options = options_of("Compare gemcutter with the engines that are installed beside it.").parse_args(arguments)
    run = measured(options, measure)
    path = keep(run, hardware.describe(), date.today().isoformat(), options.results)
    print(table(run))
    print(f"\n{path}; `python bench/ratios.py --write` puts the newest into the README")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
