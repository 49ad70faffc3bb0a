"""Memory for repacked weights: slabs of huge pages, filled one weight after the other.

A token reads all weights, in order; a huge page costs one page fault and one entry of the processor's address cache where small
ones cost 512. Weights are no multiples of 2 MB, so they share slabs, each of which lives as long as any of its weights. Refuses
to know what is stored. Read `cpu_packing.py` for who fills it.
"""

from __future__ import annotations

import math
import mmap
import threading

import torch
from torch import Tensor

from gemcutter.numa import interleave

SLAB_BYTES = 64 << 20
_HUGE_BYTES = 2 << 20
_ALIGN_BYTES = 64

_lock = threading.Lock()
_slab = torch.empty(0, dtype=torch.uint8)  # what is left of the newest slab


def allocate(shape: tuple[int, ...]) -> Tensor:
    """Make zeroed memory, uint8, that begins at a multiple of 64 bytes."""
    global _slab
    size = math.prod(shape)
    with _lock:
        if size > len(_slab):
            _slab = _new_slab(max(size, SLAB_BYTES))
        taken, _slab = _slab[:size], _slab[-(-size // _ALIGN_BYTES) * _ALIGN_BYTES :]
    return taken.view(shape)


@torch.inference_mode(False)  # a slab outlives the mode in which its first weight was loaded
def _new_slab(size: int) -> Tensor:
    """Map whole huge pages, where the system has them; only what is written to takes memory."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    whole = -(-size // _HUGE_BYTES) * _HUGE_BYTES
    memory = mmap.mmap(-1, whole + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    slab = torch.frombuffer(memory, dtype=torch.uint8)
    slab = slab[-slab.data_ptr() % _HUGE_BYTES :][:whole]
    interleave(slab.data_ptr(), whole)  # threads of every node read every weight
    return slab
