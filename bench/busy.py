"""What is left of an engine's speed while other programs keep the machine's cores busy.

Owns those other programs (loops of plain Python, one process each) and the table: speeds beside none, one, two of them, also as
shares of the idle speed. Engines take turns as in `peers.py`, whose processes these are. Refuses to know how an engine is called.

    python bench/busy.py --preset E2B --quant q4_0 -t 2 -p 512 -n 32 --busy 0 1 2

With C cores, T threads and B busy processes, of which all get equal shares of the time, a fair share is C / (T + B) where that is
below 1.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.busy` has it

from bench.peers import Engine, files_of, list_engines, measured, name_of, options_of, take_turns
from bench.ratios import spell_machine
from gemcutter.benchmark import hardware
from gemcutter.benchmark.harness import BenchCase, list_cases
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.cores import core_count

ENGINES = ("gemcutter", "llama.cpp")
SETTLE_S = 1.0  # from the start of the busy processes to a turn: the system has spread them over the cores by then
LOOP = "while True: pass"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes running."""
    started = [subprocess.Popen([sys.executable, "-S", "-c", LOOP]) for _ in range(processes)]
    try:
        time.sleep(SETTLE_S if processes else 0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def compare(
    engines: Sequence[Engine], tests: Sequence[BenchCase], levels: Sequence[int], rounds: int, budget_s: float
) -> dict[int, list[Engine]]:
    """Run every test at every level of business, engine after engine, and all that over again; the first level is idle."""
    found = {level: [replace(engine, speeds={}) for engine in engines] for level in levels}
    with ExitStack() as stack:
        processes = [stack.enter_context(engine.started()) for engine in engines]
        for _ in range(rounds):
            for test in tests:
                for level in levels:
                    with busy(level):
                        take_turns(zip(found[level], processes, strict=True), test, budget_s)
    return found


def rows_of(found: dict[int, list[Engine]], tests: Sequence[BenchCase]) -> list[dict[str, Any]]:
    """List what was reached: test, busy processes, engine, and the medians beside the idle ones."""
    rows = []
    idle = min(found)
    for test in tests:
        for level, engines in found.items():
            for engine, at_rest in zip(engines, found[idle], strict=True):
                speeds = engine.speeds.get(test.name)
                if speeds:
                    median = statistics.median(speeds)
                    share = median / statistics.median(at_rest.speeds[test.name])
                    row = {"test": test.name, "tokens": engine.tokens[test.name], "busy": level, "engine": engine.name}
                    rows.append(row | {"tok_s": median, "tok_s_min": min(speeds), "tok_s_max": max(speeds), "share": share})
    return rows


def table(run: dict[str, Any]) -> str:
    """Lay a run out: a row for each test and level, a column for each engine."""
    names = list(dict.fromkeys(row["engine"] for row in run["rows"]))
    lines = ["| | busy processes | fair share | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for test, level in dict.fromkeys((row["test"], row["busy"]) for row in run["rows"]):
        here = {row["engine"]: row for row in run["rows"] if (row["test"], row["busy"]) == (test, level)}
        fair = min(1.0, run["cores"] / (run["threads"] + level))
        cells = [f"{here[name]['tok_s']:.3g} ({here[name]['share']:.2f}x)" if name in here else "-" for name in names]
        lines.append(f"| {test} | {level} | {fair:.2f}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(options: Any, folder: Path) -> dict[str, Any]:
    """Measure one model."""
    model, config = files_of(options, folder)
    tests = list_cases(options.prompt, options.tokens, options.depth)
    engines = list_engines(options, model, config, open_checkpoint(model).plan, tests)
    found = compare(engines, tests, sorted({0, *options.busy}), options.rounds, options.budget)
    problems = {engine.name: engine.problems for engine in engines if engine.problems}
    return {
        "date": date.today().isoformat(),
        "machine": hardware.describe(),
        "model": name_of(options),
        "quant": options.quant,
        "threads": options.threads,
        "cores": core_count(),
        "rounds": options.rounds,
        "rows": rows_of(found, tests),
        "problems": problems,
    }


def main(arguments: Sequence[str]) -> int:
    """Measure, keep the result, and print its table."""
    parser = options_of("What is left of an engine's speed on a busy machine.")
    parser.add_argument("--busy", type=int, nargs="*", default=[1, 2], help="numbers of busy processes (default: 1 2)")
    parser.set_defaults(engines=ENGINES, prompt=[512], tokens=[32])
    options = parser.parse_args(arguments)
    run = measured(options, measure)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"busy-{run['date']}-{spell_machine(run['machine'])}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(table(run), *run["problems"].items(), path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
