"""gemcutter's turn in a comparison: run_gemcutter.py FILE THREADS.

Owns nothing but the call: `gemcutter bench` measures with the same stand.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from turns import Run, serve

import gemcutter
from gemcutter import native
from gemcutter.gauge.ceilings import held_bytes, token_bytes
from gemcutter.gauge.machine import native_rate
from gemcutter.gauge.stand import Stand, Trial
from gemcutter.gauge.subject import Compute, from_file


def load() -> tuple[Run, dict[str, Any]]:
    """Load the file and give the runner of tests."""
    torch.set_num_threads(int(sys.argv[2]))
    subject = from_file(sys.argv[1], Compute())
    stands: dict[int, Stand] = {}

    def run(kind: str, tokens: int, depth: int) -> float:
        test = Trial(kind, tokens, depth)
        if depth not in stands or stands[depth].engine.context < test.context:
            stands.clear()  # the cache of another depth is not kept beside this one's
            stands[depth] = Stand(subject.decoder, [test])
            stands[depth].warm_up()
        return stands[depth].run(test)

    return run, {
        "version": gemcutter.__version__,
        "kernels": native.level(),
        "quant": subject.quant,
        "activations": subject.decoder.numerics.activations,
        "load_s": subject.load_s,
        "dtype": str(subject.decoder.dtype).removeprefix("torch."),
        "weight_bytes": held_bytes(subject.plan, subject.decoder.params),
        "token_bytes": token_bytes(subject.plan, subject.decoder.params),
        "kv_itemsize": subject.decoder.dtype.itemsize,
        "native_flops_per_s": native_rate(subject.decoder) if subject.how.is_native else None,
    }


serve(load)
