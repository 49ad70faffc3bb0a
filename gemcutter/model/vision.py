"""The vision towers: patches of images to rows of the decoder. A page to read aloud.

Owns both kinds: the encoder of E2B, E4B, 26B-A4B and 31B, whose pooled patches are projected, and the 12B's embedder of merged
patches. Images of any sizes pass the products together, as flat rows, and attend each to itself, so nothing is padded. Refuses to
know files and pixels. Shape letters: P patches of some images, C values of a patch, D hidden, H heads, E head dim, K soft tokens.
Read `media/image.py` for where patches come from, `tower_plan.py` for the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.errors import RequestError
from gemcutter.model.rope import Rope
from gemcutter.model.tower import (
    Encode,
    Params,
    TowerBodies,
    TowerBody,
    TowerContext,
    build_linear,
    build_projector,
    build_whole,
    on_device,
    open_context,
    passes,
    within,
)
from gemcutter.ops.reference import rms_norm, rope
from gemcutter.ops.step import Rotation
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import VisionLayer, VisionRows, matrix, vector
from gemcutter.plan import RopeSpec
from gemcutter.tower_plan import UnifiedVisionPlan, VisionPlan

PASS_PATCHES = 12_000  # that pass the layers together: one image of the largest budget, or four of the usual one


class Patches(Protocol):
    """The patches of one image, row by row."""

    @property
    def rows(self) -> int:
        """Count the rows of patches."""

    @property
    def columns(self) -> int:
        """Count the patches of a row."""

    def values(self) -> Tensor:
        """Return the patches [P, C], between 0 and 1."""

    def positions(self) -> Tensor:
        """Return the column and the row of every patch, [P, 2]."""


@dataclass(frozen=True, slots=True)
class Images:
    """Some images as flat rows: the values [P, C] and the positions [P, 2] of their patches, and the images themselves."""

    values_PC: Tensor
    positions_P2: Tensor
    images: Sequence[Patches]

    def edges(self) -> list[tuple[int, int]]:
        """Return the first patch of each image, and the one after its last."""
        return list(pairwise(accumulate((each.rows * each.columns for each in self.images), initial=0)))


class VisionTower:
    """A vision tower over a plan and its parameters (canonical names); `dtype` and `kernels` are the decoder's."""

    name = "vision"

    def __init__(
        self,
        plan: VisionPlan | UnifiedVisionPlan,
        params: Params,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: str = "auto",
        turns: Turns | None = None,
    ) -> None:
        self.plan, self._ctx = plan, open_context(params, dtype, device, kernels, turns)
        self.bodies = TowerBodies(params, self._ctx, self._build)
        self.nbytes = sum(param.nbytes for param in params.values())  # of weights

    def _build(self, params: Params, ctx: TowerContext) -> Encode:
        """Build what makes rows of the decoder of some images, over parameters that may carry deltas."""
        plan = self.plan
        encode: Encode
        if isinstance(plan, UnifiedVisionPlan):
            encode = _build_embedder(plan, params, ctx)
        else:
            encode = _build_encoder(plan, params, ctx)
        projector = build_projector(plan.projector, plan.eps, params, ctx, "image")
        return lambda images: projector(encode(images))

    def encode(self, images: Sequence[Patches], body: TowerBody | None = None) -> list[Tensor]:
        """Return the rows [K, out] that each image becomes in the decoder, float32.

        `body` is one of `bodies`; None: the tower's own. Raises RequestError for an image with more patches side by side than the
        position table has rows, NumericError for what is not finite.
        """
        for image in images:
            self._check(image)
        encode = (body or self.bodies.of()).encode
        with on_device(self._ctx):
            return [rows for group in passes(images, _count, PASS_PATCHES) for rows in self._pass(group, encode)]

    def _check(self, image: Patches) -> None:
        if max(image.rows, image.columns) > self.plan.positions:
            grid = f"{image.columns} x {image.rows} patches, the position table of this model has {self.plan.positions}"
            raise RequestError(f"image: {grid}; lower max_soft_tokens, or crop the image to be less narrow")

    def _pass(self, images: Sequence[Patches], encode: Encode) -> Sequence[Tensor]:
        ctx = self._ctx
        values_PC = torch.cat([image.values() for image in images]).to(ctx.device, ctx.dtype)
        positions_P2 = torch.cat([image.positions() for image in images]).to(ctx.device)
        squeeze = 1 if isinstance(self.plan, UnifiedVisionPlan) else self.plan.pool**2
        return torch.split(
            encode(Images(values_PC, positions_P2, images)), [image.rows * image.columns // squeeze for image in images]
        )


def _count(image: Patches) -> int:
    return image.rows * image.columns


# ---- E2B, E4B, 26B-A4B, 31B ----


def _build_encoder(plan: VisionPlan, params: Params, ctx: TowerContext) -> Callable[[Images], Tensor]:
    """Build the encoder: patches are embedded, pass the layers, and are pooled to soft tokens [K, D]."""
    layers = [_build_layer(plan, within(params, f"vision.layers.{index}."), ctx) for index in range(plan.num_layers)]
    patch, table = matrix(params, "vision.patch"), _table(params, ctx)
    spec = RopeSpec(plan.theta, plan.head_dim // 2, plan.head_dim // 4)
    axial = Rope(spec, ctx.device, ctx.dtype)
    pool = _build_pool(plan, params)

    def encode(images: Images) -> Tensor:
        x_P, y_P = images.positions_P2.unbind(1)
        places_PD = (table[0][x_P].float() + table[1][y_P].float()).to(ctx.dtype)
        x_PD = ctx.linear(2 * (images.values_PC - 0.5), patch) + places_PD
        rows = VisionRows((axial.tables(x_P), axial.tables(y_P)), images.edges(), ctx.turns)
        for layer in layers:
            x_PD = layer(x_PD, rows)
        return torch.cat([pool(x_PD[start:stop], image) for (start, stop), image in zip(rows.edges, images.images, strict=True)])

    return encode


def _build_layer(plan: VisionPlan, params: Params, ctx: TowerContext) -> VisionLayer:
    """Build one layer: attention of each image to itself, then the MLP, each between norms and beside the residual."""
    whole: VisionLayer | None = build_whole("vision_layer", plan, params, ctx)
    return build_plain_layer(plan, params, ctx) if whole is None else whole


def build_plain_layer(plan: VisionPlan, params: Params, ctx: TowerContext) -> VisionLayer:
    """Build one layer op by op, as kernels that make it at once are defined."""
    norms = {name: vector(params, f"{name}norm") for name in ("attn.", "attn.q_", "attn.k_", "attn.post_", "mlp.", "mlp.post_")}
    q, k, v = (build_linear(params, "attn.in", ctx, part) for part in ("q", "k", "v"))
    gate, up = (build_linear(params, "mlp.in", ctx, part) for part in ("gate", "up"))
    attn_out, mlp_out, eps = build_linear(params, "attn.out", ctx), build_linear(params, "mlp.out", ctx), plan.eps

    def layer(x_PD: Tensor, rows: VisionRows) -> Tensor:
        with rows.turns.turn():
            return compute(x_PD, rows)

    def compute(x_PD: Tensor, rows: VisionRows) -> Tensor:
        normed = rms_norm(x_PD, norms["attn."], eps)
        q_PHE = q(normed).view(-1, plan.heads, plan.head_dim)
        k_PHE, v_PHE = (module(normed).view(-1, plan.kv_heads, plan.head_dim) for module in (k, v))
        q_PHE = _rotate(rms_norm(q_PHE, norms["attn.q_"], eps), rows.rotations)
        k_PHE = _rotate(rms_norm(k_PHE, norms["attn.k_"], eps), rows.rotations)
        o_PD = _attend(q_PHE, k_PHE, rms_norm(v_PHE, None, eps), rows.edges)
        x_PD = x_PD + rms_norm(attn_out(o_PD), norms["attn.post_"], eps)
        normed = rms_norm(x_PD, norms["mlp."], eps)
        opened = F.gelu(gate(normed), approximate="tanh") * up(normed)
        return x_PD + rms_norm(mlp_out(opened), norms["mlp.post_"], eps)

    return layer


def _rotate(x_PHE: Tensor, rotations: tuple[Rotation, Rotation]) -> Tensor:
    """Rotate the first half of each head by the patch's column, the second by its row."""
    return torch.cat([rope(half, *rotation) for half, rotation in zip(x_PHE.chunk(2, dim=-1), rotations, strict=True)], dim=-1)


def _attend(q_PHE: Tensor, k_PHE: Tensor, v_PHE: Tensor, edges: Sequence[tuple[int, int]]) -> Tensor:
    """Let every patch see all patches of its image, at scale 1: [P, H * E]."""
    group = q_PHE.shape[1] // k_PHE.shape[1]
    k_PHE, v_PHE = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_PHE, v_PHE))
    found = list[Tensor]()
    for start, stop in edges:
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_PHE, k_PHE, v_PHE))
        found.append(F.scaled_dot_product_attention(q, k, v, scale=1.0)[0].transpose(0, 1).flatten(1))
    return torch.cat(found)


