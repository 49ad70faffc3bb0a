"""What a step of several rows costs, over a step of one: the price of verifying drafts, and of a batch.

Owns the table of ratios; `gemcutter bench --batch` measures. Next to each ratio stands what it would be if only bytes counted: a
dense model reads the same for all rows, of experts those that the rows are expected to choose. With --processor-time a single
thread is measured by the time that it ran, for machines that others use too.

    python bench/rows.py --preset E2B --quant q4_0 -t 2 --json bench/results/rows.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

CLOCK = """
import runpy, sys, time
time.perf_counter, time.perf_counter_ns = time.process_time, time.process_time_ns
sys.argv = ["gemcutter", *sys.argv[1:]]
runpy.run_module("gemcutter", run_name="__main__")
"""


def measure(words: list[str], batches: list[int], processor_time: bool) -> dict[str, Any]:
    """Run `gemcutter bench` and return its JSON."""
    start = ["-c", CLOCK] if processor_time else ["-m", "gemcutter"]
    command = [sys.executable, *start, "bench", *words, "-p", "0", "--json", "--batch", *map(str, batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or done.stdout.strip())
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ratios(rows: list[dict[str, Any]], batches: list[int]) -> list[dict[str, Any]]:
    """Return for each number of rows the milliseconds of a step, and its ratios to one row: measured, and by bytes alone."""
    found = []
    for row, count in zip(rows, batches, strict=True):
        step, floor = count / row["tok_s"], count / row["ceiling_tok_s"]
        found.append({"rows": count, "step_ms": 1e3 * step, "floor_ms": 1e3 * floor})
    for each in found:
        each["cost"] = round(each["step_ms"] / found[0]["step_ms"], 3)
        each["cost_of_bytes"] = round(each["floor_ms"] / found[0]["floor_ms"], 3)
    return found


def main() -> int:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="E2B")
    parser.add_argument("--layers")
    parser.add_argument("--quant", default="q4_0")
    parser.add_argument("-t", "--threads", default="2")
    parser.add_argument("-n", "--tokens", default="32")
    parser.add_argument("-r", "--repeats", default="5")
    parser.add_argument("--depth", default="0")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--processor-time", action="store_true", help="needs -t 1")
    parser.add_argument("--json", type=Path, help="collects runs in this file")
    options = parser.parse_args()
    if options.processor_time and options.threads != "1":
        parser.error("--processor-time counts all threads, also those that wait: it needs -t 1")
    words = ["--preset", options.preset, "--quant", options.quant, "-t", options.threads, "-n", options.tokens]
    words += ["-r", options.repeats, "--depth", options.depth, *(["--layers", options.layers] if options.layers else [])]
    found = measure(words, options.rows, options.processor_time)
    table = ratios(found["rows"], options.rows)
    print(f"{' '.join(words)}{', processor time' if options.processor_time else ''}")
    print("| rows | ms a step | cost over one row | by bytes alone |\n|---|---|---|---|")
    for row in table:
        print(f"| {row['rows']} | {row['step_ms']:.1f} | {row['cost']:.2f} | {row['cost_of_bytes']:.2f} |")
    if options.json:
        runs = json.loads(options.json.read_text()) if options.json.exists() else []
        run = {"date": date.today().isoformat(), "options": words, "processor_time": options.processor_time, "rows": table}
        options.json.write_text(json.dumps([*runs, run | {"bench": found}], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
