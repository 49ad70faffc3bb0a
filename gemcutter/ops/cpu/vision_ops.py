"""A layer of a vision encoder on the native CPU kernels, in one call of the library.

Owns a layer as one `gc_vision_layer` that is filled once; refuses arithmetic. Read `csrc/cpu/vision.cpp` for the other side,
`model/vision.py` for the definition.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemcutter.native import ClipView, VisionLayerView
from gemcutter.ops.cpu.bindings import ACTIVATIONS, entry, matrix_of, rows_of
from gemcutter.ops.step import Rotation
from gemcutter.ops.types import Param, VisionLayer, matrix, vector
from gemcutter.tower_plan import BOUNDS, VisionPlan

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
    alive, call = (norms, parts), entry("gc_vision_layer_forward")

    def layer(x_PD: Tensor, rotations: tuple[Rotation, Rotation], edges: Sequence[tuple[int, int]]) -> Tensor:
        assert alive
        x_PD = rows_of(x_PD)
        starts = torch.tensor([0, *(stop for _, stop in edges)], dtype=torch.long)
        cos, sin = (torch.cat([rotation[each] for rotation in rotations], dim=-1).float().contiguous() for each in (0, 1))
        out_PD = torch.empty_like(x_PD)
        call(
            ctypes.addressof(view),
            x_PD.data_ptr(),
            len(x_PD),
            starts.data_ptr(),
            len(edges),
            cos.data_ptr(),
            sin.data_ptr(),
            out_PD.data_ptr(),
        )
        return out_PD

    return layer


def _norm_name(own: str) -> str:
    """Return a norm's name within its layer: "attn.q_norm" for "q_norm", "mlp.post_norm" for "mlp_post_norm"."""
    return f"attn.{own}" if own in ("q_norm", "k_norm") else own.replace("_", ".", 1)
