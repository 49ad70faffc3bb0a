"""The trained models in other formats, and what the tools that made them said of them.

Owns where they are: in `goldens/models`, or in the folder that GEMCUTTER_MODELS names, which has more; what is in neither is made
again where that gives the same tensors byte for byte, or skipped with a reason. The numbers are in `goldens/` for all of them.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from gemcutter.checkpoint.convert import convert
from gemcutter.checkpoint.hub import DEMO_FOLDER

GOLDENS = Path(__file__).parent / "goldens"
MORE = Path(os.environ.get("GEMCUTTER_MODELS", Path(__file__).parents[2] / "shared" / "models"))
# mlx-lm's own files are these, which `test_convert.py` shows where both are there.
MADE = {
    "tiny-e-mlx-4bit": (DEMO_FOLDER, "mlx4"),
    "tiny-e-mlx-8bit": (DEMO_FOLDER, "mlx8"),
    "tiny-a-mlx-4bit": (GOLDENS / "tiny-a", "mlx4"),
}


@functools.cache
def golden(name: str) -> Any:
    """Read what was said of a model, or "prompts"."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


def trained(name: str) -> Path:
    """Find a model's folder or file; skip the test where there is none."""
    for folder in (GOLDENS / "models", MORE):
        if (folder / name).exists():
            return folder / name
    if name not in MADE:
        pytest.skip(f"{name} is not in the repository: set GEMCUTTER_MODELS")
    return _made(name)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gemcutter-")


@functools.cache
def _made(name: str) -> Path:
    source, quant = MADE[name]
    target = Path(_scratch().name) / name
    convert(source, target, "mlx", quant)
    return target
