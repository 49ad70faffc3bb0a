"""llama.cpp's turn in a comparison, through llama-cpp-python: run_llama_cpp.py FILE THREADS CONTEXT WINDOW.

Owns the calls of its C interface, without the binding's copies of logits, and the filling of its cache: a saved state of a few
positions, spelled again with as many as a test wants (`state.py`), is read back. Speed does not depend on what keys and values
are.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import llama_cpp as library
from state import grow
from turns import Run, serve

BATCH, CHUNK = 2048, 512  # its own defaults: rows of a call, and of a graph
SEED_ROWS = 32  # computed positions that a filled cache repeats


def load() -> tuple[Run, dict[str, Any]]:
    """Load the file with its best settings and give the runner of tests."""
    file, threads, context, window = sys.argv[1], *map(int, sys.argv[2:])
    model = library.Llama(
        file,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=BATCH,
        n_ubatch=CHUNK,
        flash_attn=True,
        swa_full=False,
        verbose=False,
    )
    engine = Engine(model, window)
    engine.decode([5] * SEED_ROWS)
    system = library.llama_print_system_info().decode()
    return engine.run, {"version": library.__version__, "system": system, "depth": "a state of repeated keys and values"}


class Engine:
    """A context of llama.cpp."""

    def __init__(self, model: Any, window: int) -> None:
        self.model, self.window = model, window  # which frees its context when it goes
        self.context = model._ctx.ctx
        self.memory = library.llama_get_memory(self.context)

    def run(self, kind: str, tokens: int, depth: int) -> float:
        """Time a prompt of `tokens` rows, or as many steps of one row, after `depth` positions."""
        self.fill(depth)
        started = time.perf_counter()
        if kind == "pp":
            for start in range(0, tokens, BATCH):
                self.decode([10 + (start + i) * 7 % 1000 for i in range(min(BATCH, tokens - start))])
        else:
            for i in range(tokens):
                self.decode([10 + i % 1000])
        return time.perf_counter() - started

    def decode(self, ids: list[int]) -> None:
        """Compute rows to the end, the last one's logits included."""
        array = (library.llama_token * len(ids))(*ids)  # the batch only points to it
        if library.llama_decode(self.context, library.llama_batch_get_one(array, len(ids))):
            raise NotImplementedError("llama_decode failed")
        library.llama_synchronize(self.context)

    def fill(self, depth: int) -> None:
        """Empty the cache, and fill the first `depth` positions. Raises NotImplementedError where this version can't."""
        library.llama_memory_clear(self.memory, True)
        self.decode([5] * (SEED_ROWS if depth else 1))
        if not depth:
            library.llama_memory_clear(self.memory, True)
            return
        size = library.llama_state_seq_get_size(self.context, 0)
        seed = (ctypes.c_uint8 * size)()
        library.llama_state_seq_get_data(self.context, seed, size, 0)
        grown = grow(bytes(seed), depth, self.window)
        library.llama_memory_clear(self.memory, True)
        taken = library.llama_state_seq_set_data(self.context, (ctypes.c_uint8 * len(grown)).from_buffer(grown), len(grown), 0)
        if taken != len(grown) or library.llama_memory_seq_pos_max(self.memory, 0) != depth - 1:
            raise NotImplementedError(f"this version does not take a state of {depth} positions")


serve(load)
