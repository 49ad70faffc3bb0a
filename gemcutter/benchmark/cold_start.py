"""Time to the first token from nothing: a fresh process loads a model and answers a prompt of one token.

Owns the process and its clock, which is the system's own and runs alike in both processes. The file is in the page cache, because
a first process that does not count has read it. Refuses to know what takes the time. Read `gemcutter/api.py` for the load.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace

from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions

# Prints when the first token was chosen, and when its text was there.
PROGRAM = """
import json, sys, time
import gemcutter
loaded = gemcutter.load(**json.loads(sys.argv[1]))
((event, *_),) = loaded.loop.complete([gemcutter.Request((2,), max_tokens=1)])
chosen = time.monotonic()
loaded.tokenizer.decode([event.token], special=True)
print(chosen, time.monotonic())
"""


def first_token_s(how: LoadOptions, threads: int, repeats: int = 1) -> tuple[float, float]:
    """Return the seconds from starting a process to its first token, and to that one's text: medians.

    With `repack_cache` the process that does not count also keeps the repacked weights, in a folder that is removed afterwards.
    The engine is as small as it can be.
    Raises GemcutterError if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="gemcutter-cold-") as folder:
        runs = [_once(how, threads, folder if how.repack_cache else None) for _ in range(repeats + 1)]
    chosen, written = zip(*runs[1:], strict=True)
    return statistics.median(chosen), statistics.median(written)


def _once(how: LoadOptions, threads: int, cache: str | None) -> tuple[float, float]:
    small = replace(how, context=64, max_num_seqs=1, prefix_cache_bytes=0, repack_cache=bool(how.repack_cache))
    command = [sys.executable, "-c", PROGRAM, json.dumps(asdict(small))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} | ({"XDG_CACHE_HOME": cache} if cache else {})
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GemcutterError(f"{how.model}: a fresh process gave no first token: {last}")
    chosen, written = (float(word) - started for word in done.stdout.split()[-2:])
    return chosen, written
