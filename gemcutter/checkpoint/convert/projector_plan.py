"""Decides what becomes of a model's towers in a projector, llama.cpp's file of towers beside a text model.

Owns the layout of every tensor in such a file, its metadata, and the check that what was written reads back as the same towers.
Source: llama.cpp's converter, whose files these equal. Refuses to know bytes (`tensor_writers.py`) and decoders
(`conversion_plan.py`). Read `formats/gguf_towers.py` for the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import StoredTensor
from gemcutter.checkpoint.convert.conversion_plan import MODEL_DTYPES, ConvertOptions, Listing
from gemcutter.checkpoint.convert.tensor_writers import Output, arranged, stored
from gemcutter.checkpoint.formats import gguf_towers
from gemcutter.checkpoint.formats.gguf_metadata import FILE_TYPES, UNKNOWN_TYPE, Entry
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.checkpoint.load.match_towers import find_tower_files, match_audio, match_vision
from gemcutter.checkpoint.load.row_chunks import dense_dtype, whole
from gemcutter.errors import CheckpointError
from gemcutter.param_spec import ParamKind, ParamSpec
from gemcutter.tower_plan import (
    CHANNELS,
    MEL_BINS,
    AudioPlan,
    TowerPlan,
    UnifiedAudioPlan,
    UnifiedVisionPlan,
    VisionPlan,
    plan_audio,
    plan_vision,
)

IMAGE_SIZE = 224  # a key that readers ask for and do not use
KEPT_WIDE = ("vision.positions", "audio.in")  # which llama.cpp's converter writes in float32 whatever is asked for
BLOCK = 32  # values of a Q8_0 block, of which rows of quantized matrices are made


@dataclass(frozen=True, slots=True)
class Towers:
    """The towers of a checkpoint, of which it may have one or both, and the stored tensors of each parameter."""

    vision: VisionPlan | UnifiedVisionPlan | None
    audio: AudioPlan | UnifiedAudioPlan | None
    pieces: dict[str, tuple[StoredTensor, ...]]

    def plans(self) -> Iterator[TowerPlan]:
        """Yield the plans of those that are there."""
        yield from (plan for plan in (self.vision, self.audio) if plan is not None)


def find_towers(checkpoint: Checkpoint, ignore: Sequence[str] = ()) -> Towers:
    """Match the towers that a checkpoint holds. Raises CheckpointError where it holds none, or they do not fit their plans."""
    kinds, pieces = checkpoint.matched.other_modules, dict[str, tuple[StoredTensor, ...]]()
    vision, audio, files = None, None, find_tower_files(checkpoint)
    if "vision tower" in kinds:
        vision, matched = match_vision(files, ignore)
        pieces |= matched.pieces
    if "audio tower" in kinds:
        audio, heard = match_audio(files, ignore)
        pieces |= heard.pieces
    if vision is None and audio is None:
        raise CheckpointError(f"{checkpoint.source.path} holds no towers, of which a projector is made; use the original release")
    return Towers(vision, audio, pieces)


def list_outputs(checkpoint: Checkpoint, options: ConvertOptions, towers: Towers) -> Listing:
    """Decide what becomes of every tensor of the towers."""
    model_dtype = MODEL_DTYPES.get(checkpoint.config.dtype.removeprefix("torch.").lower(), "BF16")
    outputs = [
        _output(plan, spec, piece, options, model_dtype)
        for plan in towers.plans()
        for spec in plan.params()
        for piece in towers.pieces[spec.name]
    ]
    return Listing(outputs)


def metadata(checkpoint: Checkpoint, towers: Towers, usual_type: str) -> list[Entry]:
    """Return what the towers are; `usual_type` is how most of the file's bytes are stored."""
    found: list[Entry] = [
        ("general.architecture", "str", gguf_towers.PROJECTOR),
        ("general.type", "str", "mmproj"),
        ("general.name", "str", checkpoint.source.path.resolve().stem),
        ("general.file_type", "u32", FILE_TYPES.get(usual_type, UNKNOWN_TYPE)),
        ("general.quantization_version", "u32", 2),
    ]
    if (vision := towers.vision) is not None:
        is_encoder = isinstance(vision, VisionPlan)
        found += _common("vision", vision.hidden, vision.out, "gemma4v" if is_encoder else "gemma4uv", vision.eps)
        found += [
            *_depth("vision", vision if isinstance(vision, VisionPlan) else None),
            ("clip.vision.image_size", "u32", IMAGE_SIZE),
            ("clip.vision.patch_size", "u32", vision.patch),
            ("clip.vision.projector.scale_factor", "u32", vision.pool),
            ("clip.vision.image_mean", "[f32]", [0.0] * CHANNELS),
            ("clip.vision.image_std", "[f32]", [1.0] * CHANNELS),
        ]
    if (audio := towers.audio) is not None:
        is_encoder = isinstance(audio, AudioPlan)
        found += _common("audio", audio.hidden, audio.out, "gemma4a" if is_encoder else "gemma4ua", audio.eps)
        found += [*_depth("audio", audio if isinstance(audio, AudioPlan) else None), ("clip.audio.num_mel_bins", "u32", MEL_BINS)]
    return found


