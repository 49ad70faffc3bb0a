"""Which tensors one layer has: what its plan says that it owns, and nothing else.

Owns their names, shapes and cuts among tensor-parallel ranks; refuses to decide what a layer owns, which `plan.py` does. Standard
library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gemcutter.param_spec import ParamKind, ParamSpec

if TYPE_CHECKING:
    from gemcutter.plan import LayerPlan


def layer_params(layer: LayerPlan, hidden: int) -> Iterator[ParamSpec]:
    """List every tensor of a layer under its canonical name, in a model of so many columns a row."""
    prefix = f"layers.{layer.index}."
    parts, width, moe = layer.attn_parts(), layer.mlp_width, layer.moe

    def norm(name: str, size: int, scale: float = 1.0) -> ParamSpec:
        return ParamSpec(prefix + name, (size,), ParamKind.NORM, scale=scale)

    def spec(name: str, *shape: int, kind: ParamKind = ParamKind.MATRIX, axis: int | None = None, **more: Any) -> ParamSpec:
        return ParamSpec(prefix + name, shape, kind, shard_axis=axis, **more)

    yield norm("attn.norm", hidden)
    yield spec("attn.in", sum(rows for _, rows in parts), hidden, parts=parts, axis=-2, shard_unit=layer.head_dim)
    yield norm("attn.q_norm", layer.head_dim, layer.q_scale)
    if layer.writes:
        yield norm("attn.k_norm", layer.head_dim)
    yield spec("attn.out", hidden, layer.heads * layer.head_dim, axis=-1, shard_unit=layer.head_dim)
    yield norm("attn.post_norm", hidden)
    yield norm("mlp.norm", hidden)
    cut: dict[str, Any] = {"shard_unit": layer.mlp_unit, "is_even": False}
    yield spec("mlp.in", 2 * width, hidden, parts=(("gate", width), ("up", width)), axis=-2, **cut)
    yield spec("mlp.out", hidden, width, axis=-1, **cut)
    yield norm("mlp.post_norm", hidden)
    if moe:
        experts, vector = ParamKind.EXPERTS, ParamKind.VECTOR
        yield norm("mlp.branch_norm", hidden)
        yield norm("moe.norm", hidden)
        yield norm("moe.branch_norm", hidden)
        yield spec("moe.router", moe.experts, hidden)
        yield spec("moe.router_scale", hidden, kind=vector)
        yield spec("moe.expert_scale", moe.experts, kind=vector)
        halves = (("gate", moe.width), ("up", moe.width))
        yield spec("moe.in", moe.experts, 2 * moe.width, hidden, parts=halves, kind=experts, axis=-3)
        yield spec("moe.out", moe.experts, hidden, moe.width, kind=experts, axis=-3)
    if layer.ple_dim:
        yield spec("ple.gate", layer.ple_dim, hidden)
        yield spec("ple.out", hidden, layer.ple_dim)
        yield norm("ple.post_norm", hidden)
    yield spec("scale", 1, kind=ParamKind.SCALAR, default=1.0, buffer=True)
