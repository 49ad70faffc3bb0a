"""What crosses the border to the native library: entry points, matrices, and keys and values as C structs.

Owns the conversion of weights to `gc_matrix` and of rows to contiguous float32 tensors; refuses to know layers and steps. Whoever
calls keeps tensors and weights alive meanwhile. Read `gemcutter/native.py` for the structs, `layer_ops.py` for who calls.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from gemcutter import native
from gemcutter.cores import quota_cores
from gemcutter.errors import CapacityError, KernelError, RankError
from gemcutter.native import KVView, Matrix
from gemcutter.ops.step import KVCache
from gemcutter.ops.types import OpContext
from gemcutter.quant import Part, Weight
from gemcutter.quant.cpu_packed import CpuPackedWeight

CODES = {torch.bfloat16: 3, torch.float16: 4, torch.float32: 5}  # enum gc_codes
KV_CODES = {**CODES, torch.int8: 2}
OUT_OF_BOUNDS = 2  # what an entry point returns, csrc/cpu/bounds.h
RANKS_ENDED = 3  # and csrc/cpu/ranks.h
ACTIVATIONS = {"int8": 0, "bf16": 1, "float32": 2}  # enum gc_activations

_ENTRIES: dict[str, tuple[Any, ...]] = {
    "gc_linear": (c_void_p, c_int, c_void_p, c_int64, c_int, c_void_p),
    "gc_attention_forward": (c_void_p,) * 5,
    "gc_embed": (c_void_p, c_void_p, c_int64, c_float, c_void_p),
    "gc_gather_ple": (c_void_p, c_void_p, c_int64, c_void_p),
    "gc_ple_embed": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "gc_qkv": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "gc_attn_out": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "gc_mlp": (c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "gc_ple_gate": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "gc_layer_forward": (c_void_p,) * 7 + (c_int64, c_void_p),
    "gc_final_norm": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "gc_draft": (c_void_p, c_void_p, c_void_p, c_int64, c_int64) + (c_void_p,) * 6,
    "gc_vision_keys": (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    "gc_vision_rows": (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p),
    "gc_audio_keys": (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "gc_audio_rows": (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p),
    "gc_lm_head": (c_void_p, c_void_p, c_int64, c_int, c_float, c_void_p),
}


@cache
def entry(name: str) -> Callable[..., None]:
    """Return an entry point of the library.

    It raises CapacityError where it finds no memory for the rows on their way, and KernelError for ids, slots and row numbers
    outside of their tables, before anything is read; RankError where a rank that it waited for is gone.
    """
    library = native.load_library()
    assert library is not None, native.missing()
    function = getattr(library, name)
    function.argtypes, function.restype = _ENTRIES[name], c_int

    def call(*arguments: Any) -> None:
        _use_threads(torch.get_num_threads())
        if code := function(*arguments):
            if code == RANKS_ENDED:
                raise RankError("a rank is gone: the steps of the whole group end with it")
            if code == OUT_OF_BOUNDS:
                raise KernelError(f"{name}: a step names an id, a slot, a position or a row that is not there")
            raise CapacityError(f"no memory for the rows of a step in {name}; lower max_batched_tokens")

    return call


@lru_cache(maxsize=1)
def _use_threads(count: int) -> None:
    """Use as many threads as torch does, or as a quota allows; asked again, the library is told only of a change."""
    library = native.load_library()
    assert library is not None
    library.gc_set_threads(min(count, quota_cores() or count))


def rows_of(x: Tensor) -> Tensor:
    """Return rows as the kernels take them: float32, contiguous."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def matrix_of(part: Part) -> Matrix:
    """Describe a part for the kernels: dense as it is in memory, or packed."""
    if isinstance(part, CpuPackedWeight):
        return part.matrix()
    assert isinstance(part, Tensor)
    assert part.stride(1) == 1
    rows, columns = part.shape
    return Matrix(part.data_ptr(), rows, columns, part.stride(0) * part.itemsize, CODES[part.dtype])


def whole_matrix(weight: Weight) -> Matrix:
    """Describe a weight of one part."""
    (part,) = weight.parts
    return matrix_of(part)


def array_of(parts: Sequence[Part]) -> ctypes.Array[Matrix]:
    """Describe several parts, one after the other."""
    return (Matrix * len(parts))(*map(matrix_of, parts))


def bind_kv(layer: int, ctx: OpContext) -> KVBinding:
    """Return the binding of a layer's keys and values for ops of a precision: in float32 nothing is rounded."""
    return KVBinding(layer, exact=ctx.precision.compute == torch.float32)


class KVBinding:
    """The tensors that hold one layer's keys and values, described once for the cache that every step brings.

    The cache keeps its tensors alive, and nothing here keeps a cache alive. `exact`: queries and softmax weights stay float32
    even where rounding them to bfloat16 would be faster.
    """

    def __init__(self, layer: int, exact: bool = False) -> None:
        self.layer, self.exact = layer, exact
        self._last: tuple[Callable[[], KVCache | None], KVView] = (lambda: None), KVView()

    def view(self, cache: KVCache) -> KVView:
        """Return the description, to be kept until the call of the library returns: another thread may bring another cache.

        Raises KernelError for a compact layer.
        """
        known, found = self._last  # both at once
        if known() is not cache:
            scaled = cache.int8(self.layer)
            keys, values = cache.storage(self.layer) if scaled is None else (scaled.keys_TKE, scaled.values_TKE)
            found = KVView(k=keys.data_ptr(), v=values.data_ptr(), slots=keys.shape[0], dtype=KV_CODES[keys.dtype])
            found.exact = self.exact
            if scaled is not None:
                found.k_scale, found.v_scale = scaled.key_scales_TK.data_ptr(), scaled.value_scales_TK.data_ptr()
            self._last = weakref.ref(cache), found
        return found
