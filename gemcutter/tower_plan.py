"""What the vision and audio towers of a checkpoint are: their sizes, and every tensor that they and their projectors need.

`derive_towers` turns a typed config into one plan a tower. Canonical names follow the decoder's: `vision.layers.3.attn.in` is q,
k and v, `vision.out` the projector into the decoder (`embed_vision`). Every rank of a tensor-parallel group holds towers whole.
Refuses to know tensors, files and devices: standard library only. Read `tower_config.py` for the keys behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from gemcutter.errors import ConfigError
from gemcutter.param_spec import Access, ParamKind, ParamSpec
from gemcutter.tower_config import AudioConfig, UnifiedAudioConfig, UnifiedVisionConfig, VisionConfig

if TYPE_CHECKING:
    from gemcutter.config import ModelConfig

CHANNELS = 3  # of an RGB pixel
MEL_BINS = 128  # of an audio frame; two convolutions of stride 2 leave a quarter
CONV_SIZE, CONV_STRIDE = 3, 2
LAYER_NORM_EPS = 1e-5  # of the unified embedder's LayerNorms; configs do not name it
# What a linear's input and output are clamped to. A checkpoint without them clips nothing.
BOUNDS = {"input_min": -float("inf"), "input_max": float("inf"), "output_min": -float("inf"), "output_max": float("inf")}

Parts = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """The vision encoder of E2B, E4B, 26B-A4B and 31B with its projector.

    Patches of `patch` x `patch` pixels pass `num_layers` layers; `pool` x `pool` of them become one soft token.
    """

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    patch: int
    pool: int
    positions: int  # rows of the position table, an axis
    soft_tokens: int  # of an image, at most, unless a request says otherwise
    theta: float  # of the rotary embedding; half of head_dim turns by x, the other by y
    eps: float
    clipped: bool  # linears of layers clamp their inputs and outputs
    standardized: bool  # soft tokens are shifted and scaled before they are projected
    out: int  # the decoder's hidden size

    @property
    def patch_values(self) -> int:
        """Count the values of a patch: rows, columns and colours."""
        return CHANNELS * self.patch**2

    @property
    def soft_token_pixels(self) -> int:
        """Return the side of the square that a soft token covers, in pixels."""
        return self.patch * self.pool

    def attn_parts(self) -> Parts:
        """List the rows of the in-projection of attention."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return ("q", q), ("k", kv), ("v", kv)

    @property
    def projector(self) -> ParamSpec:
        """Return the projector into the decoder (out, hidden); what it reads is normed without a weight."""
        return ParamSpec("vision.out", (self.out, self.hidden))

    def params(self) -> Iterator[ParamSpec]:
        """List every tensor under its canonical name, the projector last."""
        hidden, width = self.hidden, self.mlp_width
        yield ParamSpec("vision.patch", (hidden, self.patch_values))
        yield ParamSpec("vision.positions", (2, self.positions, hidden), access=Access.ROWS)
        for index in range(self.num_layers):
            layer = f"vision.layers.{index}."
            parts = self.attn_parts()
            yield _norm(f"{layer}attn.norm", hidden)
            yield from _linear(f"{layer}attn.in", sum(rows for _, rows in parts), hidden, self.clipped, parts)
            yield _norm(f"{layer}attn.q_norm", self.head_dim)
            yield _norm(f"{layer}attn.k_norm", self.head_dim)
            yield from _linear(f"{layer}attn.out", hidden, self.heads * self.head_dim, self.clipped)
            yield _norm(f"{layer}attn.post_norm", hidden)
            yield _norm(f"{layer}mlp.norm", hidden)
            yield from _linear(f"{layer}mlp.in", 2 * width, hidden, self.clipped, (("gate", width), ("up", width)))
            yield from _linear(f"{layer}mlp.out", hidden, width, self.clipped)
            yield _norm(f"{layer}mlp.post_norm", hidden)
        if self.standardized:
            yield ParamSpec("vision.std_bias", (hidden,), ParamKind.BIAS, buffer=True)
            yield ParamSpec("vision.std_scale", (hidden,), ParamKind.VECTOR, buffer=True)
        yield self.projector

    def num_params(self) -> int:
        """Count the parameters, the projector's included and buffers (clip bounds, standardisation) left out."""
        return _num_params(self.params())


