"""transformers on a GPU: gpu_transformers.py PRESET -p 512 -n 128 --batch 1 8: prints one JSON object.

Owns the timing of its own `forward` with its own cache, in bfloat16; `plain.py` makes the model. Prompts run alone, replies in
batches; a step ends when its tokens are on the host, as ours does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from plain import make_model

sys.path.insert(0, str(Path(__file__).parents[2]))

from gemcutter.benchmark.synthetic import size_of
from gemcutter.checkpoint.write.synth import spell_config

ROUNDS = 3


def prefill(model: Any, rows: int, batch: int) -> Any:
    """Run prompts, and wait for the last row's token."""
    ids = torch.randint(5, 1000, (batch, rows), device="cuda")
    found = model(ids, use_cache=True, logits_to_keep=1)
    found.logits[:, -1].argmax(-1).tolist()
    return found.past_key_values


def decode_s(model: Any, tokens: int, batch: int) -> float:
    """Time steps of one row a sequence after a short prompt."""
    cache, row = prefill(model, 4, batch), torch.full((batch, 1), 7, device="cuda")
    started = time.perf_counter()
    for _ in range(tokens):
        row = model(row, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        row.tolist()
    return time.perf_counter() - started


def prefill_s(model: Any, rows: int) -> float:
    """Time a prompt until its token is on the host."""
    started = time.perf_counter()
    prefill(model, rows, 1)
    return time.perf_counter() - started


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("preset")
    parser.add_argument("-p", nargs="*", type=int, default=[])
    parser.add_argument("-n", nargs="*", type=int, default=[])
    parser.add_argument("--batch", nargs="*", type=int, default=[1])
    options = parser.parse_args()
    rows = []
    with torch.inference_mode():
        model = make_model(spell_config(size_of(options.preset)), torch.bfloat16, "cuda")
        for size in options.p:
            prefill(model, size, 1)
            seconds = statistics.median(prefill_s(model, size) for _ in range(ROUNDS))
            rows.append({"test": f"pp{size}", "tok_s": size / seconds, "ms_a_step": 1e3 * seconds / size})
        for size in options.n:
            for batch in options.batch:
                decode_s(model, 4, batch)
                seconds = statistics.median(decode_s(model, size, batch) for _ in range(ROUNDS))
                name = f"tg{size}" + (f"x{batch}" if batch > 1 else "")
                rows.append({"test": name, "tok_s": batch * size / seconds, "ms_a_step": 1e3 * seconds / size})
    print(json.dumps({"version": transformers.__version__, "rows": rows}))


main()
