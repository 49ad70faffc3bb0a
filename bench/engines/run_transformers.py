"""transformers' turn in a comparison: run_transformers.py CONFIG THREADS DTYPE.

Owns the timing of prompts and of steps of one row with its own cache; `plain.py` makes the model.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from plain import make_model
from turns import Run, serve


def load() -> tuple[Run, dict[str, Any]]:
    """Make the model and give the runner of tests."""
    file, threads, dtype = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = make_model(json.loads(Path(file).read_text()), getattr(torch, dtype), "cpu")

    def run(kind: str, tokens: int, depth: int) -> float:
        if depth:
            raise NotImplementedError("its cache is not filled cheaply; measured at short context only")
        with torch.inference_mode():
            return prefill(model, tokens)[0] if kind == "pp" else decode(model, tokens)

    return run, {"version": transformers.__version__, "torch": torch.__version__, "dtype": dtype}


def prefill(model: Any, tokens: int) -> tuple[float, Any]:
    """Time a prompt, the last row's logits included; give its cache too."""
    ids = torch.randint(5, 1000, (1, tokens))
    started = time.perf_counter()
    found = model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started, found.past_key_values


def decode(model: Any, tokens: int) -> float:
    """Time steps of one row after a short prompt."""
    _, cache = prefill(model, 4)
    row = torch.tensor([[7]])
    started = time.perf_counter()
    for _ in range(tokens):
        row = model(row, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    return time.perf_counter() - started


serve(load)
