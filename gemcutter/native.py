"""The native CPU library: where it is, whether it can be used, and its plain C interface.

Owns loading and the ctypes structs of the C interface (csrc/cpu/api.h); refuses to know torch, plans and weights. Everything
works without the library, only slower; `missing()` says why it is not there. Read `ops/cpu/bindings.py` for who calls it.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_float, c_int8, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import gemcutter
from gemcutter.errors import KernelError

FILE = "_cpu.so"
VERSION = 11  # of the interface, gc_version()
OFF = ("off", "0", "no", "false")  # what GEMCUTTER_NATIVE may say to do without the library
LEVELS = ("portable", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx", "neon", "neon_i8mm")


class Matrix(ctypes.Structure):
    """`gc_matrix`: a packed or dense matrix in memory."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("stride", c_int64),
        ("codes", c_int32),
        ("scales", c_int32),
        ("group", c_int32),
        ("has_bias", c_int32),
        ("offset", c_int32),
        ("exponent", c_int32),
        ("levels", c_int8 * 16),
        ("num_deltas", c_int32),
        ("reserved", c_int32),
        ("deltas", c_void_p),
        ("order", c_void_p),
    )


class DeltaView(ctypes.Structure):
    """`gc_delta`: what an adapter adds to some rows of a matrix, for the rows of a step that ask for it."""

    _fields_ = (
        ("down", Matrix),
        ("up", c_void_p),
        ("start", c_int64),
        ("rows", c_int64),
        ("up_codes", c_int32),
        ("adapter", c_int32),
    )


class StepView(ctypes.Structure):
    """`gc_step`: the flat rows of one step, and where one layer group's keys are in the KV cache."""

    _fields_ = (
        ("rows", c_int64),
        ("sequences", c_int64),
        ("query_start", c_void_p),
        ("positions", c_void_p),
        ("kv_start", c_void_p),
        ("kv_first_slot", c_void_p),
        ("kv_slots", c_void_p),
        ("kv_length", c_void_p),
        ("slot_mapping", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("last_visible", c_void_p),
        ("adapters", c_void_p),
        ("checked_slots", c_int64),  # written by the library
    )


class KVView(ctypes.Structure):
    """`gc_kv`: the tensors of the cache that hold one layer's keys and values."""

    _fields_ = (
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
        ("slots", c_int64),
        ("dtype", c_int32),
        ("exact", c_int32),
    )


class AttentionView(ctypes.Structure):
    """`gc_attention`: the shape of one layer's attention."""

    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
    )


class RanksView(ctypes.Structure):
    """`gc_ranks`: this process as one of several tensor-parallel ranks that share memory, or sum by other means."""

    _fields_ = (
        ("sum", c_void_p),
        ("segment", c_void_p),
        ("slot", c_int64),
        ("rank", c_int32),
        ("world", c_int32),
        ("step", c_uint32),
        ("has_ended", c_int32),
    )


