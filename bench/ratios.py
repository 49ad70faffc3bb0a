"""Keeps what `peers.py` measured, one file a day and machine, and makes the README's tables of each model's newest run.

Owns the files' names and the table; refuses to measure. `python bench/ratios.py --write` puts the tables into the README,
without `--write` they are printed. A test holds that the README shows what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE.parent / "README.md"
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
OURS = "gemcutter"
PROSE_WIDTH = 120  # columns of prose in Markdown
NAME = re.compile(r"\d{4}-\d\d-\d\d-.+\.json")


def keep(run: dict[str, Any], machine: Mapping[str, Any], day: str, folder: Path = RESULTS) -> Path:
    """Write a run into the file of its day and machine, in the place of one of the same model there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{day}-{spell_machine(machine)}.json"
    found = json.loads(path.read_text()) if path.exists() else {"runs": []}
    others = [other for other in found["runs"] if _key(other) != _key(run)]
    whole = {"date": day, "machine": dict(machine), "runs": [*others, run]}
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return path


def spell_machine(machine: Mapping[str, Any]) -> str:
    """Format a machine as a part of file names."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']} cores".lower()).strip("-")


def _key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["model"], run["quant"], run["layers"], run["threads"]


def newest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read the newest run of each model on each kind of machine, with its day; the machine that was measured last comes first."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted((path for path in folder.glob("*.json") if NAME.fullmatch(path.name)), reverse=True):
        day = json.loads(path.read_text())
        here = day["machine"]
        runs = found.setdefault((here["cpu"], here["cores"], *here["features"]), {"machine": here, "runs": []})["runs"]
        known = {_key(run) for run in runs}
        runs += [run | {"date": day["date"]} for run in day["runs"] if _key(run) not in known]
    return list(found.values())


def blocks(machines: Sequence[Mapping[str, Any]]) -> str:
    """Lay the runs on several machines out for the README."""
    return "\n\n".join(map(block, machines))


def block(found: Mapping[str, Any]) -> str:
    """Lay the runs on one machine out for the README."""
    here = found["machine"]
    features = f" ({', '.join(here['features'])})" if here["features"] else ""
    heading = (
        f"Measured by `bench/peers.py` on {here['cpu']}, {here['cores']} cores{features}: all engines in one run, taking turns, "
        "with as many threads each; tokens a second, medians. Behind a peer's number stands how many times as "
        "fast gemcutter is. *Ceiling* is what this machine allows: its measured read bandwidth over the bytes that a token must "
        f"read, or {_spell_products(found['runs'])} over the operations of a prompt."
    )
    runs = sorted(found["runs"], key=lambda run: run["model"].endswith(".gguf"))  # files after released sizes
    return "\n\n".join([wrapped(heading), *(wrapped(table(run)) for run in runs)])


def _spell_products(runs: Sequence[Mapping[str, Any]]) -> str:
    prompts = [row for run in runs for row in run["engines"][OURS]["rows"] if row["test"].startswith("pp")]
    is_peak = all(row.get("ceiling", "").endswith("_peak_ops_per_s") for row in prompts)  # older files: products of matrices
    return "its processor's best rate of products" if is_peak else "its best measured rate of matrix products"


def table(run: Mapping[str, Any]) -> str:
    """Lay one run out: a row a test, a column an engine, and what else there is to say."""
    engines = run["engines"]
    peers = [name for name, engine in engines.items() if name != OURS and engine["rows"]]
    ours = {row["test"]: row for row in engines[OURS]["rows"]}
    theirs = {name: {row["test"]: row for row in engines[name]["rows"]} for name in peers}
    day = f" ({run['date']})" if "date" in run else ""  # none right after it was measured
    lines = [f"**{run['model']}, {run['quant']}, {run['threads']} threads**{day}", ""]
    lines.append("| | " + " | ".join([OURS, "ceiling", "share", *peers]) + " |")
    lines.append("|---|" + "---|" * (3 + len(peers)))
    for test, row in ours.items():
        cells = [_speed(row["tok_s"]), _speed(row["ceiling_tok_s"]), f"{row['share']:.0%}"]
        cells += [_versus(row, theirs[name].get(test), test) for name in peers]
        lines.append(f"| {_spell(test)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_notes(run)])


def _versus(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None, test: str) -> str:
    if theirs is None:
        return "-"
    fewer = "" if theirs["tokens"] == ours["tokens"] else f", of {theirs['tokens']} tokens"
    return f"{_speed(theirs['tok_s'])} ({ours['tok_s'] / theirs['tok_s']:.2g}x{fewer})"


def _notes(run: Mapping[str, Any]) -> list[str]:
    engine, rates = run["engines"][OURS], run["rates"]
    peak, weights = engine["peak_bytes"] / 1e6, engine["about"]["weight_bytes"] / 1e6
    notes = [
        f"The machine reads {rates['read_bytes_per_s'] / 1e9:.1f} GB/s. gemcutter's peak memory is {peak:,.0f} MB: "
        f"{weights:,.0f} MB of weights, and {peak - weights:,.0f} MB for all else, Python and torch included."
    ]
    if run.get("first_token_s") is not None:
        cached = run.get("first_token_cached_s")
        notes.append(
            f"From a cold process, with the file in the page cache, to the first token: {run['first_token_s']:.2f} s; "
            f"to its text: {run['first_text_s']:.2f} s" + (f"; with `--repack-cache` {cached:.2f} s." if cached else ".")
        )
    versions = [f"{name} {engine['about'].get('version', '')}" for name, engine in run["engines"].items() if engine["rows"]]
    missing = [
        f"{name} ({engine['problems'].get('', 'no test ran')})" for name, engine in run["engines"].items() if not engine["rows"]
    ]
    notes.append(f"Versions: {', '.join(versions)}." + (f" Not measured: {'; '.join(missing)}." if missing else ""))
    return [" ".join(notes)]


def put_between(begin: str, made: str, end: str) -> None:
    """Put a block into the README, in the place of what stands between two markers."""
    before, _, rest = README.read_text().partition(begin)
    README.write_text(f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}")


def wrapped(page: str) -> str:
    """Break a page's prose at `PROSE_WIDTH`; rows of tables are left as they are."""
    lines = page.splitlines()
    broken = [line if line.startswith("|") else textwrap.fill(line, PROSE_WIDTH, break_on_hyphens=False) for line in lines]
    return "\n".join(broken)


def _spell(test: str) -> str:
    """Format a test's name in words: pp512 is a prompt of 512 tokens."""
    found = re.fullmatch(r"(pp|tg)(\d+)(?:@d(\d+))?", test)
    assert found is not None, test
    what = f"prompt of {found[2]} tokens" if found[1] == "pp" else f"reply of {found[2]} tokens"
    return what if found[3] is None else f"{what} after {found[3]}"


def _speed(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def main(arguments: Sequence[str]) -> int:
    """Print the README's block, or put it there."""
    parser = argparse.ArgumentParser(description="Make the README's tables of the newest comparisons.")
    parser.add_argument("--write", action="store_true", help="put it into the README")
    found = newest()
    if not found:
        print("there is no result yet; run bench/peers.py", file=sys.stderr)
        return 1
    made = blocks(found)
    if not parser.parse_args(arguments).write:
        print(made)
        return 0
    put_between(BEGIN, made, END)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
