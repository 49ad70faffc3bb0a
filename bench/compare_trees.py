"""Times two work trees of gemcutter against each other: `gemcutter bench` of each in turn, and the ratios of medians.

Owns the order of runs and the report. Each tree runs with its own Python, which must find that tree's package and built kernels.
A change that moves code should leave every ratio near 1; the machine's noise is what the same tree against itself shows.

    python bench/compare_trees.py BEFORE AFTER --rounds 3 --out bench/results/compare.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

CASES = {
    "E2B q4_0": ["--preset", "E2B", "--quant", "q4_0", "-p", "512", "-n", "64", "-r", "3"],
    "26B-A4B, 6 layers, q4_0": ["--preset", "26B-A4B", "--layers", "6", "--quant", "q4_0", "-p", "512", "-n", "64", "-r", "3"],
}


def measure(tree: Path, words: list[str]) -> dict[str, float]:
    """Run one benchmark in a tree: tokens a second by test, peak bytes, and seconds from a cold process to the first text."""
    command = [str(tree / ".venv" / "bin" / "python"), "-m", "gemcutter", "bench", *words, "--json"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(words)}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    rates = {row["test"]: row["tok_s"] for row in found["rows"]}
    rest = {"peak_bytes": found["memory"]["peak_bytes"], "weight_bytes": found["memory"]["weight_bytes"]}
    if found.get("first_text_s"):
        rest["first_text_s"] = found["first_text_s"]
    return rates | rest


def compare(before: Path, after: Path, cases: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """Run every case `rounds` times in each tree, in turn: first the one, then the other."""
    found: dict[str, Any] = {}
    for name, words in cases.items():
        runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for number in range(rounds):
            order = [("before", before), ("after", after)]
            for which, tree in order if number % 2 == 0 else reversed(order):
                runs[which].append(measure(tree, words))
        found[name] = {"runs": runs, "medians": {}, "after_over_before": {}}
        for key in runs["before"][0]:
            values = {which: median(run[key] for run in each) for which, each in runs.items()}
            found[name]["medians"][key] = values
            found[name]["after_over_before"][key] = round(values["after"] / values["before"], 4)
            print(f"{name}  {key}: {values['before']:,.4g} -> {values['after']:,.4g}, x{found[name]['after_over_before'][key]}")
            sys.stdout.flush()
    return found


def main() -> int:
    """Compare two trees and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", action="append", default=[], help="a checkpoint to measure too, with its cold start")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    files = {Path(path).name: ["--model", path, "-p", "512", "-n", "64", "-r", "3"] for path in options.model}
    found = compare(options.before.resolve(), options.after.resolve(), files | CASES, options.rounds)
    commits = {
        which: subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True).stdout.strip()
        for which, tree in (("before", options.before), ("after", options.after))
    }
    result = {"date": date.today().isoformat(), "commits": commits, "cases": found}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
