"""What a process that has served requests must give back, for the tests that run for minutes.

Owns that count. Read `soak.py` and `load_test.py` for who asks.
"""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import gemcutter
from gemcutter.api import Model


def held(model: Model) -> dict[str, int]:
    """Count what must come back: pages that nobody can free, open files, threads; and resident bytes."""

    def used(engine: gemcutter.Engine) -> int:
        while engine.prefix.evict():
            pass
        return sum(len(book.ref_counts) - book.free for book in engine.pool.allocators.values())

    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = len(os.listdir("/proc/self/fd"))
    return {"pages": model.loop.run(used), "files": files, "threads": threading.active_count(), "bytes": resident}