@dataclass(frozen=True, slots=True)
class UnifiedVisionPlan:
    """The 12B's vision embedder with its projector: no layers; a soft token is one merged patch of `pool` x `pool` patches.

    Its norms are LayerNorms with a bias and `layer_norm_eps`; the norm before the projector is an RMSNorm with `eps`, no weight.
    """

    hidden: int
    patch: int
    pool: int
    positions: int  # rows of the position table, an axis
    soft_tokens: int  # of an image, at most
    eps: float
    out: int  # the decoder's hidden size
    layer_norm_eps: float = LAYER_NORM_EPS

    @property
    def num_layers(self) -> int:
        """Count the layers: none."""
        return 0

    @property
    def patch_values(self) -> int:
        """Count the values of a merged patch: rows, columns and colours."""
        return CHANNELS * self.soft_token_pixels**2

    @property
    def soft_token_pixels(self) -> int:
        """Return the side of the square that a soft token covers, in pixels."""
        return self.patch * self.pool

    @property
    def projector(self) -> ParamSpec:
        """Return the projector into the decoder (out, hidden)."""
        return ParamSpec("vision.out", (self.out, self.hidden))

    def params(self) -> Iterator[ParamSpec]:
        """List every tensor under its canonical name, the projector last."""
        yield from _layer_norm("vision.patch_norm", self.patch_values)
        yield ParamSpec("vision.patch", (self.hidden, self.patch_values))
        yield ParamSpec("vision.patch.bias", (self.hidden,), ParamKind.BIAS)
        yield from _layer_norm("vision.norm", self.hidden)
        yield ParamSpec("vision.positions", (self.positions, 2, self.hidden), access=Access.ROWS)
        yield from _layer_norm("vision.position_norm", self.hidden)
        yield self.projector

    def num_params(self) -> int:
        """Count the parameters, the projector's included."""
        return _num_params(self.params())


