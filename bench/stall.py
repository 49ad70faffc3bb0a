"""What others notice of a long prompt: the gaps of a stream beside it, and how long a short request behind it waits.

Owns the scene: one sequence decodes all the time; a long prompt comes, and when it is well under way a short one. It is played
with steps that are bounded by rows alone, and with steps sized in time. The long prompt is also computed by itself, which shows
what smaller steps cost. Refuses to know text; weights are synthetic. Read `gemcutter/engine/step_sizer.py` for how steps are
sized.

    python bench/stall.py --preset E2B --quant q4_0 -t 2 --prompt 8192 --max-stall-ms 200
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.stall` has it

from gemcutter.benchmark.target import from_preset
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request, RequestEvent
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions
from gemcutter.model.text import Decoder

WARM_UP_ROWS = 600  # of a prompt before the scene, from which the sizer learns
STREAM_PROMPT = 16  # tokens


class Scene:
    """One engine and when its requests' tokens came."""

    def __init__(self, decoder: Decoder, context: int, max_rows: int, max_stall_ms: float | None) -> None:
        self.engine = Engine(decoder, context, max_rows, max_num_seqs=4, max_stall_ms=max_stall_ms)
        self.vocab = decoder.plan.vocab
        self.came_s = dict[int, list[float]]()
        self.steps_s = list[float]()

    def submit(self, length: int, max_tokens: int) -> int:
        """Queue a prompt of random ids; return its number."""
        ids = torch.randint(4, self.vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        return self.engine.submit(Request(tuple(ids), max_tokens=max_tokens))

    def step(self) -> list[RequestEvent]:
        """Run a step and note when its tokens came."""
        started_s = time.perf_counter()
        events = self.engine.step()
        self.steps_s.append(time.perf_counter() - started_s)
        for event in events:
            self.came_s.setdefault(event.request, []).append(event.time_s)
        return events

    def run_until(self, number: int) -> float:
        """Step until a request has its first token; return when it came."""
        while number not in self.came_s:
            self.step()
        return self.came_s[number][0]


def play(decoder: Decoder, prompt: int, short: int, max_rows: int, max_stall_ms: float | None) -> dict[str, Any]:
    """Play the scene; return seconds by name."""
    scene = Scene(decoder, prompt + 4096, max_rows, max_stall_ms)
    scene.run_until(scene.submit(WARM_UP_ROWS, 1))
    started_s = time.perf_counter()
    alone_s = scene.run_until(scene.submit(prompt, 1)) - started_s
    stream = scene.submit(STREAM_PROMPT, 4000)
    scene.run_until(stream)
    for _ in range(8):
        scene.step()
    scene.run_until(scene.submit(WARM_UP_ROWS, 1))
    scene.steps_s.clear()
    started_s, before = time.perf_counter(), len(scene.came_s[stream])
    long = scene.submit(prompt, 1)
    while time.perf_counter() - started_s < alone_s / 3:
        scene.step()
    came_s = time.perf_counter()
    short_s = scene.run_until(scene.submit(short, 1)) - came_s
    is_behind = long not in scene.came_s
    long_s = scene.run_until(long) - started_s
    gaps = sorted(after - before for before, after in pairwise(scene.came_s[stream][before - 1 :]))
    return {
        "max_stall_ms": max_stall_ms,
        "long_alone_s": alone_s,
        "long_beside_s": long_s,
        "short_ttft_s": short_s,
        "short_passed": is_behind,
        "gap_median_s": gaps[len(gaps) // 2],
        "gap_p95_s": gaps[int(len(gaps) * 0.95)],
        "gap_longest_s": gaps[-1],
        "steps": len(scene.steps_s),
    }


def spell(found: Sequence[dict[str, Any]]) -> str:
    """Return the scenes as a table."""
    head = "| step | short: first token | stream: longest gap | 95 % | median | long: first token | alone |\n" + "|---" * 7 + "|"
    names = ("short_ttft_s", "gap_longest_s", "gap_p95_s", "gap_median_s", "long_beside_s", "long_alone_s")
    rows = [
        " | ".join(
            [
                "rows alone" if each["max_stall_ms"] is None else f"{each['max_stall_ms']:g} ms",
                *(f"{each[name]:.2f} s" for name in names),
            ]
        )
        for each in found
    ]
    return "\n".join([head, *(f"| {row} |" for row in rows)])


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="E2B")
    parser.add_argument("--quant", default="q4_0")
    parser.add_argument("--layers", type=int)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the long prompt")
    parser.add_argument("--short", type=int, default=32, help="tokens of the short one")
    parser.add_argument("--max-rows", type=int, default=512, help="rows of a step at most")
    parser.add_argument("--max-stall-ms", type=float, nargs="+", default=[200.0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        target = from_preset(args.preset, args.quant, args.layers, LoadOptions(model=args.preset))
        with torch.inference_mode():
            found = [play(target.decoder, args.prompt, args.short, args.max_rows, stall) for stall in (None, *args.max_stall_ms)]
    except GemcutterError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(found) if args.json else spell(found))


if __name__ == "__main__":
    main()
