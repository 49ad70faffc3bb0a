"""Matches what a checkpoint holds of a tower against its plan, from headers alone, and only where the tower is asked for.

Owns where a model's towers lie (in its own files, in a projector beside them, or in a file that is given) and the one error that
lists every missing, misshaped and unknown tensor of a tower. Refuses to know foreign names, and to allocate. Read `match.py` for
the decoder's, `load_params.py:load_tower` next.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import TOWER_PIECES, gguf, gguf_towers, hf, hf_towers
from gemcutter.checkpoint.load.match import Checkpoint, Matched, compare_specs, format_of, mismatch
from gemcutter.config import ModelConfig
from gemcutter.errors import CheckpointError
from gemcutter.tower_plan import AudioPlan, UnifiedAudioPlan, UnifiedVisionPlan, VisionPlan, plan_audio, plan_vision

MEDIA_TOWERS = {"image": "vision", "audio": "audio"}
BRINGS = {"vision": "images", "audio": "sounds"}  # what a tower reads
# Which of several projectors beside a model is taken: the first of these that a name holds.
PREFERRED = ("bf16", "f16", "f32", "q8_0")

MatchedVision = tuple[VisionPlan | UnifiedVisionPlan, Matched]
MatchedAudio = tuple[AudioPlan | UnifiedAudioPlan, Matched]
AnyPlan = TypeVar("AnyPlan", VisionPlan | UnifiedVisionPlan, AudioPlan | UnifiedAudioPlan)


@dataclass(frozen=True, slots=True)
class TowerFiles:
    """What holds the towers of a model: its own files, a projector, or nothing; opened once for all towers.

    `model` is the model's path, `hidden` its width, and `config` its config where that tells of these towers.
    """

    model: Path
    hidden: int
    source: Source | None
    config: ModelConfig | None = None

    @property
    def media(self) -> tuple[str, ...]:
        """Return which media the towers read, as load options name them; whether they are whole is told by matching them."""
        return tuple(medium for medium, tower in MEDIA_TOWERS.items() if self.holds(tower))

    def holds(self, tower: str) -> bool:
        """Return whether the files hold tensors of a tower, "vision" or "audio", and say what it is."""
        source = self.source
        if source is None:
            return False
        is_told = self.config is None or _is_gguf(source) or bool(self.config.tower_keys.get(tower))
        tensors = (gguf_towers if _is_gguf(source) else hf_towers).tensors_of(source, tower)
        return is_told and next(tensors, None) is not None

    def insist(self) -> Source:
        """Return the files. Raises CheckpointError where a GGUF file has no projector beside it."""
        if self.source is None:
            raise CheckpointError(
                f"{self.model}: a GGUF model has its towers in a file of its own, and there is none beside it; "
                "put its mmproj file there, or pass it as --mmproj"
            )
        return self.source

    def read_config(self, ignore: Sequence[str] = ()) -> ModelConfig:
        """Return the config that tells of towers in Hugging Face's or MLX's files. Raises what reading it does."""
        return hf.read_config(self.insist(), ignore) if self.config is None else self.config


def find_tower_files(checkpoint: Checkpoint, projector: Path | None = None) -> TowerFiles:
    """Open what holds the towers of a model.

    `projector` is a file or folder that does; None: the model's own files, or the projector beside a GGUF file. Raises
    CheckpointError for a projector without towers.
    """
    own, hidden = checkpoint.source, checkpoint.plan.hidden
    if projector is not None:
        source = Source.open(projector)
        if _is_gguf(source) and not gguf_towers.has_towers(source):
            raise CheckpointError(f"{projector} holds no towers; pass the mmproj file of this model")
        return TowerFiles(own.path, hidden, source)
    if checkpoint.format != gguf.NAME or gguf_towers.has_towers(own):
        return TowerFiles(own.path, hidden, own, checkpoint.config)
    names = [] if own.remote is not None else _projectors(checkpoint)
    return TowerFiles(own.path, hidden, Source.open(own.folder / min(names, key=_rank)) if names else None)


def projector_files(source: Source) -> TowerFiles:
    """Return a GGUF projector as the files of a model that is not there, as wide as the rows that its first projection makes."""
    names = [own for own, (name, _) in gguf_towers.GLOBALS.items() if name in ("vision.out", "audio.out")]
    widths = [source.tensors[own].shape[0] for own in names if own in source.tensors and source.tensors[own].shape]
    return TowerFiles(source.path, widths[0] if widths else 1, source)


def match_vision(files: TowerFiles, ignore: Sequence[str] = ()) -> MatchedVision:
    """Return the plan of a model's vision tower and the tensors of each parameter.

    Raises ConfigError for bad keys of its config, CheckpointError where there is no vision tower, and with every problem where
    tensors do not fit.
    """
    source = files.insist()
    config = gguf_towers.vision_config(source, ignore) if _is_gguf(source) else files.read_config(ignore).vision
    return _match("vision", files, None if config is None else plan_vision(config, files.hidden), ignore)


def match_audio(files: TowerFiles, ignore: Sequence[str] = ()) -> MatchedAudio:
    """Return the plan of a model's audio tower and the tensors of each parameter. Raises what `match_vision` does."""
    source = files.insist()
    config = gguf_towers.audio_config(source, ignore) if _is_gguf(source) else files.read_config(ignore).audio
    return _match("audio", files, None if config is None else plan_audio(config, files.hidden), ignore)


def _is_gguf(source: Source) -> bool:
    return format_of(source).NAME == gguf.NAME


def _match(tower: str, files: TowerFiles, plan: AnyPlan | None, ignore: Sequence[str]) -> tuple[AnyPlan, Matched]:
    source, brings = files.insist(), BRINGS[tower]
    path, is_gguf = source.path, _is_gguf(source)
    if plan is None:
        without = "it has no tensors of one" if is_gguf else f"config.json has no {tower}_config"
        raise CheckpointError(f"{path}: this model has no {tower} tower ({without}); load it without {brings}")
    problems = list[str]()
    pieces = list(TOWER_PIECES[format_of(source).NAME](source, tower, plan))
    if not pieces:
        remedy = f"load the original checkpoint, or pass its {tower} tower as --mmproj"
        raise CheckpointError(f"{path}: the files hold no {tower} tower, only its config; {remedy}")
    matched = compare_specs(plan.params(), (), pieces, problems, ignore, gguf_towers.spell if is_gguf else hf_towers.spell)
    if problems:
        is_other = any(shape[:1] != found[:1] for shape, found in matched.misshapen) and source.path != files.model
        hint = ": is it the projector of this model?" if is_other else ""
        raise mismatch(f"{path}: the {tower} tower", problems, hint)
    return plan, matched


def _projectors(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the projectors beside a model."""
    names = os.listdir(checkpoint.source.folder)
    return sorted(name for name in names if "mmproj" in name.lower() and name.endswith(".gguf"))


def _rank(name: str) -> tuple[int, str]:
    return next((rank for rank, kind in enumerate(PREFERRED) if kind in name.lower()), len(PREFERRED)), name