class ExpertsView(ctypes.Structure):
    """`gc_experts`: the matrices and scales of a mixture of experts."""

    _fields_ = (
        ("experts", c_int64),
        ("top_k", c_int64),
        ("width", c_int64),
        ("first", c_int64),
        ("held", c_int64),
        ("router", Matrix),
        ("gate", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("router_scale", c_void_p),
        ("expert_scale", c_void_p),
        ("norm", c_void_p),
        ("dense_branch_norm", c_void_p),
        ("expert_branch_norm", c_void_p),
    )


class LayerView(ctypes.Structure):
    """`gc_layer`: one layer's sizes, matrices and norms; a matrix that it lacks has 0 rows, a norm that it lacks is null."""

    _fields_ = (
        ("attention", AttentionView),
        ("hidden", c_int64),
        ("ple_dim", c_int64),
        ("attn_in", Matrix * 3),
        *((name, Matrix) for name in ("attn_out", "gate", "up", "down", "ple_gate", "ple_out")),
        *((name, c_void_p) for name in ("attn_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")),
        ("ple_post_norm", c_void_p),
        ("experts", c_void_p),
        ("ranks", c_void_p),
        ("eps", c_float),
        ("mlp_scale", c_float),
        ("ple_scale", c_float),
        ("has_v_norm", c_int32),
        ("activations", c_int32),
        ("reserved", c_int32),
    )


class PleView(ctypes.Structure):
    """`gc_ple`: the per-layer embeddings of a range of layers."""

    _fields_ = (
        ("projection", Matrix),
        ("table", Matrix),
        ("source", c_void_p),
        ("norm", c_void_p),
        ("dim", c_int64),
        ("vocab", c_int64),
        ("eps", c_float),
        ("token_scale", c_float),
        ("context_scale", c_float),
        ("activations", c_int32),
    )


class DrafterView(ctypes.Structure):
    """`gc_drafter`: an assistant with its target's token table."""

    _fields_ = (
        *((name, Matrix) for name in ("embed", "into", "out", "centroids", "head")),
        ("layers", c_void_p),
        ("norm", c_void_p),
        ("order", c_void_p),
        *((name, c_int64) for name in ("num_layers", "hidden", "target_hidden", "top_k")),
        *((name, c_float) for name in ("embed_scale", "eps", "softcap")),
        ("activations", c_int32),
    )


class ClipView(ctypes.Structure):
    """`gc_clip`: how far the values that go into a product and come out of it reach."""

    _fields_ = tuple((name, c_float) for name in ("input_min", "input_max", "output_min", "output_max"))


class VisionLayerView(ctypes.Structure):
    """`gc_vision_layer`: one layer of a vision encoder."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((f"{name}_clip", ClipView) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("attn_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")),
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "mlp_width")),
        ("eps", c_float),
        ("is_clipped", c_int32),
        ("activations", c_int32),
        ("reserved", c_int32),
    )


class AudioLayerView(ctypes.Structure):
    """`gc_audio_layer`: one layer of an audio encoder."""

    PRODUCTS = ("ff1_in", "ff1_out", "q", "k", "v", "attn_out", "conv_in", "conv_out", "ff2_in", "ff2_out")
    NORMS = (
        *("ff1_norm", "ff1_post_norm", "attn_norm", "attn_post_norm"),
        *("conv_norm", "conv_inner_norm", "ff2_norm", "ff2_post_norm", "norm"),
    )
    _fields_ = (
        *((name, Matrix) for name in PRODUCTS),
        *((f"{name}_clip", ClipView) for name in PRODUCTS),
        *((name, c_void_p) for name in (*NORMS, "q_scale", "distances", "depthwise")),
        *((name, c_int64) for name in ("hidden", "heads", "head_dim", "ff_width", "taps", "past", "future", "num_distances")),
        *((name, c_float) for name in ("key_scale", "logit_cap", "clamp", "eps")),
        ("is_clipped", c_int32),
        ("activations", c_int32),
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """Load the library once; None where there is none. Raises KernelError for a bad value of an environment variable."""
    found = _open()
    return found if isinstance(found, ctypes.CDLL) else None


def missing() -> str | None:
    """Return why there is no library; None if there is one."""
    found = _open()
    return found if isinstance(found, str) else None


@cache
def _open() -> ctypes.CDLL | str:
    asked = os.environ.get("GEMCUTTER_NATIVE")
    if asked is not None and asked.lower() in OFF:
        return f"switched off by GEMCUTTER_NATIVE={asked}"
    path = Path(asked) if asked else _find()
    if path is None:
        return "the CPU kernels were not built: install a C++ compiler, then install gemcutter again"
    found = _load(path)
    if isinstance(found, str):
        if asked:
            raise KernelError(f"GEMCUTTER_NATIVE: {found}; give off, or the path of a library")
        return found
    level = os.environ.get("GEMCUTTER_LEVEL")
    if level:
        _set_level(found, level.lower(), f"GEMCUTTER_LEVEL={level}")
    return found


def _find() -> Path | None:
    """Return the library next to this file, or else where an editable installation builds it."""
    places = dict.fromkeys((Path(__file__).parent, *map(Path, gemcutter.__path__)))
    return next((place / FILE for place in places if (place / FILE).exists()), None)


def _load(path: Path) -> ctypes.CDLL | str:
    try:
        found = ctypes.CDLL(str(path))
        version = found.gc_version()
    except (OSError, AttributeError) as error:
        return f"{path} can't be used: {error}"
    if version != VERSION:
        return f"{path} has interface {version}, {VERSION} expected: install gemcutter again, or `make native`"
    found.gc_level.restype = ctypes.c_char_p
    return found


def _set_level(found: ctypes.CDLL, level: str | None, origin: str | None = None) -> None:
    answer = found.gc_set_level(level.encode() if level else None)
    if answer:
        why = "this processor lacks its instructions" if answer == 1 else f"expected one of {', '.join(LEVELS)}"
        raise KernelError(f"{origin or f'kernel level {level!r}'}: {why}")


def set_level(level: str | None) -> None:
    """Use the kernels of one processor level (None: the best). Raises KernelError if it is unknown or unsupported."""
    found = load_library()
    if found is None:
        raise KernelError(f"kernel level {level!r}: {missing()}")
    _set_level(found, level)


def level() -> str | None:
    """Return the processor level in use; None without the library."""
    found = load_library()
    return None if found is None else found.gc_level().decode()
