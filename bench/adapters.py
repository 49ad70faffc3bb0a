"""What an adapter chosen per request costs: replies and prompts with it, beside the same of a model that has none.

Owns the scene: one adapter of some rank over every matrix of the layers, and in turns requests that ask for it, requests that do
not but share the model, and a model of its own without adapters. What is printed as its cost is the median of the turns' ratios.
Refuses to know real weights; they are synthetic, and so is the adapter. Read `gemcutter/ops/lora.py` for what is computed.

    python bench/adapters.py --preset E2B --layers 8 --rank 16 -t 2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.adapters` has it

from bench.ratios import RESULTS, spell_machine
from gemcutter.benchmark.hardware import describe
from gemcutter.benchmark.target import from_preset
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions
from gemcutter.plan import Access, ModelPlan
from gemcutter.quant.lora import Delta

NAME = "bench"
WARM_UP = 8  # tokens


def draw_adapter(plan: ModelPlan, rank: int, wide: bool) -> dict[str, list[Delta]]:
    """Draw a small change of every matrix of the layers but experts; its values are bfloat16's unless it is to be `wide`."""
    draw, deltas = torch.Generator().manual_seed(0), dict[str, list[Delta]]()
    dtype = torch.float32 if wide else torch.bfloat16
    for spec in plan.params():
        if not spec.name.startswith("layers.") or len(spec.shape) != 2 or spec.access is not Access.DENSE:
            continue
        start = 0
        for _, rows in spec.parts or ((None, spec.shape[0]),):
            halves = torch.randn(rank, spec.shape[1], generator=draw), torch.randn(rows, rank, generator=draw)
            down, up = ((half * 1e-3).to(dtype).float() for half in halves)
            deltas.setdefault(spec.name, []).append(Delta(NAME, start, down, up))
            start += rows
    return deltas


class Subject:
    """An engine, and what its requests ask for."""

    def __init__(self, engine: Engine, adapter: str | None) -> None:
        self.engine, self.adapter, self._draw = engine, adapter, torch.Generator().manual_seed(0)

    def reply_s(self, tokens: int) -> float:
        """Return the seconds of a token, of a reply to one token."""
        return self._seconds(1, tokens + 1)[1] / tokens

    def prompt_s(self, rows: int) -> float:
        """Return the seconds of a prompt's row."""
        return self._seconds(rows, 1)[0] / rows

    def _seconds(self, rows: int, tokens: int) -> tuple[float, float]:
        """Return the seconds to the first token, and from there to the last."""
        ids = tuple(torch.randint(4, self.engine.decoder.plan.vocab, (rows,), generator=self._draw).tolist())
        started, first = time.perf_counter(), None
        self.engine.submit(Request(ids, max_tokens=tokens, adapter=self.adapter))
        while self.engine.has_work:
            for event in self.engine.step():
                if event.error is not None:
                    raise event.error
                if first is None and event.token is not None:
                    first = time.perf_counter()
        assert first is not None
        return first - started, time.perf_counter() - first


def turns(subjects: Sequence[Subject], measure: Callable[[Subject], float], rounds: int) -> list[list[float]]:
    """Measure all subjects in turns, the first one's turn first; returns each one's seconds by round."""
    found = [[measure(subject) for subject in subjects] for _ in range(rounds)]
    return [list(column) for column in zip(*found, strict=True)]


def main(arguments: Sequence[str]) -> int:
    """Measure as the command line says, print the ratios, keep the numbers if that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="E2B")
    parser.add_argument("--quant", default="q4_0")
    parser.add_argument("--layers", type=int, help="its first layers only")
    parser.add_argument("--rank", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--wide", action="store_true", help="factors that bfloat16 does not hold")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="of a reply (default: %(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help=f"write the numbers into {RESULTS}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    context = options.prompt + options.tokens + 4
    engines = []
    for adapted in (False, True):
        try:
            decoder = from_preset(options.preset, options.quant, options.layers, LoadOptions(model=options.preset)).decoder
        except GemcutterError as error:
            print(error, file=sys.stderr)
            return 1
        if adapted:
            decoder.adapted = decoder.with_adapter(NAME, draw_adapter(decoder.plan, options.rank, options.wide))
        engines.append(Engine(decoder, context, max_num_seqs=1))
    plain, adapted_model = engines
    subjects = {"no adapters": Subject(plain, None), "asked for": Subject(adapted_model, NAME)}
    subjects["there, not asked for"] = Subject(adapted_model, None)
    rows: list[dict[str, Any]] = []
    for what, measure in (
        (f"reply of {options.tokens}", lambda subject: subject.reply_s(options.tokens)),
        (f"prompt of {options.prompt}", lambda subject: subject.prompt_s(options.prompt)),
    ):
        for subject in subjects.values():
            subject.reply_s(WARM_UP)
            measure(subject)
        found = turns(list(subjects.values()), measure, options.rounds)
        for name, seconds in zip(subjects, found, strict=True):
            ratio = median(mine / base for mine, base in zip(seconds, found[0], strict=True))
            rows.append({"what": what, "adapter": name, "tok_s": 1 / median(seconds), "cost": ratio, "seconds": seconds})
            print(f"{what:14} {name:22} {1 / median(seconds):9.1f} tokens/s   {ratio:5.2f} times the time of a model without")
    if options.json:
        machine = describe()
        whole = {"date": date.today().isoformat(), "machine": machine, "options": vars(options), "rows": rows}
        path = RESULTS / f"adapters-{whole['date']}-{spell_machine(machine)}.json"
        path.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
