"""What the next turn of a long conversation costs: its time to the first token, with the prefix cache and without.

Owns the scene: a conversation of so many tokens is computed, the model answers, the user writes some more; then the same at a
short length, and once more with another ending from the middle, where nobody stopped before. The target: the next turn of 30,000
tokens comes within 1.5 times that of 1,000 tokens, plus what one window takes. Refuses to know text; weights are synthetic. Read
`gemcutter/cache/prefix_cache.py` for what is kept.

    python bench/prefix_reuse.py --preset E2B --layers 6 -t 2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.prefix_reuse` has it

from bench.ratios import RESULTS, spell_machine
from gemcutter.benchmark.hardware import describe
from gemcutter.benchmark.target import from_preset
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions
from gemcutter.model.text import Decoder

REPLY, MESSAGE = 16, 48  # tokens of an answer, and of what the user writes next


class Conversation:
    """One conversation in an engine of its own."""

    def __init__(self, decoder: Decoder, tokens: int, turns: int, max_rows: int) -> None:
        context = tokens + (turns + 1) * (REPLY + MESSAGE)
        self.engine = Engine(decoder, context, max_rows, prefix_cache_bytes=None)
        self._draw, self._vocab = torch.Generator().manual_seed(tokens), decoder.plan.vocab
        self.ids = self.draw(tokens)

    def draw(self, count: int) -> tuple[int, ...]:
        """Return random ids."""
        return tuple(torch.randint(4, self._vocab, (count,), generator=self._draw).tolist())

    def first_token(self, ids: tuple[int, ...], max_tokens: int) -> tuple[float, int, tuple[int, ...]]:
        """Return the seconds to the first token, how many tokens were cached, and the reply."""
        started_s, first_s, cached, reply = time.perf_counter(), 0.0, 0, list[int]()
        self.engine.submit(Request(ids, max_tokens=max_tokens))
        while self.engine.has_work:
            for event in self.engine.step():
                if event.prompt is not None:
                    first_s, cached = time.perf_counter() - started_s, event.prompt.cached_tokens
                reply += [] if event.token is None else [event.token]
        return first_s, cached, tuple(reply)

    def hold(self, turns: int) -> dict[str, Any]:
        """Begin the conversation and take turns; return what each cost."""
        first_s, _, reply = self.first_token(self.ids, REPLY)
        tokens, found = len(self.ids), list[float]()
        for _ in range(turns):
            self.ids += (*reply, *self.draw(MESSAGE))
            ttft_s, cached, reply = self.first_token(self.ids, REPLY)
            assert len(self.ids) - cached <= MESSAGE + 1, "the cache did not hold the conversation"
            found.append(ttft_s)
        parts_s, kept, _ = self.first_token((*self.ids[: tokens // 2], *self.draw(MESSAGE)), 1)
        return {
            "tokens": tokens,
            "first_turn_s": first_s,
            "next_turn_s": median(found),
            "next_turn_most_s": max(found),
            "middle_s": parts_s,
            "middle_computed": tokens // 2 + MESSAGE - kept,
            "cache_bytes": self.engine.prefix.most_bytes,
        }


def window_seconds(decoder: Decoder, max_rows: int) -> float:
    """Return the seconds that a prompt of one window takes by itself."""
    window = max((layer.window or 0) for layer in decoder.plan.layers)
    alone = Conversation(decoder, window, 0, max_rows)
    return min(alone.first_token(alone.draw(window), 1)[0] for _ in range(3))


def main(arguments: Sequence[str]) -> int:
    """Measure as the command line says, print the ratio, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="E2B")
    parser.add_argument("--quant", default="q4_0")
    parser.add_argument("--layers", type=int, help="its first layers only")
    parser.add_argument("--tokens", type=int, nargs=2, default=[1000, 30000], help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=512, help="of a step (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        subject = from_preset(options.preset, options.quant, options.layers, LoadOptions(model=options.preset))
    except GemcutterError as error:
        print(error, file=sys.stderr)
        return 1
    window_s = window_seconds(subject.decoder, options.rows)
    conversations = [Conversation(subject.decoder, tokens, options.turns, options.rows) for tokens in options.tokens]
    short, long = (each.hold(options.turns) for each in conversations)
    ratio = long["next_turn_s"] / (short["next_turn_s"] + window_s)
    machine = describe()
    found = {
        "date": date.today().isoformat(),
        "machine": machine,
        "model": subject.name,
        "quant": options.quant,
        "threads": options.threads,
        "window_s": window_s,
        "conversations": [short, long],
        "ratio_to_short_and_window": ratio,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"prefix-{found['date']}-{spell_machine(machine)}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    for each in (short, long):
        middle = f"another ending from the middle {each['middle_s']:.3f} s ({each['middle_computed']} rows)"
        print(f"{each['tokens']:6} tokens: {each['first_turn_s']:.2f} s, next turn {each['next_turn_s']:.3f} s, {middle}")
    print(f"a window alone: {window_s:.3f} s; ratio {ratio:.2f} (target: at most 1.5)\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
