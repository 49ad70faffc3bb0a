"""mlx-lm's turn in a comparison, on MLX's CPU build: run_mlx_lm.py CONFIG THREADS.

Owns the making of a model of that geometry with constant 4-bit weights in groups of 64, which is what mlx-lm's converter makes.
MLX has no say in how many threads it uses. Read `run_transformers.py` for the same on another library.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_map
from mlx_lm.models import gemma4_text as family
from mlx_lm.models.cache import make_prompt_cache
from turns import Run, serve

CHUNK = 512  # rows of one call


def load() -> tuple[Run, dict[str, Any]]:
    """Make the model and give the runner of tests."""
    mx.set_default_device(mx.cpu)
    config = json.loads(Path(sys.argv[1]).read_text())
    special = next(iter(config.get("per_layer_config", {}).values()), {})  # MLX knows the published spelling only
    spelled = {"global_head_dim": special.get("head_dim"), "num_global_key_value_heads": special.get("num_key_value_heads")}
    model = family.Model(family.ModelArgs.from_dict(config | {key: value for key, value in spelled.items() if value}))
    nn.quantize(model, group_size=64, bits=4, class_predicate=predicate)
    model.update(tree_map(constant, model.parameters()))  # nothing random is ever computed
    mx.eval(model.parameters())

    def run(kind: str, tokens: int, depth: int) -> float:
        if depth:
            raise NotImplementedError("its cache is not filled cheaply; measured at short context only")
        cache = make_prompt_cache(model)
        if kind == "tg":
            step(model, 4, cache)
        started = time.perf_counter()
        if kind == "tg":
            for _ in range(tokens):
                step(model, 1, cache)
        else:
            for start in range(0, tokens, CHUNK):
                step(model, min(CHUNK, tokens - start), cache)
        return time.perf_counter() - started

    return run, {"version": mlx_lm.__version__, "mlx": mx.__version__}


def predicate(path: str, module: Any) -> bool | dict[str, int]:
    """Return how a module is quantized: routers in 8 bits, as mlx-lm's converter does."""
    if not hasattr(module, "to_quantized"):
        return False
    return {"group_size": 64, "bits": 8} if path.endswith("router.proj") else True


def constant(array: Any) -> Any:
    """Return an array of that shape and kind without computing what it was to hold."""
    if array.dtype == mx.uint32:
        return mx.full(array.shape, 0x98765432, dtype=mx.uint32)
    return mx.full(array.shape, 0.01, dtype=mx.bfloat16)


def step(model: Any, rows: int, cache: Any) -> None:
    """Compute rows and the last one's choice."""
    logits = model(mx.full((1, rows), 7), cache=cache)
    mx.eval(logits[:, -1].argmax(-1))


serve(load)
