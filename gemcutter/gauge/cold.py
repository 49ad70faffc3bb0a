"""Time to the first token from nothing: a fresh process loads a model and answers a prompt of one token.

Owns the process and its clock, which is the system's own and runs alike in both processes. The file is in the page cache, because
a first process that does not count has read it. Refuses to know what takes the time. Read `gemcutter/api.py` for the load.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from gemcutter.errors import GemcutterError
from gemcutter.gauge.subject import Compute

# Prints when the first token was chosen, and when its text was there.
PROGRAM = """
import sys, time
import gemcutter
model, *how = sys.argv[1:]
dtype, kernels, activations = (word or None for word in how)
options = {"dtype": dtype, "kernels": kernels, "activations": activations}
loaded = gemcutter.load(model, **options, context=64, max_sequences=1, checkpoints=0)
loaded.engine.submit(gemcutter.Request((2,), max_tokens=1))
events = []
while not events:
    events = loaded.engine.step()
chosen = time.monotonic()
loaded.tokenizer.decode([events[0].token], special=True)
print(chosen, time.monotonic())
"""


def first_token_s(model: str, threads: int, how: Compute, repeats: int = 1) -> tuple[float, float]:
    """Give the seconds from starting a process to its first token, and to that one's text: medians.

    Raises GemcutterError if the process fails.
    """
    chosen, written = zip(*[_once(model, threads, how) for _ in range(repeats + 1)][1:], strict=True)
    return statistics.median(chosen), statistics.median(written)


def _once(model: str, threads: int, how: Compute) -> tuple[float, float]:
    command = [sys.executable, "-c", PROGRAM, model, how.dtype or "", how.kernels, how.activations or ""]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GemcutterError(f"{model}: a fresh process gave no first token: {last}")
    chosen, written = (float(word) - started for word in done.stdout.split()[-2:])
    return chosen, written
