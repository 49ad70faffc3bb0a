"""Towers in other files than a release's: llama.cpp's projectors, Ollama's models, MLX's and compressed-tensors' folders.

Owns `goldens/projectors`: random wrappers, and what llama.cpp's own converter made of their towers. Read `test_load_towers.py`
for Hugging Face's layouts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemcutter.load_options import LoadOptions
from gemcutter.loading import OpenModel, open_model
from gemcutter.media.image import PatchShape, cut_image
from gemcutter.tower_plan import UnifiedVisionPlan
from tests.images import drawing
from tests.topologies import relative_error
from tests.trained import trained

GOLDENS = Path(__file__).parents[1] / "goldens" / "projectors"
SIZES = ("E2B", "26B-A4B", "12B")


def opened(model: Path, mmproj: Path | None = None, **more: object) -> OpenModel:
    given = None if mmproj is None else str(mmproj)
    return open_model(LoadOptions(model=str(model), dtype="float32", media=("image",), mmproj=given, **more))  # type: ignore[arg-type]


def rows(model: OpenModel) -> torch.Tensor:
    """Return what two images become."""
    assert model.vision is not None
    plan = model.vision.plan
    shape = PatchShape(plan.patch, plan.pool, isinstance(plan, UnifiedVisionPlan))
    return torch.cat(model.vision.encode([cut_image(drawing(*size), 70, shape) for size in ((60, 90), (300, 100))]))


@pytest.mark.parametrize("size", SIZES)
def test_projectors_of_llama_cpp_hold_the_same_tower(size: str) -> None:
    folder = GOLDENS / size
    wanted = rows(opened(folder))
    assert relative_error(rows(opened(folder, folder / "mmproj-f32.gguf")), wanted) < 1e-6
    if (packed := folder / "mmproj-q8_0.gguf").exists():
        error = relative_error(rows(opened(folder, packed)), wanted)
        assert 1e-4 < error < 0.03


def test_auto_takes_the_tower_of_a_projector() -> None:
    folder = GOLDENS / SIZES[0]
    options = {"model": str(folder), "dtype": "float32", "media": ("auto",), "context": 64}
    found = open_model(LoadOptions(**options, mmproj=str(folder / "mmproj-f32.gguf")))  # type: ignore[arg-type]
    assert relative_error(rows(found), rows(opened(folder))) < 1e-6
    alone = open_model(LoadOptions(model=str(trained("tiny-e-Q4_K_M.gguf")), media=("auto",), context=64))
    assert alone.vision is None
