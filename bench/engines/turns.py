"""The worker's side of a comparison: load once, then run a test whenever it is this worker's turn.

Owns the protocol: one JSON object a line, tests in on stdin, seconds out on stdout, whatever a library prints goes to stderr.
Standard library only, because every worker runs in its own interpreter, beside another engine. Read `../peers.py` for the other
side.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds of a test: kind ("pp" or "tg"), tokens, depth. Raises NotImplementedError, saying why, for one that can't be measured.
Run = Callable[[str, int, int], float]


def serve(load: Callable[[], tuple[Run, dict[str, Any]]]) -> None:
    """Load the engine, say what it is, and run tests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        run, about = load()
    except Exception as error:  # whatever it is, the comparison goes on without this engine
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(about=about | {"peak_bytes": peak_bytes()})
    for line in sys.stdin:
        test = json.loads(line)
        try:
            answer(seconds=run(test["kind"], test["tokens"], test["depth"]), peak_bytes=peak_bytes())
        except NotImplementedError as error:
            answer(error=str(error))


def peak_bytes() -> int | None:
    """Return the most bytes that were ever resident in this process, mapped files included; None where that can't be read."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