def _build_pool(plan: VisionPlan, params: Params) -> Callable[[Tensor, Patches], Tensor]:
    """Build what makes soft tokens of one image's patches, in float32: means of squares, times sqrt(D), standardised if asked."""
    side, hidden, root = plan.pool, plan.hidden, plan.hidden**0.5
    bias = vector(params, "vision.std_bias") if plan.standardized else None
    scale = vector(params, "vision.std_scale") if plan.standardized else None

    def pool(x_PD: Tensor, image: Patches) -> Tensor:
        squares = x_PD.float().view(image.rows // side, side, image.columns // side, side, hidden)
        soft_KD = squares.mean((1, 3)).view(-1, hidden).to(x_PD.dtype).float() * root
        if bias is not None and scale is not None:
            soft_KD = (soft_KD - bias) * scale
        found: Tensor = soft_KD.to(x_PD.dtype)
        return found

    return pool


# ---- 12B ----


def _build_embedder(plan: UnifiedVisionPlan, params: Params, ctx: TowerContext) -> Callable[[Images], Tensor]:
    """Build the embedder: a merged patch becomes a soft token by one product between LayerNorms, and is told its place."""
    patch, bias, table = matrix(params, "vision.patch"), vector(params, "vision.patch.bias"), _table(params, ctx)

    def norm(x_PX: Tensor, name: str) -> Tensor:
        weight, shift = vector(params, name), vector(params, f"{name}.bias")
        return F.layer_norm(x_PX.float(), weight.shape, weight, shift, plan.layer_norm_eps).to(x_PX.dtype)

    def encode(images: Images) -> Tensor:
        x_P, y_P = images.positions_P2.unbind(1)
        made_PD = ctx.linear(norm(images.values_PC, "vision.patch_norm"), patch).float() + bias
        places_PD = table[x_P, 0].float() + table[y_P, 1].float()
        return norm(norm(made_PD.to(ctx.dtype), "vision.norm") + places_PD.to(ctx.dtype), "vision.position_norm")

    return encode


# ---- parameters ----


def _table(params: Params, ctx: TowerContext) -> Tensor:
    """Return the position table, of three axes, where rows are computed: as it is stored, or in float32 if that is packed."""
    (table,) = matrix(params, "vision.positions").parts
    return (table if isinstance(table, Tensor) else table.dequantize()).to(ctx.device)
