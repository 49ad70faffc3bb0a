"""A layer of an audio encoder on the native CPU kernels, in pieces of some rows.

Owns a layer as one `gc_audio_layer` that is filled once; refuses arithmetic. Read `csrc/cpu/audio.cpp` for the other side,
`model/audio.py` for the definition.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemcutter.errors import KernelError
from gemcutter.native import AudioLayerView
from gemcutter.ops.cpu.bindings import ACTIVATIONS, entry, rows_of
from gemcutter.ops.cpu.tower_ops import Pieces, Products
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import AudioLayer, AudioScales, Param, vector
from gemcutter.tower_plan import AudioPlan

PRODUCTS: dict[str, tuple[str, str | None]] = {  # by the struct's names: matrix and part
    **{f"{ff}_{side}": (f"{ff}.{side}", None) for ff in ("ff1", "ff2") for side in ("in", "out")},
    **{each: ("attn.in", each) for each in ("q", "k", "v")},
    "attn_out": ("attn.out", None),
    "conv_in": ("conv.in", None),
    "conv_out": ("conv.out", None),
}
STATE_ROWS = 5  # of hidden columns that a layer keeps of each position between its halves
VANISHES = 110.0  # a weight whose logit is lower by so much is 0 in float32


def build_audio_layer(plan: AudioPlan, params: Mapping[str, Param], activations: str, scales: AudioScales) -> AudioLayer | None:
    """Build one layer over its parameters, by name within the layer; `activations` is how matmuls take rows.

    Returns None where positions that are not to be seen would have a weight.
    """
    if not -plan.logit_cap - plan.masked_logit > VANISHES:
        return None
    norms = {name: vector(params, name.replace("_", ".", 1)) for name in AudioLayerView.NORMS}
    for name in ("ff1_post_norm", "ff2_post_norm"):
        norms[name] = norms[name] * plan.residual_weight
    vectors = {name: rows_of(each) for name, each in norms.items()}
    vectors["q_scale"], vectors["distances"] = rows_of(scales.query_E), rows_of(scales.distances_PHE)
    vectors["depthwise"] = rows_of(vector(params, "conv.depthwise")[:, 0].T)
    products = Products(params, PRODUCTS)
    view = AudioLayerView(
        **products.fields(),
        **{name: each.data_ptr() for name, each in vectors.items()},
        hidden=plan.hidden,
        heads=plan.heads,
        head_dim=plan.head_dim,
        ff_width=plan.ff_width,
        taps=plan.conv_kernel,
        past=plan.past - 1,
        future=max(plan.future - 1, 0),
        num_distances=len(scales.distances_PHE),
        key_scale=scales.key,
        logit_cap=plan.logit_cap,
        clamp=min(plan.clamp, torch.finfo(torch.float32).max),
        eps=plan.eps,
        is_clipped=products.is_clipped,
        activations=ACTIVATIONS[activations],
    )
    alive = (vectors, products)
    keys, rest = Pieces(entry("gc_audio_keys")), Pieces(entry("gc_audio_rows"))

    def layer(x_TD: Tensor, edges: Sequence[tuple[int, int]], turns: Turns) -> Tensor:
        assert alive
        x_TD, address, rows = rows_of(x_TD), ctypes.addressof(view), len(x_TD)
        starts = [0, *(stop for _, stop in edges)]
        if starts[-1] != rows or starts != sorted(starts):
            raise KernelError("gc_audio_keys: sounds do not make up the positions")
        starts_S = torch.tensor(starts, dtype=torch.long)
        state, out_TD = torch.empty(STATE_ROWS, *x_TD.shape), torch.empty_like(x_TD)
        sounds = (rows, starts_S.data_ptr(), len(edges))
        keys.run(rows, turns, (address, x_TD.data_ptr(), *sounds), (state.data_ptr(),))
        rest.run(rows, turns, (address, *sounds), (state.data_ptr(), out_TD.data_ptr()))
        return out_TD

    return layer
