"""Matches what a checkpoint holds of a tower against its plan, from headers alone, and only where the tower is asked for.

Owns which formats' towers can be read, and the one error that lists every missing, misshaped and unknown tensor of a tower.
Refuses to know foreign names, and to allocate. Read `match.py` for the decoder's, `load_params.py:load_tower` next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.checkpoint.load.match import Checkpoint, Matched, compare_specs, mismatch
from gemcutter.config import ModelConfig
from gemcutter.errors import CheckpointError
from gemcutter.tower_plan import AudioPlan, UnifiedAudioPlan, UnifiedVisionPlan, VisionPlan, derive_audio, derive_vision

TowerPlan = TypeVar("TowerPlan", VisionPlan | UnifiedVisionPlan, AudioPlan | UnifiedAudioPlan)
BRINGS = {"vision": "images", "audio": "sounds"}  # what a tower reads


def match_vision(checkpoint: Checkpoint, ignore: Sequence[str] = ()) -> tuple[VisionPlan | UnifiedVisionPlan, Matched]:
    """Return the plan of a checkpoint's vision tower and the tensors of each parameter.

    Raises ConfigError for bad keys of its config, CheckpointError where it has no vision tower, where the format's towers
    can't be read, and with every problem where tensors do not fit.
    """
    return _match("vision", derive_vision, checkpoint, ignore)


def match_audio(checkpoint: Checkpoint, ignore: Sequence[str] = ()) -> tuple[AudioPlan | UnifiedAudioPlan, Matched]:
    """Return the plan of a checkpoint's audio tower and the tensors of each parameter. Raises as `match_vision` does."""
    return _match("audio", derive_audio, checkpoint, ignore)


def _match(
    tower: str, derive: Callable[[ModelConfig], TowerPlan | None], checkpoint: Checkpoint, ignore: Sequence[str]
) -> tuple[TowerPlan, Matched]:
    path, brings = checkpoint.source.path, BRINGS[tower]
    if checkpoint.format != hf.NAME:
        raise CheckpointError(
            f"{path}: {brings} can't be read with {checkpoint.format} files; load the checkpoint that they were made from"
        )
    plan = derive(checkpoint.config)
    if plan is None:
        raise CheckpointError(
            f"{path}: this model has no {tower} tower (config.json has no {tower}_config); load it without {brings}"
        )
    problems = list[str]()
    pieces = list(hf_towers.pieces(checkpoint.source, tower))
    if not pieces:
        raise CheckpointError(f"{path}: the files hold no {tower} tower, only its config; load the original checkpoint")
    matched = compare_specs(plan.params(), (), pieces, problems, ignore, hf_towers.spell)
    if problems:
        raise mismatch(f"{path}: the {tower} tower", problems)
    return plan, matched
