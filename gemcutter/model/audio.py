"""The audio towers: frames of sound to rows of the decoder. A page to read aloud.

Owns both kinds: the conformer of E2B and E4B, which reads log-mel frames, and the 12B's projector of raw samples. Sounds of any
lengths pass the products together, as flat rows; convolutions and attention keep to one sound each, so nothing is padded. Refuses
to know files and spectra. Shape letters: F frames, C values of a frame, T positions of 40 ms of some sounds, D hidden, H heads,
E head dim, B chunks of queries, Q queries of a chunk, W keys that a chunk reads, P distances. Read `media/audio.py` for where
frames come from, `tower_plan.py` for the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.model.tower import (
    Encode,
    Module,
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
from gemcutter.ops.reference import rms_norm
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import AudioLayer, AudioScales, matrix, vector
from gemcutter.tower_plan import CONV_STRIDE, AudioPlan, UnifiedAudioPlan

Edges = Sequence[tuple[int, int]]  # the first row of each sound and the one after its last

PASS_TOKENS = 3000  # that pass the layers together: four sounds of 30 s
SLOWEST = 1e4  # the longest wavelength of the distances' sinusoids, over that of the shortest
KEY_SCALE = math.log(1 + math.e) / math.log(2)  # as if keys had a scale of softplus(1)


class Frames(Protocol):
    """The frames of one sound, in order."""

    @property
    def values_FC(self) -> Tensor:
        """Return the frames, float32."""

    @property
    def soft_tokens(self) -> int:
        """Count the rows of the decoder that they become."""


class AudioTower:
    """An audio tower over a plan and its parameters (canonical names); `dtype` and `kernels` are the decoder's."""

    name = "audio"

    def __init__(
        self,
        plan: AudioPlan | UnifiedAudioPlan,
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
        """Build what makes rows of the decoder of some sounds' frames, over parameters that may carry deltas."""
        plan = self.plan
        encode: Encode = torch.cat if isinstance(plan, UnifiedAudioPlan) else _build_encoder(plan, params, ctx)
        projector = build_projector(plan.projector, plan.eps, params, ctx, "audio")
        return lambda sounds: projector(encode(sounds))

    def encode(self, sounds: Sequence[Frames], body: TowerBody | None = None) -> list[Tensor]:
        """Return the rows [soft_tokens, out] that each sound becomes in the decoder, float32.

        `body` is one of `bodies`; None: the tower's own. Raises NumericError for what is not finite.
        """
        encode = (body or self.bodies.of()).encode
        audible = [sound for sound in sounds if sound.soft_tokens]
        with on_device(self._ctx):
            groups = passes(audible, lambda sound: sound.soft_tokens, PASS_TOKENS)
            rows = (each for group in groups for each in self._pass(group, encode))
            silence = torch.empty(0, self.plan.out, device=self._ctx.device)
            return [next(rows) if sound.soft_tokens else silence for sound in sounds]

    def _pass(self, sounds: Sequence[Frames], encode: Encode) -> Sequence[Tensor]:
        ctx = self._ctx
        rows_TD = encode([sound.values_FC.to(ctx.device, ctx.dtype) for sound in sounds])
        return torch.split(rows_TD, [sound.soft_tokens for sound in sounds])


# ---- E2B, E4B ----


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Which rows attend to which, in chunks of queries; -1 stands for a place before or after a sound.

    `is_apart_BQW` says which keys a query does not see.
    """

    queries_BQ: Tensor
    keys_BW: Tensor
    is_apart_BQW: Tensor


def _build_encoder(plan: AudioPlan, params: Params, ctx: TowerContext) -> Encode:
    """Build the encoder: convolutions make a position of four frames, which pass the layers."""
    cut = lru_cache(maxsize=1)(partial(_cut_chunks, plan, device=ctx.device))
    layers = [_build_layer(plan, within(params, f"audio.layers.{index}."), ctx, cut) for index in range(plan.num_layers)]
    convolve, enter = _build_convolutions(plan, params, ctx), build_linear(params, "audio.in", ctx)
    last, bias = matrix(params, "audio.last"), vector(params, "audio.last.bias")

    def encode(sounds: list[Tensor]) -> Tensor:
        positions = list[Tensor]()
        for values_FC in sounds:
            with ctx.turns.turn():
                positions.append(convolve(values_FC))
        edges = tuple(pairwise(accumulate((len(each) for each in positions), initial=0)))
        x_TD = enter(torch.cat(positions))
        for layer in layers:
            x_TD = layer(x_TD, edges, ctx.turns)
        return (ctx.linear(x_TD, last).float() + bias).to(ctx.dtype)

    return encode


def _build_convolutions(plan: AudioPlan, params: Params, ctx: TowerContext) -> Module:
    """Build what makes of one sound's frames [F, C] a quarter as many positions, their values in the order bin, channel."""
    stages = [
        (vector(params, f"audio.conv.{index}").to(ctx.dtype), vector(params, f"audio.conv.{index}.norm"))
        for index in range(len(plan.conv_channels))
    ]

    def convolve(values_FC: Tensor) -> Tensor:
        x = values_FC[None, None]
        for weight, norm in stages:
            made = F.conv2d(x, weight, stride=CONV_STRIDE, padding=1).permute(0, 2, 3, 1)
            x = F.layer_norm(made.float(), norm.shape, norm, None, plan.eps).relu().to(ctx.dtype).permute(0, 3, 1, 2)
        return x[0].permute(1, 2, 0).flatten(1)

    return convolve


def _cut_chunks(plan: AudioPlan, edges: Edges, device: torch.device) -> _Chunks:
    """Cut rows of sounds into chunks of queries, and say which keys each chunk reads."""
    queries, keys = list[Tensor](), list[Tensor]()
    for start, stop in edges:
        first_B1 = torch.arange(start, stop, plan.chunk)[:, None]
        for found, reach in ((queries, range(plan.chunk)), (keys, range(-plan.past, plan.chunk + plan.future))):
            place = first_B1 + torch.tensor(reach)
            found.append(place.where((place >= start) & (place < stop), -1))
    queries_BQ, keys_BW = torch.cat(queries), torch.cat(keys)
    distance_QW = torch.arange(plan.chunk)[:, None] + plan.past - torch.arange(plan.context)
    is_near_QW = (distance_QW < plan.past) & (distance_QW > -max(plan.future, 1))
    is_apart_BQW = ~is_near_QW | (keys_BW == -1)[:, None]
    return _Chunks(queries_BQ.to(device), keys_BW.to(device), is_apart_BQW.to(device))


def _build_layer(plan: AudioPlan, params: Params, ctx: TowerContext, cut: Callable[[Edges], _Chunks]) -> AudioLayer:
    """Build one layer: half a feed-forward, attention, a convolution over time, the other half, and a norm."""
    scales = scales_of(plan, params, ctx)
    whole: AudioLayer | None = build_whole("audio_layer", plan, params, ctx, scales)
    return build_plain_layer(plan, params, ctx, scales, cut) if whole is None else whole


def scales_of(plan: AudioPlan, params: Params, ctx: TowerContext) -> AudioScales:
    """Return what a layer's queries and keys are multiplied with."""
    query_E = F.softplus(vector(params, "attn.q_scale")) * (plan.head_dim**-0.5 / math.log(2))
    relative_PD = ctx.linear(_sinusoids(plan, ctx), matrix(params, "attn.relative")).float()
    return AudioScales(query_E, KEY_SCALE, relative_PD.view(-1, plan.heads, plan.head_dim))


def build_plain_layer(
    plan: AudioPlan, params: Params, ctx: TowerContext, scales: AudioScales, cut: Callable[[Edges], _Chunks] | None = None
) -> AudioLayer:
    """Build one layer op by op, as kernels that make it at once are defined; `cut` cuts sounds into chunks."""
    cut = cut or partial(_cut_chunks, plan, device=ctx.device)
    bound = min(plan.clamp, torch.finfo(ctx.dtype).max)
    ff1, ff2 = (_build_ff(plan, within(params, f"{name}."), ctx, bound) for name in ("ff1", "ff2"))
    attention = _build_attention(plan, within(params, "attn."), ctx, scales)
    convolve = _build_time_convolution(plan, within(params, "conv."), ctx, bound)
    before, after, end = (vector(params, name) for name in ("attn.norm", "attn.post_norm", "norm"))
    eps = plan.eps

    def layer(x_TD: Tensor, edges: Edges, turns: Turns) -> Tensor:
        with turns.turn():
            return compute(x_TD, edges, cut(tuple(edges)))

    def compute(x_TD: Tensor, edges: Edges, chunks: _Chunks) -> Tensor:
        x_TD = ff1(x_TD)
        heard = attention(rms_norm(x_TD.clamp(-bound, bound), before, eps), chunks)
        x_TD = x_TD + rms_norm(heard.clamp_(-bound, bound), after, eps)
        x_TD = x_TD + convolve(x_TD, edges)
        return rms_norm(ff2(x_TD).clamp_(-bound, bound), end, eps)

    return layer


def _build_ff(plan: AudioPlan, params: Params, ctx: TowerContext, bound: float) -> Module:
    """Build a feed-forward branch, added to what it reads with the plan's weight."""
    open_, close = build_linear(params, "in", ctx), build_linear(params, "out", ctx)
    before, after = vector(params, "norm"), vector(params, "post_norm")

    def ff(x_TD: Tensor) -> Tensor:
        opened = F.silu(open_(rms_norm(x_TD.clamp(-bound, bound), before, plan.eps)), inplace=True)
        branch = rms_norm(close(opened).clamp_(-bound, bound), after, plan.eps)
        return branch.mul_(plan.residual_weight).add_(x_TD)

    return ff


def _build_attention(
    plan: AudioPlan, params: Params, ctx: TowerContext, scales: AudioScales
) -> Callable[[Tensor, _Chunks], Tensor]:
    """Build attention to the near past, whose scores have a part of the distance and are softly capped; float32 within."""
    q, k, v = (build_linear(params, "in", ctx, part) for part in ("q", "k", "v"))
    out = build_linear(params, "out", ctx)
    distances_PHE = scales.distances_PHE
    # A key in place w of a chunk's context stands w - q places after the first that query q may be told the distance of.
    place_QW = torch.arange(plan.context, device=ctx.device) - torch.arange(plan.chunk, device=ctx.device)[:, None]
    has_place_QW = (place_QW >= 0) & (place_QW < len(distances_PHE))
    place_QW = place_QW.clamp(0, len(distances_PHE) - 1)

    def attention(x_TD: Tensor, chunks: _Chunks) -> Tensor:
        q_THE, k_THE, v_THE = (module(x_TD).float().view(-1, plan.heads, plan.head_dim) for module in (q, k, v))
        q_BHQE = _gather(q_THE * scales.query_E, chunks.queries_BQ)
        k_BHWE, v_BHWE = (_gather(each, chunks.keys_BW) for each in (k_THE * scales.key, v_THE))
        far_BHQP = q_BHQE @ distances_PHE.permute(1, 2, 0)
        far_BHQW = far_BHQP.gather(-1, place_QW.expand(*far_BHQP.shape[:2], -1, -1)) * has_place_QW
        scores = plan.logit_cap * torch.tanh((q_BHQE @ k_BHWE.transpose(-1, -2) + far_BHQW) / plan.logit_cap)
        weights = scores.masked_fill(chunks.is_apart_BQW[:, None], plan.masked_logit).softmax(-1)
        found_BQD = (weights @ v_BHWE).transpose(1, 2).flatten(2)
        return out(found_BQD[chunks.queries_BQ >= 0].to(x_TD.dtype))

    return attention


def _gather(x_THE: Tensor, places_BN: Tensor) -> Tensor:
    """Return the rows in these places, zeros for -1, heads first: [B, H, N, E]."""
    return F.pad(x_THE, (0, 0, 0, 0, 0, 1))[places_BN].transpose(1, 2)


def _sinusoids(plan: AudioPlan, ctx: TowerContext) -> Tensor:
    """Return what distances are called [P, D], the largest first: half of the context down to none."""
    half = plan.hidden // 2
    waves = torch.exp(torch.arange(half) * (-math.log(SLOWEST) / max(half - 1, 1)))
    angles = torch.arange(plan.context // 2, -1, -1)[:, None] * waves
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(ctx.device, ctx.dtype)


def _build_time_convolution(
    plan: AudioPlan, params: Params, ctx: TowerContext, bound: float
) -> Callable[[Tensor, Edges], Tensor]:
    """Build the gated convolution of each channel over a position and those before it."""
    open_, close = build_linear(params, "in", ctx), build_linear(params, "out", ctx)
    before, inner = vector(params, "norm"), vector(params, "inner_norm")
    kernel = vector(params, "depthwise").to(ctx.dtype)

    def convolve(x_TD: Tensor, edges: Edges) -> Tensor:
        gated_DT = F.glu(open_(rms_norm(x_TD, before, plan.eps)), dim=-1).T
        past = plan.conv_kernel - 1
        made = [F.conv1d(F.pad(gated_DT[:, a:b], (past, 0)), kernel, groups=plan.hidden) for a, b in edges]
        mixed_TD = torch.cat(made, dim=1).T.contiguous().clamp_(-bound, bound)
        return close(F.silu(rms_norm(mixed_TD, inner, plan.eps), inplace=True))

    return convolve
