"""A layer of a vision encoder on the native CPU kernels, in pieces of some rows.

Owns a layer as one `gc_vision_layer` that is filled once; refuses arithmetic. Read `csrc/cpu/vision.cpp` for the other side,
`model/vision.py` for the definition.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from gemcutter import native
from gemcutter.errors import KernelError
from gemcutter.native import VisionLayerView
from gemcutter.ops.cpu.bindings import ACTIVATIONS, entry, rows_of
from gemcutter.ops.cpu.tower_ops import Pieces, Products
from gemcutter.ops.types import Param, VisionLayer, VisionRows, vector
from gemcutter.tower_plan import VisionPlan

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
    products = Products(params, PRODUCTS)
    view = VisionLayerView(
        **products.fields(),
        **{name: norm.data_ptr() for name, norm in norms.items()},
        hidden=plan.hidden,
        heads=plan.heads,
        kv_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        mlp_width=plan.mlp_width,
        eps=plan.eps,
        is_clipped=products.is_clipped,
        activations=ACTIVATIONS[activations],
    )
    alive = (norms, products)
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
