"""How the time of a token grows with the context: measures decoding behind filled contexts and draws it.

Owns the chart, an SVG that is readable on light and dark pages, with the floor beside the measurement: what reading weights, keys
and values takes at this machine's bandwidth. Only the global layers' keys may make it grow. Refuses to know how contexts are
filled (`gemcutter/benchmark/harness.py`).

    python bench/contexts.py --preset E2B --quant q4_0 -t 2 --depth 0 2048 16384 65536 --out docs/contexts.svg
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.contexts` has it

from bench.ratios import RESULTS, spell_machine
from gemcutter.benchmark.harness import list_cases
from gemcutter.benchmark.report import measure
from gemcutter.benchmark.target import from_file, from_preset
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 40, 64, 56  # margins around the plot
TICKS = 5
DASHES = 'stroke-dasharray="6 4"'
STYLE = """
  .page { fill: #ffffff } .text { fill: #24292f } .faint { fill: #57606a } .grid { stroke: #d0d7de }
  .ours { stroke: #0969da } .ours-dot { fill: #0969da } .floor { stroke: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .text { fill: #e6edf3 } .faint { fill: #8d96a0 } .grid { stroke: #30363d }
    .ours { stroke: #58a6ff } .ours-dot { fill: #58a6ff } .floor { stroke: #f0883e }
  }
  text { font-family: system-ui, sans-serif; font-size: 13px } .title { font-size: 16px; font-weight: 600 }
"""

Point = tuple[float, float]  # context in tokens, milliseconds a token


def points(found: Mapping[str, Any]) -> tuple[list[Point], list[Point]]:
    """Return the measured milliseconds a token and the least that reading takes, by context."""
    rows = sorted((row["depth"], row["tok_s"], row["ceiling_tok_s"]) for row in found["rows"])
    return [(depth, 1e3 / speed) for depth, speed, _ in rows], [(depth, 1e3 / ceiling) for depth, _, ceiling in rows]


def draw(found: Mapping[str, Any], day: str) -> str:
    """Draw a measurement as SVG."""
    ours, floor = points(found)
    right = max(context for context, _ in ours) or 1
    step = nice_step(max(ms for _, ms in (*ours, *floor)) / TICKS)
    top = step * -(-max(ms for _, ms in (*ours, *floor)) // step)

    def place(point: Point) -> Point:
        context, ms = point
        x = LEFT + (WIDTH - LEFT - RIGHT) * context / right
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ms / top

    title = f"Milliseconds a token by context: {found['model']}, {found['quant']}"
    where = f"{found['machine']['cpu']}, {found['threads']} threads, {found['rates']['read_bytes_per_s'] / 1e9:.1f} GB/s; {day}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
            _text((LEFT, 26), title, "text title"),
            _text((LEFT, 46), where, "faint"),
            *_grid(place, [step * index for index in range(int(top / step) + 1)], right, ours),
            _line([place(point) for point in floor], "floor", DASHES),
            _line([place(point) for point in ours], "ours"),
            *_labels([place(point) for point in ours], ours),
            *_legend(),
            _text((WIDTH - RIGHT, HEIGHT - 12), "context, tokens", "faint", "end"),
            "</svg>\n",
        ]
    )


def nice_step(rough: float) -> float:
    """Return the next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** len(str(int(rough))) / 10 if rough >= 1 else 0.1
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def _grid(place: Any, heights: Sequence[float], right: float, ours: Sequence[Point]) -> Iterator[str]:
    for ms in heights:
        (left, y), (end, _) = place((0, ms)), place((right, ms))
        yield f'<line class="grid" x1="{left:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}"/>'
        yield _text((left - 8, y + 4), f"{ms:g}", "faint", "end")
    last = -100.0
    for context, _ in ours:
        x, y = place((context, 0))
        if x - last > 40:  # of two contexts that stand close, the first is named
            yield _text((x, y + 20), f"{context // 1024}k" if context >= 1024 else f"{context}", "faint", "middle")
            last = x


def _labels(places: Sequence[Point], ours: Sequence[Point]) -> Iterator[str]:
    last = -100.0
    for (x, y), (_, ms) in zip(places, ours, strict=True):
        yield f'<circle class="ours-dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        if x - last > 40:
            yield _text((x, y - 10), f"{ms:.1f}", "text", "middle")
            last = x


def _legend() -> Iterator[str]:
    y = HEIGHT - 16
    yield _line([(LEFT, y), (LEFT + 28, y)], "ours")
    yield _text((LEFT + 36, y + 4), "gemcutter", "text")
    yield _line([(LEFT + 130, y), (LEFT + 158, y)], "floor", DASHES)
    yield _text((LEFT + 166, y + 4), "the floor: reading weights, keys and values", "text")


def _line(places: Sequence[Point], name: str, more: str = "") -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{name}" points="{joined}" fill="none" stroke-width="2.5" {more}/>'


def _text(point: Point, text: str, name: str, anchor: str = "start") -> str:
    return f'<text class="{name}" x="{point[0]:.1f}" y="{point[1]:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure and draw the time of a token by context.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", help="geometry of a synthetic model")
    which.add_argument("--model", help="a checkpoint")
    parser.add_argument("--quant", default="q4_0", help="of a preset (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="a preset's first layers only")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="of each reply (default: %(default)s)")
    parser.add_argument("--depth", type=int, nargs="*", default=[0, 2048, 16384, 65536])
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-r", "--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/contexts.svg"), help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure, keep the numbers, draw them."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        if options.model:
            subject = from_file(LoadOptions(model=options.model))
        else:
            subject = from_preset(options.preset, options.quant, options.layers, LoadOptions(model=options.preset))
        found = measure(subject, list_cases([], [options.tokens], options.depth), options.repeats)
    except GemcutterError as error:
        print(error, file=sys.stderr)
        return 1
    day = date.today().isoformat()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"contexts-{day}-{spell_machine(found['machine'])}.json"
    path.write_text(json.dumps({"date": day} | found, indent=1) + "\n")
    options.out.write_text(draw(found, day))
    print(f"{path}\n{options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
