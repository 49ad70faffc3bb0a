"""What speculation is worth on this machine, at the acceptance that others have published: a replay, not a measurement of models.

Owns the replay: a model of a released geometry with synthetic weights decodes greedily, first without drafts; then the same
replies are decoded again with drafts that cost what the size's real assistant costs, but whose tokens are taken from the known
reply, and spoilt so that each place is right as often as the pattern says. Both take turns. Refuses to know text. Read
`gemcutter/engine/speculate/` for what is timed; `docs/guide/speculation.md` for what it is.

    python bench/speculation.py --preset E2B --quant q4_0 -t 2 --acceptance .80 .65 .50 .40 --batch 1 4 8

A place's number is how often a draft is right there, given nothing about the places before it, as engines print it: .80 .65 means
that the second one is right in 65 of 100 bursts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.speculation` has it

from bench.ratios import RESULTS, spell_machine
from gemcutter import config as configs
from gemcutter.benchmark import hardware, synthetic
from gemcutter.benchmark.target import from_preset
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.speculate.assistant import AssistantProposer, Wanted
from gemcutter.engine.speculate.confidence import Guess
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.speculate.tally import MOST_DRAFTS
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import make_decoder
from gemcutter.model.drafter import Drafter, sort_under_centroids
from gemcutter.model.text import Decoder
from gemcutter.ops.registry import select_backend
from gemcutter.plan import derive

CONFIGS = Path(__file__).parents[1] / "tests" / "goldens" / "configs"  # as published
PROMPT = 16  # tokens


class Replay(AssistantProposer):
    """An assistant whose drafts take their time, and are then replaced by known tokens that are right as often as wanted."""

    def __init__(self, drafter: Drafter, acceptance: Sequence[float]) -> None:
        super().__init__(drafter)
        self.replies: dict[tuple[int, ...], Sequence[int]] = {}
        places = [*acceptance, *[0.0] * (MOST_DRAFTS - len(acceptance))]
        self._given = [now / before if before else 0.0 for before, now in zip([1.0, *places], places, strict=False)]
        self._random = random.Random(5)

    def propose(self, wanted: Wanted) -> dict[int, Guess]:
        """Draft, and return what the replay says in place of the drafts."""
        found = super().propose(wanted)
        return {sequence.number: Guess(self._known(sequence, len(found[sequence.number].tokens))) for sequence, _ in wanted}

    def _known(self, sequence: SequenceState, count: int) -> tuple[int, ...]:
        reply, done = self.replies[sequence.request.prompt], len(sequence.reply)
        coming = reply[done : done + count]
        right = next((place for place in range(len(coming)) if self._random.random() >= self._given[place]), len(coming))
        return tuple(token if place < right else token ^ 1 for place, token in enumerate(coming))


def assistant_of(preset: str, target: Decoder, quant: str) -> Drafter:
    """Make a size's assistant with synthetic weights, quantized as its target."""
    raw = json.loads((CONFIGS / f"gemma-4-{preset}-it-assistant.json").read_text())
    plan = derive(configs.read(raw), target.plan)
    packer = select_backend("cpu", "auto").packer(torch.device("cpu"), target.dtype)
    params = synthetic.make_params(plan, quant, packer)
    if plan.centroids:
        params["draft.order"] = torch.randperm(plan.vocab)
    params = sort_under_centroids(plan, params)
    return Drafter(make_decoder(plan, params, LoadOptions(model=preset), target.dtype, torch.device("cpu")), target)


def decode(
    target: Decoder, batch: int, tokens: int, speculator: Speculator | None
) -> tuple[float, dict[tuple[int, ...], list[int]]]:
    """Decode a batch; return the tokens per second after the first of each, and the replies by prompt."""
    engine = Engine(target, PROMPT + tokens + 16, max_num_seqs=batch, speculator=speculator)
    prompts, replies = {}, dict[tuple[int, ...], list[int]]()
    for number in range(batch):
        ids = tuple(5 + (7 * place + 131 * number) % 1000 for place in range(PROMPT))
        prompts[engine.submit(Request(ids, max_tokens=tokens))] = ids
        replies[ids] = []

    def step() -> None:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.token is not None:
                replies[prompts[event.request]].append(event.token)

    while not all(replies.values()):
        step()
    before, started_s = sum(map(len, replies.values())), time.perf_counter()
    while engine.has_work:
        step()
    return (sum(map(len, replies.values())) - before) / (time.perf_counter() - started_s), replies


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Play every batch with every number of drafts, in turn; return what was found."""
    target = from_preset(options.preset, options.quant, options.layers, LoadOptions(model=options.preset)).decoder
    drafter = assistant_of(options.preset, target, options.quant)
    rows = []
    for batch in options.batch:
        speeds: dict[str, list[float]] = {}
        _, answers = decode(target, batch, options.tokens, None)
        last = dict[str, Speculator]()
        keeping = {name: Speculator(assistant=Replay(drafter, options.acceptance), draft_tokens=count) for name, count in DRAFTS}
        for _ in range(options.rounds):
            for name, speculator in {"off": None, **keeping}.items():
                if speculator is not None:
                    assert isinstance(speculator.assistant, Replay)
                    speculator.assistant.replies |= answers
                    last[name] = speculator
                speed, replies = decode(target, batch, options.tokens, speculator)
                if replies != answers:
                    raise RuntimeError(f"{name} drafts changed a reply of batch {batch}")
                speeds.setdefault(name, []).append(speed)
        rows += [_row(batch, name, speeds, last.get(name)) for name in speeds]
    return {
        "model": options.preset + (f", the first {options.layers} layers" if options.layers else ""),
        "quant": options.quant,
        "threads": options.threads,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "acceptance": options.acceptance,
        "machine": hardware.describe(),
        "rows": rows,
    }


DRAFTS: tuple[tuple[str, int | None], ...] = (("1", 1), ("2", 2), ("4", 4), ("auto", None))


def _row(batch: int, name: str, speeds: Mapping[str, Sequence[float]], speculator: Speculator | None) -> dict[str, Any]:
    ratios = [mine / plain for mine, plain in zip(speeds[name], speeds["off"], strict=True)]
    found: dict[str, Any] = {"batch": batch, "drafts": name, "tok_s": statistics.median(speeds[name])}
    found |= {"to_off": statistics.median(ratios), "to_off_min": min(ratios), "to_off_max": max(ratios)}
    if speculator is not None and speculator.tally.bursts:
        tally = speculator.tally
        found |= {"drafted_per_burst": tally.drafted / tally.bursts, "accepted_per_burst": tally.accepted / tally.bursts}
        found |= {"draft_s": speculator.costs.draft_s}
    return found


def table(run: Mapping[str, Any]) -> str:
    """Return the rows as a table."""
    head = ["batch", "drafts", "tokens/s", "to off", "least", "most", "drafted a burst", "right"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in run["rows"]:
        bursts = [f"{row[name]:.2f}" if name in row else "" for name in ("drafted_per_burst", "accepted_per_burst")]
        ratios = [f"{row[name]:.2f}" for name in ("to_off", "to_off_min", "to_off_max")]
        cells = [str(row["batch"]), row["drafts"], f"{row['tok_s']:.1f}", *ratios, *bursts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="E2B")
    parser.add_argument("--quant", default="q4_0")
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.80, 0.65, 0.50, 0.40])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("-n", "--tokens", type=int, default=128)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        with torch.inference_mode():
            run = measure(options)
    except (GemcutterError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    name = f"speculation-{options.preset}-{date.today().isoformat()}-{spell_machine(run['machine'])}.json"
    path = options.results / name
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(table(run))
    print(path)


if __name__ == "__main__":
    main()