@dataclass(frozen=True, slots=True)
class AudioPlan:
    """The audio encoder of E2B and E4B with its projector: two convolutions, then `num_layers` conformer layers.

    A query sees itself and the `past` - 1 keys before it, and the `future` - 1 keys after it if any, in chunks of `chunk`
    queries.
    """

    num_layers: int
    hidden: int
    heads: int
    ff_width: int
    conv_channels: tuple[int, int]  # of the convolutions that make one position of four frames
    conv_kernel: int  # positions that the depthwise convolution of a layer reads
    chunk: int
    past: int
    future: int
    logit_cap: float
    masked_logit: float
    residual_weight: float  # of the feed-forward branches
    clamp: float  # of activations between modules
    eps: float
    clipped: bool  # linears of layers clamp their inputs and outputs
    width: int  # of what the encoder hands to its projector
    out: int  # the decoder's hidden size

    @property
    def head_dim(self) -> int:
        """Return the columns of an attention head."""
        return self.hidden // self.heads

    @property
    def relative_positions(self) -> int:
        """Count the distances from a query to a key, its own included."""
        return self.past + 1 + self.future

    @property
    def context(self) -> int:
        """Count the keys that the queries of one chunk read."""
        return self.chunk + self.past + self.future

    @property
    def conv_values(self) -> int:
        """Count the values that the convolutions leave of a position: frequencies and channels."""
        return MEL_BINS // CONV_STRIDE**2 * self.conv_channels[1]

    @property
    def projector(self) -> ParamSpec:
        """Return the projector into the decoder (out, width); what it reads is normed without a weight."""
        return ParamSpec("audio.out", (self.out, self.width))

    def params(self) -> Iterator[ParamSpec]:
        """List every tensor under its canonical name, the projector last."""
        hidden, channels = self.hidden, (1, *self.conv_channels)
        for index, (read, made) in enumerate(pairwise(channels)):
            yield ParamSpec(f"audio.conv.{index}", (made, read, CONV_SIZE, CONV_SIZE), ParamKind.CONV)
            yield _norm(f"audio.conv.{index}.norm", made)  # a LayerNorm without a bias
        yield ParamSpec("audio.in", (hidden, self.conv_values))
        for index in range(self.num_layers):
            yield from self._layer_params(f"audio.layers.{index}.")
        yield ParamSpec("audio.last", (self.width, hidden))
        yield ParamSpec("audio.last.bias", (self.width,), ParamKind.BIAS)
        yield self.projector

    def _layer_params(self, layer: str) -> Iterator[ParamSpec]:
        hidden, clipped = self.hidden, self.clipped
        yield from self._ff_params(f"{layer}ff1.")
        yield _norm(f"{layer}attn.norm", hidden)
        yield from _linear(f"{layer}attn.in", 3 * hidden, hidden, clipped, (("q", hidden), ("k", hidden), ("v", hidden)))
        yield ParamSpec(f"{layer}attn.q_scale", (self.head_dim,), ParamKind.VECTOR)
        yield ParamSpec(f"{layer}attn.relative", (hidden, hidden))
        yield from _linear(f"{layer}attn.out", hidden, hidden, clipped)
        yield _norm(f"{layer}attn.post_norm", hidden)
        yield _norm(f"{layer}conv.norm", hidden)
        yield from _linear(f"{layer}conv.in", 2 * hidden, hidden, clipped)
        yield ParamSpec(f"{layer}conv.depthwise", (hidden, 1, self.conv_kernel), ParamKind.CONV)
        yield _norm(f"{layer}conv.inner_norm", hidden)
        yield from _linear(f"{layer}conv.out", hidden, hidden, clipped)
        yield from self._ff_params(f"{layer}ff2.")
        yield _norm(f"{layer}norm", hidden)

    def _ff_params(self, prefix: str) -> Iterator[ParamSpec]:
        yield _norm(f"{prefix}norm", self.hidden)
        yield from _linear(f"{prefix}in", self.ff_width, self.hidden, self.clipped)
        yield from _linear(f"{prefix}out", self.hidden, self.ff_width, self.clipped)
        yield _norm(f"{prefix}post_norm", self.hidden)

    def num_params(self) -> int:
        """Count the parameters, the projector's included and buffers (clip bounds) left out."""
        return _num_params(self.params())


@dataclass(frozen=True, slots=True)
class UnifiedAudioPlan:
    """The 12B's audio embedder: a projector of raw frames of `hidden` samples, one a soft token, normed without a weight."""

    hidden: int
    eps: float
    out: int  # the decoder's hidden size

    @property
    def num_layers(self) -> int:
        """Count the layers: none."""
        return 0

    @property
    def projector(self) -> ParamSpec:
        """Return the projector into the decoder (out, hidden)."""
        return ParamSpec("audio.out", (self.out, self.hidden))

    def params(self) -> Iterator[ParamSpec]:
        """List every tensor under its canonical name: the projector."""
        yield self.projector

    def num_params(self) -> int:
        """Count the projector's parameters."""
        return _num_params(self.params())


TowerPlan = VisionPlan | UnifiedVisionPlan | AudioPlan | UnifiedAudioPlan


@dataclass(frozen=True, slots=True)
class TowerPlans:
    """All towers of a model; None for one that it does not have."""

    vision: VisionPlan | UnifiedVisionPlan | None = None
    audio: AudioPlan | UnifiedAudioPlan | None = None

    def params(self) -> Iterator[ParamSpec]:
        """List every tensor of the towers under its canonical name."""
        for plan in (self.vision, self.audio):
            if plan is not None:
                yield from plan.params()

    def num_params(self) -> int:
        """Count the parameters of the towers and their projectors, buffers left out."""
        return _num_params(self.params())


def _norm(name: str, size: int) -> ParamSpec:
    return ParamSpec(name, (size,), ParamKind.NORM)


def _layer_norm(name: str, size: int) -> Iterator[ParamSpec]:
    yield _norm(name, size)
    yield ParamSpec(f"{name}.bias", (size,), ParamKind.BIAS)


