"""What speculation is worth on this machine, at the acceptance that others have published: a replay, not a measurement of models.

Owns the comparison of numbers of drafts. A model of a released geometry with synthetic weights decodes greedily, first without
drafts; then the same replies are decoded again with drafts that cost what the size's real assistant costs, but whose tokens are
taken from the known reply, and spoilt so that each place is right as often as the pattern says. All take turns. Refuses to know
text. Read `gemcutter/benchmark/replay.py` for the replay, `docs/guide/speculation.md` for what it is.

    python bench/speculation.py --preset E2B --quant q4_0 -t 2 --acceptance .80 .65 .50 .40 --batch 1 4 8 --drafts 1 2 4 auto

With --llama-cpp, the path of its `llama-batched-bench`, that engine decodes as many tokens of a file of the same geometry in
every round, without drafts, since its own would need an assistant's file for it.

A place's number is how often a draft is right there, given nothing about the places before it, as engines print it: .80 .65 means
that the second one is right in 65 of 100 bursts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.speculation` has it

from bench.ratios import RESULTS, spell_machine
from bench.synthetic import write_model
from gemcutter.benchmark import hardware
from gemcutter.benchmark.drafts import play
from gemcutter.benchmark.harness import BenchCase, BenchEngine, Decoded
from gemcutter.benchmark.replay import Replay, check_acceptance, make_assistant
from gemcutter.benchmark.target import from_preset
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.speculate.tally import MOST_DRAFTS
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions

PROMPT = 16  # tokens
OFF, AUTO, LLAMA = "off", "auto", "llama.cpp"
DRAFTS = ("1", "2", "4", AUTO)  # that are played


class LlamaCpp:
    """llama.cpp's own benchmark of batches, over a file of the same geometry with synthetic weights."""

    def __init__(self, program: Path, options: argparse.Namespace, folder: Path) -> None:
        self._file, self._program, self._threads = folder / "model.gguf", program, options.threads
        write_model(self._file, options.preset, options.quant, options.layers)

    def speed(self, batch: int, tokens: int) -> float:
        """Return the tokens per second of a batch's replies. Raises RuntimeError with what the program said."""
        sizes = ["-npp", str(PROMPT), "-ntg", str(tokens), "-npl", str(batch), "-c", str(batch * (PROMPT + tokens + 16))]
        command = [str(self._program), "-m", str(self._file), *sizes, "-t", str(self._threads), "--output-format", "jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not rows:
            raise RuntimeError(f"{self._program}: {done.stderr.strip()[-500:]}")
        found: float = rows[-1]["speed_tg"]
        return found


def measure(options: argparse.Namespace, other: LlamaCpp | None = None) -> dict[str, Any]:
    """Play every batch with every number of drafts, in turn; return what was found. Raises GemcutterError."""
    shares, how = check_acceptance(options.acceptance), LoadOptions(model=options.preset, kernels=options.kernels)
    target = from_preset(options.preset, options.quant, options.layers, how).decoder
    drafter = make_assistant(options.preset, options.quant, target, how)
    rows = []
    for batch in options.batch:
        playing = {name: Speculator(assistant=Replay(drafter, shares), draft_tokens=count) for name, count in options.drafts}
        case = BenchCase("tg", options.tokens, batch=batch)
        stand = BenchEngine(target, [case], prompt_rows=PROMPT, speculator=next(iter(playing.values())))
        prompts, runs, theirs = stand.draw(PROMPT, batch), dict[str, list[Decoded]](), list[float]()
        stand.decode(prompts, options.tokens)  # so that nothing is timed that happens once
        for _ in range(options.rounds):
            plain, found = play(stand, prompts, options.tokens, playing)
            for name, decoded in {OFF: plain, **found}.items():
                runs.setdefault(name, []).append(decoded)
            theirs += [] if other is None else [other.speed(batch, options.tokens)]
        speeds = {name: [decoded.speed for decoded in each] for name, each in runs.items()} | ({LLAMA: theirs} if theirs else {})
        rows += [_row(batch, name, speeds, playing.get(name)) for name in speeds]
    return {
        "model": options.preset + (f", the first {options.layers} layers" if options.layers else ""),
        "quant": options.quant,
        "threads": options.threads,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "acceptance": list(shares),
        "machine": hardware.describe(),
        "rows": rows,
    }


def read_drafts(word: str) -> tuple[str, int | None]:
    """Read how many drafts are played: a number, or auto. Raises ArgumentTypeError."""
    if word == AUTO:
        return AUTO, None
    if not word.isdecimal() or not 1 <= int(word) <= MOST_DRAFTS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MOST_DRAFTS} or {AUTO}, found {word!r}")
    return str(int(word)), int(word)


def _row(batch: int, name: str, speeds: Mapping[str, Sequence[float]], speculator: Speculator | None) -> dict[str, Any]:
    ratios = [mine / plain for mine, plain in zip(speeds[name], speeds[OFF], strict=True)]
    found: dict[str, Any] = {"batch": batch, "drafts": name, "tok_s": statistics.median(speeds[name])}
    if LLAMA in speeds:
        found["to_llama_cpp"] = statistics.median(mine / other for mine, other in zip(speeds[name], speeds[LLAMA], strict=True))
    found |= {"to_off": statistics.median(ratios), "to_off_min": min(ratios), "to_off_max": max(ratios)}
    if speculator is not None and speculator.tally.bursts:
        tally = speculator.tally
        found |= {"drafted_per_burst": tally.drafted / tally.bursts, "accepted_per_burst": tally.accepted / tally.bursts}
        found |= {"draft_s": speculator.costs.draft_s}
    return found


def table(run: Mapping[str, Any]) -> str:
    """Return the rows as a table."""
    head = ["batch", "drafts", "tokens/s", "to off", "least", "most", "to llama.cpp", "drafted a burst", "right"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in run["rows"]:
        bursts = [
            f"{row[name]:.2f}" if name in row else "" for name in ("to_llama_cpp", "drafted_per_burst", "accepted_per_burst")
        ]
        ratios = [f"{row[name]:.2f}" for name in ("to_off", "to_off_min", "to_off_max")]
        cells = [str(row["batch"]), row["drafts"], f"{row['tok_s']:.1f}", *ratios, *bursts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="E2B")
    parser.add_argument("--quant", default="q4_0")
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.80, 0.65, 0.50, 0.40])
    parser.add_argument("--drafts", type=read_drafts, nargs="+", metavar="N|auto", default=list(map(read_drafts, DRAFTS)))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--llama-cpp", type=Path, help="the path of llama-batched-bench, to be measured beside")
    parser.add_argument("-n", "--tokens", type=int, default=128)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    return parser.parse_args(words)


def main() -> None:
    """Measure as the command line says."""
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            other = LlamaCpp(options.llama_cpp, options, Path(folder)) if options.llama_cpp else None
            run = measure(options, other)
    except (GemcutterError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    name = f"speculation-{options.preset}-{date.today().isoformat()}-{spell_machine(run['machine'])}.json"
    path = options.results / name
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(table(run))
    print(path)


if __name__ == "__main__":
    main()
