"""The trained models in other formats, and what the tools that made them said of them.

Owns where they are: in `goldens/models`, or in the folder that GEMCUTTER_MODELS names, which has more; what is in neither is made
again where that gives the same tensors byte for byte, or skipped with a reason. The numbers are in `goldens/` for all of them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import COPIED

GOLDENS = Path(__file__).parent / "goldens"
SHARDS = 3
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
    """Find a model's folder or file, or make it again; skip the test where neither can be done."""
    return _find(name) or (_made(name) if name in MADE else given(name))


def given(name: str) -> Path:
    """Find a model's folder or file as its own tool wrote it; skip the test where there is none."""
    found = _find(name)
    if found is None:
        pytest.skip(f"{name} is not in the repository: set GEMCUTTER_MODELS")
    return found


def _find(name: str) -> Path | None:
    found = (folder / name for folder in (GOLDENS / "models", MORE))
    return next((path for path in found if path.exists()), None)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gemcutter-")


@functools.cache
def _made(name: str) -> Path:
    source, quant = MADE[name]
    target = Path(_scratch().name) / name
    convert(source, target, "mlx", quant)
    return target


@functools.cache
def release_folder() -> Path:
    """Write the published layout over the demo's weights: nested config, towers, redundant tensors, three shards, an index."""
    folder = Path(_scratch().name) / "tiny-e-release"
    folder.mkdir()
    for name in COPIED:
        shutil.copy(DEMO_FOLDER / name, folder / name)
    shutil.copy(GOLDENS / "tiny-e-release-config.json", folder / "config.json")
    demo = load_file(DEMO_FOLDER / "model.safetensors")
    tensors = {f"model.language_model.{name.removeprefix('model.')}": tensor for name, tensor in demo.items()}
    for more in ("extra", "audio"):  # what publishers add
        tensors |= load_file(GOLDENS / f"tiny-e-release-{more}.safetensors")
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    for index, name in enumerate(sorted(tensors)):
        shards[index * SHARDS // len(tensors)][name] = tensors[name]
    places = dict[str, str]()
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