def _linear(name: str, rows: int, columns: int, clipped: bool, parts: Parts = ()) -> Iterator[ParamSpec]:
    """List a linear of a layer and its clip bounds: scalars of its own for each part, whose outputs clip differently."""
    yield ParamSpec(name, (rows, columns), parts=parts)
    for part in [f".{part}" for part, _ in parts] or [""] if clipped else ():
        for bound, default in BOUNDS.items():
            yield ParamSpec(f"{name}{part}.{bound}", (), ParamKind.SCALAR, default=default, buffer=True)


def _num_params(params: Iterator[ParamSpec]) -> int:
    return sum(spec.elements for spec in params if not spec.buffer)


def derive_towers(config: ModelConfig) -> TowerPlans:
    """Return the plans of all towers that a config names. Raises ConfigError with the problems of both towers' keys."""
    found, errors = TowerPlans(), list[ConfigError]()
    try:
        found = TowerPlans(vision=derive_vision(config))
    except ConfigError as error:
        errors.append(error)
    try:
        found = TowerPlans(found.vision, derive_audio(config))
    except ConfigError as error:
        errors.append(error)
    if len(errors) > 1:
        raise ConfigError("; ".join(error.summary for error in errors), [text for error in errors for text in error.problems])
    if errors:
        raise errors[0]
    return found


def derive_vision(config: ModelConfig) -> VisionPlan | UnifiedVisionPlan | None:
    """Return the plan of the vision tower, None without one. Raises ConfigError for bad keys of `vision_config`."""
    return None if (found := config.vision) is None else plan_vision(found, config.text.hidden_size)


def plan_vision(config: VisionConfig | UnifiedVisionConfig, out: int) -> VisionPlan | UnifiedVisionPlan:
    """Return the plan of a vision tower that makes rows of `out` columns."""
    match config:
        case VisionConfig() as vision:
            return VisionPlan(
                num_layers=vision.num_hidden_layers,
                hidden=vision.hidden_size,
                heads=vision.num_attention_heads,
                kv_heads=vision.num_key_value_heads,
                head_dim=vision.head_dim,
                mlp_width=vision.intermediate_size,
                patch=vision.patch_size,
                pool=vision.pooling_kernel_size,
                positions=vision.position_embedding_size,
                soft_tokens=vision.default_output_length,
                theta=vision.rope_theta,
                eps=vision.rms_norm_eps,
                clipped=vision.use_clipped_linears,
                standardized=vision.standardize,
                out=out,
            )
        case UnifiedVisionConfig() as unified:
            return UnifiedVisionPlan(
                hidden=unified.mm_embed_dim,
                patch=unified.patch_size,
                pool=unified.pooling_kernel_size,
                positions=unified.mm_posemb_size,
                soft_tokens=unified.num_soft_tokens,
                eps=unified.rms_norm_eps,
                out=out,
            )


def derive_audio(config: ModelConfig) -> AudioPlan | UnifiedAudioPlan | None:
    """Return the plan of the audio tower, None without one. Raises ConfigError for bad keys of `audio_config`."""
    return None if (found := config.audio) is None else plan_audio(found, config.text.hidden_size)


def plan_audio(config: AudioConfig | UnifiedAudioConfig, out: int) -> AudioPlan | UnifiedAudioPlan:
    """Return the plan of an audio tower that makes rows of `out` columns."""
    match config:
        case AudioConfig() as audio:
            return AudioPlan(
                num_layers=audio.num_hidden_layers,
                hidden=audio.hidden_size,
                heads=audio.num_attention_heads,
                ff_width=4 * audio.hidden_size,
                conv_channels=audio.subsampling_conv_channels,
                conv_kernel=audio.conv_kernel_size,
                chunk=audio.attention_chunk_size,
                past=audio.attention_context_left - 1,
                future=audio.attention_context_right,
                logit_cap=audio.attention_logit_cap,
                masked_logit=audio.attention_invalid_logits_value,
                residual_weight=audio.residual_weight,
                clamp=audio.gradient_clipping,
                eps=audio.rms_norm_eps,
                clipped=audio.use_clipped_linears,
                width=audio.output_proj_dims,
                out=out,
            )
        case UnifiedAudioConfig() as unified:
            return UnifiedAudioPlan(unified.audio_embed_dim, unified.rms_norm_eps, out)
