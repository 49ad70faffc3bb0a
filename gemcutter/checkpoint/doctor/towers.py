"""What a checkpoint's towers are, and whether they would load: a part of the reports of `doctor` and `inspect`.

Owns how a tower is described, and the report on a projector without its model. Towers are matched by the loader's own functions,
so that the verdict is the same. Reads headers only and imports no torch. Read `checkpoint/load/match_towers.py` for the matching,
`doctor.py` for the report that this goes into.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import gguf, gguf_towers
from gemcutter.checkpoint.load.match import Checkpoint, Matched
from gemcutter.checkpoint.load.match_towers import (
    MEDIA_TOWERS,
    TowerFiles,
    find_tower_files,
    match_audio,
    match_vision,
    projector_files,
)
from gemcutter.errors import CheckpointError, ConfigError, GemcutterError
from gemcutter.tower_plan import TowerPlan

TOWERS = tuple(MEDIA_TOWERS.values())
PROJECTOR = "GGUF projector"  # the format of a file that holds towers only


@dataclass(slots=True)
class TowerReport:
    """What was found of one tower, "vision" or "audio": its plan and tensors, or what keeps it from being loaded.

    `file` names the file or folder that holds it, where that is not the model itself.
    """

    name: str
    file: str | None
    plan: TowerPlan | None = None
    matched: Matched | None = None
    problems: list[str] = field(default_factory=list)


def is_projector(source: Source) -> bool:
    """Return whether a file holds towers and no model."""
    return gguf.sniff(source) and source.metadata.get(gguf.ARCHITECTURE) == gguf_towers.PROJECTOR


def examine_towers(
    checkpoint: Checkpoint, projector: Path | None, ignore: Sequence[str], problems: list[str]
) -> list[TowerReport]:
    """Match every tower that loading with all media would load, noting all problems."""
    try:
        files = find_tower_files(checkpoint, projector)
    except GemcutterError as error:
        problems += problems_of("file", error)
        return []
    return _noted(match_towers(files, ignore), problems)


def examine_projector(source: Source, ignore: Sequence[str], problems: list[str]) -> list[TowerReport]:
    """Match every tower in a projector with its own metadata, noting all problems.

    Of the model that it is for, only the width of rows is taken from it, so whose it is can't be told.
    """
    return _noted(match_towers(projector_files(source), ignore), problems)


def _noted(reports: Iterable[TowerReport], problems: list[str]) -> list[TowerReport]:
    found = list(reports)
    problems += [problem for report in found for problem in report.problems]
    return found


def match_towers(files: TowerFiles, ignore: Sequence[str] = ()) -> Iterator[TowerReport]:
    """Match each tower that the files hold, as loading does, and keep what that raises."""
    for name in TOWERS:
        if files.source is None or not files.holds(name) or _has_far_bounds(files.source):
            continue
        report = TowerReport(name, None if files.source.path == files.model else files.source.path.name)
        try:
            report.plan, report.matched = match_vision(files, ignore) if name == "vision" else match_audio(files, ignore)
        except ConfigError as error:
            report.problems = problems_of("config", error)
        except CheckpointError as error:
            is_list = error.problems != (error.summary,)
            report.problems = list(error.problems) if is_list else problems_of("file", error)
            if is_list and error.summary.endswith("?"):  # what is likely wrong
                report.problems += [f"file       {error.summary}"]
        yield report


def _has_far_bounds(source: Source) -> bool:
    """Return whether bounds are values of a tensor, as Ollama stores them, in a file elsewhere: such towers stay aside."""
    return source.remote is not None and gguf_towers.CLAMPS in source.tensors


def problems_of(kind: str, error: GemcutterError) -> list[str]:
    """Return an error's problems with their kind before each."""
    return [f"{kind:10} {problem}" for problem in error.problems]


def describe_tower(report: TowerReport) -> dict[str, Any]:
    """Return a tower's sizes by its plan, what is stored of it and how, and its problems; null sizes where it does not load."""
    plan, matched = report.plan, report.matched
    found = [] if matched is None else [piece for pieces in matched.pieces.values() for piece in pieces]
    piles: dict[str, list[int]] = {}
    for piece in found:
        pile = piles.setdefault(piece.data.dtype, [0, 0, 0])
        pile[0] += 1
        pile[1] += piece.data.nbytes
        pile[2] += math.prod(piece.data.shape)
    return {
        "name": report.name,
        "file": report.file,
        "layers": None if plan is None else plan.num_layers,
        "hidden": None if plan is None else plan.hidden,
        "out": None if plan is None else plan.projector.shape[0],
        "parameters": None if plan is None else plan.num_params(),
        "bytes": sum(piece.data.nbytes for piece in found),
        "stored": [
            {"dtype": dtype, "tensors": count, "bytes": size, "bits_per_weight": round(8 * size / max(elements, 1), 3)}
            for dtype, (count, size, elements) in sorted(piles.items(), key=lambda item: -item[1][1])
        ],
        "problems": report.problems,
    }
