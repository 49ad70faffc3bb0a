"""Time to the first token from nothing: a fresh process loads a model and answers a prompt of one token.

Owns the process and its clock, which is the system's own and runs alike in both processes. The file is in the page cache, because
a first process that does not count has read it. Refuses to know what takes the time. Read `gemcutter/api.py` for the load.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

from gemcutter.benchmark.target import Compute
from gemcutter.errors import GemcutterError

# Prints when the first token was chosen, and when its text was there.
PROGRAM = """
import sys, time
import gemcutter
model, *how = sys.argv[1:]
dtype, kernels, activations, repack_cache = (word or None for word in how)
options = {"dtype": dtype, "kernels": kernels, "activations": activations, "repack_cache": bool(repack_cache)}
loaded = gemcutter.load(model, **options, context=64, max_sequences=1, checkpoints=0)
loaded.engine.submit(gemcutter.Request((2,), max_tokens=1))
events = []
while not events:
    events = loaded.engine.step()
chosen = time.monotonic()
loaded.tokenizer.decode([events[0].token], special=True)
print(chosen, time.monotonic())
"""


def first_token_s(model: str, threads: int, how: Compute, repeats: int = 1, *, repack_cache: bool = False) -> tuple[float, float]:
    """Return the seconds from starting a process to its first token, and to that one's text: medians.

    With `repack_cache` the process that does not count also keeps the repacked weights, in a folder that is removed afterwards.
    Raises GemcutterError if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="gemcutter-cold-") as folder:
        runs = [_once(model, threads, how, folder if repack_cache else None) for _ in range(repeats + 1)]
    chosen, written = zip(*runs[1:], strict=True)
    return statistics.median(chosen), statistics.median(written)


def _once(model: str, threads: int, how: Compute, cache: str | None) -> tuple[float, float]:
    command = [sys.executable, "-c", PROGRAM, model, how.dtype or "", how.kernels, how.activations or "", "yes" if cache else ""]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} | ({"XDG_CACHE_HOME": cache} if cache else {})
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GemcutterError(f"{model}: a fresh process gave no first token: {last}")
    chosen, written = (float(word) - started for word in done.stdout.split()[-2:])
    return chosen, written
