"""Matches what a checkpoint holds of a tower against its plan, from headers alone, and only where the tower is asked for.

Owns which formats' towers can be read, and the one error that lists every missing, misshaped and unknown tensor of a tower.
Refuses to know foreign names, and to allocate. Read `match.py` for the decoder's, `load_params.py:load_tower` next.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.checkpoint.load.match import Checkpoint, Matched, compare_specs, mismatch
from gemcutter.errors import CheckpointError
from gemcutter.tower_plan import UnifiedVisionPlan, VisionPlan, derive_vision


def readable_media(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what a checkpoint's towers can read, as load options name it; of damaged towers, too: `match_vision` tells."""
    has_vision = checkpoint.format == hf.NAME and checkpoint.config.tower_keys.get("vision") is not None
    return ("image",) if has_vision and any(hf_towers.pieces(checkpoint.source, "vision")) else ()


def match_vision(checkpoint: Checkpoint, ignore: Sequence[str] = ()) -> tuple[VisionPlan | UnifiedVisionPlan, Matched]:
    """Return the plan of a checkpoint's vision tower and the tensors of each parameter.

    Raises ConfigError for bad keys of its config, CheckpointError where it has no vision tower, where the format's towers
    can't be read, and with every problem where tensors do not fit.
    """
    path = checkpoint.source.path
    if checkpoint.format != hf.NAME:
        raise CheckpointError(
            f"{path}: images can't be read with {checkpoint.format} files; load the checkpoint that they were made from"
        )
    plan = derive_vision(checkpoint.config)
    if plan is None:
        raise CheckpointError(
            f"{path}: this model has no vision tower (config.json has no vision_config); load it without images"
        )
    problems = list[str]()
    pieces = list(hf_towers.pieces(checkpoint.source, "vision"))
    if not pieces:
        raise CheckpointError(f"{path}: the files hold no vision tower, only its config; load the original checkpoint")
    matched = compare_specs(plan.params(), (), pieces, problems, ignore, hf_towers.spell)
    if problems:
        raise mismatch(f"{path}: the vision tower", problems)
    return plan, matched
