"""Repacking by the native library: which bytes of a file it can lay out as panels, and the call.

Owns `gc_source` (csrc/cpu/repack.cpp). Refuses to know torch, so that a file can be repacked before torch is imported. Read
`quant/cpu_packing.py` for the way that every scheme can go, and for who calls this.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

from gemcutter.native import Matrix, load_library

# enum gc_kinds, by GGUF's name
BLOCK_KINDS = {"Q4_0": 0, "IQ4_NL": 0, "Q8_0": 1, "Q4_K": 2, "Q5_K": 3, "Q6_K": 4, "MXFP4": 7, "IQ4_XS": 8}
STREAM_KINDS = {4: 5, 8: 6}  # by bits: codes without gaps, lowest bits first, with scales of their own


class RepackSource(ctypes.Structure):
    """`gc_source`: rows of a matrix as a file holds them. Strides are bytes from one row to the next."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("code_stride", c_int64),
        ("scale_stride", c_int64),
        ("kind", c_int32),
        ("flip", c_int32),
    )


def repack(source: RepackSource, target: Matrix, threads: int) -> bool:
    """Write rows as the panels of `target`, whose memory is written to; False, and nothing done, without the library."""
    found = load_library()
    if found is None:
        return False
    found.gc_set_threads(threads)
    answer = found.gc_repack(ctypes.byref(source), ctypes.byref(target))
    assert answer == 0, source.kind
    return True
