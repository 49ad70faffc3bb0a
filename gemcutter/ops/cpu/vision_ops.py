"""A layer of a vision encoder on the native CPU kernels, in pieces of some rows.

Owns a layer as one `gc_vision_layer` that is filled once; refuses arithmetic. Read `csrc/cpu/vision.cpp` for the other side,
`model/vision.py` for the definition.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from gemcutter import native
from gemcutter.errors import KernelError
from gemcutter.native import ClipView, VisionLayerView
from gemcutter.ops.cpu.bindings import ACTIVATIONS, entry, matrix_of, rows_of
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import Param, VisionLayer, VisionRows, matrix, vector
from gemcutter.tower_plan import BOUNDS, VisionPlan

PIECE_SECONDS = 0.03  # that others wait for a piece of an image, at most by intention
UNIT_ROWS, FIRST_ROWS, MOST_ROWS = 64, 256, 1 << 16  # of a piece: a multiple, the first guess, a bound
PRODUCTS = {  # by the struct's names: matrix and part
    "q": ("attn.in", "q"),
    "k": ("attn.in", "k"),
    "v": ("attn.in", "v"),
    "out": ("attn.out", None),
    "gate": ("mlp.in", "gate"),
    "up": ("mlp.in", "up"),
    "down": ("mlp.out", None),
}
NORMS = ("attn_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")


def build_vision_layer(plan: VisionPlan, params: Mapping[str, Param], activations: str) -> VisionLayer:
    """Build one layer over its parameters, by name within the layer; `activations` is how matmuls take rows."""
    norms = {name: rows_of(vector(params, _norm_name(name))) for name in NORMS}
    parts, clips = dict[str, object](), dict[str, ClipView]()
    for own, (name, part) in PRODUCTS.items():
        weight = matrix(params, name) if part is None else matrix(params, name).part(part)
        (parts[own],) = weight.parts
        prefix = name if part is None else f"{name}.{part}"
        given = [params.get(f"{prefix}.{bound}") for bound in BOUNDS]
        clips[f"{own}_clip"] = ClipView(*(float(each) for each in given if isinstance(each, Tensor)))
    is_clipped = f"attn.in.q.{next(iter(BOUNDS))}" in params
    view = VisionLayerView(
        **{own: matrix_of(part) for own, part in parts.items()},  # type: ignore[arg-type]
        **(clips if is_clipped else {}),
        **{name: norm.data_ptr() for name, norm in norms.items()},
        hidden=plan.hidden,
        heads=plan.heads,
        kv_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        mlp_width=plan.mlp_width,
        eps=plan.eps,
        is_clipped=is_clipped,
        activations=ACTIVATIONS[activations],
    )
    alive = (norms, parts)
    keys, rest = Pieces(entry("gc_vision_keys")), Pieces(entry("gc_vision_rows"))

    def layer(x_PD: Tensor, rows: VisionRows) -> Tensor:
        assert alive
        x_PD, address = rows_of(x_PD), ctypes.addressof(view)
        starts, (cos, sin) = rows.starts, rows.angles
        images = (address, x_PD.data_ptr(), len(x_PD), starts.data_ptr(), len(rows.edges))
        if (floats := state_size(address, len(x_PD), starts.data_ptr(), len(rows.edges))) < 0:
            raise KernelError("gc_vision_state: images do not make up the patches")
        state, out_PD = rows.scratch(floats), torch.empty_like(x_PD)
        keys.run(len(x_PD), rows.turns, images, (cos.data_ptr(), sin.data_ptr(), state.data_ptr()))
        rest.run(len(x_PD), rows.turns, images, (state.data_ptr(), out_PD.data_ptr()))
        return out_PD

    return layer


class Pieces:
    """One half of a layer, computed some rows at a time: as many as take about PIECE_SECONDS, by what earlier ones took.

    How rows are cut does not change a bit of them: a piece has more than the 16 rows for which sums are ordered otherwise.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call, self._rows = call, FIRST_ROWS

    def run(self, rows: int, turns: Turns, images: tuple[int, ...], more: tuple[int, ...]) -> None:
        """Compute all rows, a turn a piece; `images` and `more` are the arguments before and behind a piece's edges."""
        first = 0
        while first < rows:
            last = first + self._rows if rows - first >= 2 * self._rows else rows
            with turns.turn():
                start = time.perf_counter()
                self._call(*images, first, last, *more)
                seconds = time.perf_counter() - start
            fit = int((last - first) * PIECE_SECONDS / max(seconds, 1e-6)) // UNIT_ROWS * UNIT_ROWS
            self._rows, first = min(max(fit, UNIT_ROWS, self._rows // 2), 2 * self._rows, MOST_ROWS), last


@cache
def _state_function() -> Callable[..., int]:
    library = native.load_library()
    assert library is not None, native.missing()
    function = library.gc_vision_state
    function.argtypes, function.restype = (c_void_p, c_int64, c_void_p, c_int64), c_int64
    found: Callable[..., int] = function
    return found


def state_size(*arguments: int) -> int:
    """Return how many floats a layer keeps between its halves; -1 where the images do not make up the patches."""
    return _state_function()(*arguments)


def _norm_name(own: str) -> str:
    """Return a norm's name within its layer: "attn.q_norm" for "q_norm", "mlp.post_norm" for "mlp_post_norm"."""
    return f"attn.{own}" if own in ("q_norm", "k_norm") else own.replace("_", ".", 1)
