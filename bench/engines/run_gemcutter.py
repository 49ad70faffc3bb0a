"""gemcutter's turn in a comparison: run_gemcutter.py FILE THREADS.

Owns nothing but the call: `gemcutter bench` measures with the same stand.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from turns import Run, serve

import gemcutter
from gemcutter import native
from gemcutter.benchmark.hardware import native_rate
from gemcutter.benchmark.harness import BenchCase, BenchEngine
from gemcutter.benchmark.roofline import held_bytes, token_bytes
from gemcutter.benchmark.target import BenchTarget, from_file
from gemcutter.load_options import LoadOptions

MOMENTS, PAUSE_S = 4, 0.5  # at which the rate of products is measured


def load() -> tuple[Run, dict[str, Any]]:
    """Load the file and give the runner of tests."""
    torch.set_num_threads(int(sys.argv[2]))
    subject = from_file(LoadOptions(model=sys.argv[1]))
    stands: dict[int, BenchEngine] = {}

    def run(kind: str, tokens: int, depth: int) -> float:
        test = BenchCase(kind, tokens, depth)
        if depth not in stands or stands[depth].engine.context < test.context:
            stands.clear()  # the cache of another depth is not kept beside this one's
            stands[depth] = BenchEngine(subject.decoder, [test])
            stands[depth].warm_up()
        return stands[depth].run(test)

    return run, {
        "version": gemcutter.__version__,
        "kernels": native.level(),
        "quant": subject.quant,
        "activations": subject.decoder.precision.activations,
        "load_s": subject.load_s,
        "dtype": str(subject.decoder.dtype).removeprefix("torch."),
        "weight_bytes": held_bytes(subject.plan, subject.decoder.params),
        "token_bytes": token_bytes(subject.plan, subject.decoder.params),
        "kv_itemsize": subject.decoder.dtype.itemsize,
        "native_flops_per_s": best_native_rate(subject),
    }


def best_native_rate(subject: BenchTarget) -> float | None:
    """Measure the rate of products at several moments: on a shared machine a single one may be a slow one."""
    if subject.decoder.backend.name != "cpu":
        return None
    rates = list[float | None]()
    for _ in range(MOMENTS):
        time.sleep(PAUSE_S)
        rates.append(native_rate(subject.decoder))
    return max((rate for rate in rates if rate is not None), default=None)


serve(load)