def check_written(partial_path: Path, checkpoint: Checkpoint, towers: Towers) -> None:
    """Read the headers of what was written. Raises CheckpointError if it would describe other towers."""
    source = Source.open(partial_path)
    hidden = checkpoint.plan.hidden
    vision, audio = gguf_towers.vision_config(source), gguf_towers.audio_config(source)
    found = (
        None if vision is None else plan_vision(vision, hidden),
        None if audio is None else plan_audio(audio, hidden),
    )
    wanted = (_without_budget(towers.vision), towers.audio)
    if (_without_budget(found[0]), found[1]) != wanted:
        raise CheckpointError(
            f"{checkpoint.source.path}: its towers' sizes can't be spelled in a projector's metadata, which would describe others"
        )


def _without_budget(plan: VisionPlan | UnifiedVisionPlan | None) -> VisionPlan | UnifiedVisionPlan | None:
    """Return a plan with the usual number of soft tokens, which requests may choose and no key of a projector names."""
    return None if plan is None else replace(plan, soft_tokens=0)


def _common(tower: str, hidden: int, out: int, kind: str, eps: float) -> list[Entry]:
    return [
        (f"clip.has_{tower}_encoder", "bool", True),
        (f"clip.{tower}.projector_type", "str", kind),
        (f"clip.{tower}.projection_dim", "u32", out),
        (f"clip.{tower}.embedding_length", "u32", hidden),
        (f"clip.{tower}.attention.layer_norm_epsilon", "f32", eps),
    ]


def _depth(tower: str, plan: VisionPlan | AudioPlan | None) -> list[Entry]:
    """Return the sizes of an encoder's layers; zeros where there are none, which readers want all the same."""
    width = 0 if plan is None else plan.mlp_width if isinstance(plan, VisionPlan) else plan.ff_width
    return [
        (f"clip.{tower}.block_count", "u32", 0 if plan is None else plan.num_layers),
        (f"clip.{tower}.feed_forward_length", "u32", width),
        (f"clip.{tower}.attention.head_count", "u32", 0 if plan is None else plan.heads),
    ]


def _output(plan: TowerPlan, spec: ParamSpec, piece: StoredTensor, options: ConvertOptions, model_dtype: str) -> Output:
    """Decide how one stored tensor of a tower is stored in a projector."""
    name, data = gguf_towers.spell(spec.name, piece.part), piece.data
    change, shape = _layout(plan, spec)
    usual = options.dense or dense_dtype(data) or model_dtype
    if change is not None:
        assert isinstance(data, LazyTensor) or spec.kind is ParamKind.MATRIX
        # llama.cpp's convolutions, which a patch's projection is to it, read these two types.
        is_half = usual == "F16" and spec.name == "vision.patch"
        return arranged(name, data, shape, "F16" if is_half else "F32", change)
    if spec.kind is not ParamKind.MATRIX or spec.name in KEPT_WIDE:
        return stored(name, data.shape, whole(data), "F32", None)
    recipe, fills_blocks = options.recipe, data.shape[-1] % BLOCK == 0
    scheme = recipe.scheme(spec.name, data.shape[-1]) if recipe is not None and fills_blocks else None
    return stored(name, data.shape, whole(data), "F16" if recipe is not None and not fills_blocks else usual, scheme)


def _layout(plan: TowerPlan, spec: ParamSpec) -> tuple[Callable[[Tensor], Tensor] | None, tuple[int, ...]]:
    """Return how a parameter's values are brought into a projector's layout, and its shape there; None where they stay."""
    name, shape = spec.name, spec.shape
    if name in ("vision.patch", "vision.patch_norm", "vision.patch_norm.bias"):
        assert isinstance(plan, VisionPlan | UnifiedVisionPlan)
        side = plan.patch if isinstance(plan, VisionPlan) else plan.soft_token_pixels
        is_kernel = isinstance(plan, VisionPlan)
        return partial(_colours_first, side=side), (shape[0], CHANNELS, side, side) if is_kernel else shape
    if name == "vision.positions" and isinstance(plan, UnifiedVisionPlan):
        return lambda values: values.transpose(0, 1), (shape[1], shape[0], shape[2])
    if name.endswith("attn.q_scale"):
        return lambda values: F.softplus(values.float()), shape
    if name.endswith("conv.depthwise"):
        return lambda values: values.squeeze(1), (shape[0], shape[2])
    if spec.kind is ParamKind.CONV:
        return lambda values: values, shape
    if spec.kind is ParamKind.SCALAR:
        return lambda values: values.reshape(1), (1,)
    return None, shape


def _colours_first(values: Tensor, side: int) -> Tensor:
    """Bring values that run over rows, columns and colours of a patch into the order colours, rows, columns."""
    return values.reshape(-1, side, side, CHANNELS).permute(0, 3, 1, 2).contiguous()
