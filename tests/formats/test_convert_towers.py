"""Projectors that are written: equal, tensor for tensor, to what llama.cpp's own converter makes of the same towers.

Owns `goldens/projectors` from the writing side. Read `unit/test_load_projectors.py` for the reading one.
"""

from __future__ import annotations

from pathlib import Path

import gguf as gguf_library
import numpy as np
import pytest
import torch

from gemcutter.checkpoint.convert.convert import convert
from gemcutter.cli import main
from gemcutter.errors import CheckpointError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import OpenModel, open_model
from gemcutter.media.image import cut_image
from tests.images import drawing
from tests.topologies import relative_error
from tests.trained import trained
from tests.wrappers import patch_shape

GOLDENS = Path(__file__).parents[1] / "goldens" / "projectors"
SIZES = ("E2B", "26B-A4B", "12B")
# What llama.cpp's converter writes and no reader needs, or what names the converter.
OWN_KEYS = ("general.", "GGUF.", "gemcutter.")
ADDED = {"clip.vision.projector.scale_factor"}  # its default is written, too


def contents(path: Path) -> tuple[dict[str, object], dict[str, tuple[str, list[int], bytes]]]:
    """Return the metadata of towers, and every tensor's type, shape and bytes."""
    reader = gguf_library.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(OWN_KEYS)}
    tensors = {
        each.name: (each.tensor_type.name, each.shape.tolist(), np.asarray(each.data).tobytes()) for each in reader.tensors
    }
    return keys, tensors


@pytest.mark.parametrize(("quant", "golden"), [("none", "f32"), ("q8", "q8_0")])
@pytest.mark.parametrize("size", SIZES)
def test_projectors_equal_those_of_llama_cpp(size: str, quant: str, golden: str, tmp_path: Path) -> None:
    theirs = GOLDENS / size / f"mmproj-{golden}.gguf"
    if not theirs.exists():
        pytest.skip("none of its rows fills a block")
    convert(GOLDENS / size, tmp_path / "mine.gguf", "mmproj", quant)
    (keys, tensors), (wanted_keys, wanted) = contents(tmp_path / "mine.gguf"), contents(theirs)
    assert {key: value for key, value in keys.items() if key not in ADDED} == wanted_keys
    assert tensors.keys() == wanted.keys()
    assert {name for name in wanted if tensors[name] != wanted[name] and not _is_softplus(name)} == set()
    for name in filter(_is_softplus, wanted):  # libraries differ in its last bit
        mine, other = (np.frombuffer(found[name][2], np.float32) for found in (tensors, wanted))
        assert np.allclose(mine, other, rtol=1e-6)


def _is_softplus(name: str) -> bool:
    return name.endswith("per_dim_scale.weight")


@pytest.mark.parametrize("quant", ["none", "bf16", "f16", "q8"])
def test_what_is_written_computes_the_same(quant: str, tmp_path: Path) -> None:
    source = trained("tiny-e-release")
    convert(source, tmp_path / "mmproj.gguf", "mmproj", quant)
    wanted, found = (rows(opened(source, path)) for path in (None, tmp_path / "mmproj.gguf"))
    limit = {"none": 1e-6, "bf16": 1e-2, "f16": 1e-2, "q8": 0.05}[quant]
    assert relative_error(found, wanted) < limit
    convert_back = tmp_path / "again.gguf"
    with pytest.raises(CheckpointError):
        convert(tmp_path / "mmproj.gguf", convert_back, "mmproj")
    assert not convert_back.exists()


def opened(model: Path, mmproj: Path | None) -> OpenModel:
    return open_model(
        LoadOptions(model=str(model), dtype="float32", media=("image",), mmproj=None if mmproj is None else str(mmproj))
    )


def rows(model: OpenModel) -> torch.Tensor:
    assert model.vision is not None
    return torch.cat(model.vision.encode([cut_image(drawing(60, 90), 70, patch_shape(model.vision.plan))]))


def test_the_command_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(GOLDENS / "26B-A4B")
    assert main(["convert", source, str(tmp_path / "a.gguf"), "--to", "mmproj", "--quant", "bf16"]) == 0
    assert main(["convert", "demo", str(tmp_path / "b.gguf"), "--to", "mmproj"]) == 1
    assert "holds no towers, of which a projector is made" in capsys.readouterr().err.replace("\n", " ")
    assert main(["convert", source, str(tmp_path / "c"), "--to", "mmproj"]) == 1
    assert "a file name that ends in .gguf expected for mmproj" in capsys.readouterr().err.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gemcutter-manifest.json", "a.gguf"]
