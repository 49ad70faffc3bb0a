"""GGUF files copied into GGUF files: every type of block that is read passes through byte for byte, with all that the file says.

Owns copies whose weights stay; `test_convert.py` has those that change. The files are made with the gguf library.
"""

from __future__ import annotations

from pathlib import Path

import gguf as library
import pytest
import torch

from gemcutter.checkpoint.container.gguf_file import Array
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.formats.gguf import BLOCKS, DENSE
from gemcutter.checkpoint.formats.gguf_metadata import FILE_TYPES
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.model.text import Decoder
from gemcutter.quant.gguf_blocks import TYPES
from tests import gguf_files
from tests.formats.matrix import model
from tests.formats.test_convert import contents
from tests.topologies import prompt, run_alone
from tests.trained import given

WIDE = 256  # of every matrix, so that super-blocks fill its rows
PROVENANCE = {"general.license": "apache-2.0", "general.name": "a name of its own", "general.file_type": 15}


def write(path: Path, kind: str) -> Path:
    """Write a small random model whose matrices are stored in one type."""
    small = model("E2B", WIDE)
    return gguf_files.save(
        path,
        small.plan,
        small.tensors,
        gguf_files.every(kind),
        metadata=PROVENANCE,
        extra=gguf_files.divisors(small.plan),
    )


def logits(path: Path) -> torch.Tensor:
    """Return the logits of a short prompt, computed with the weights of a file."""
    checkpoint = open_checkpoint(path)
    params = load_params(checkpoint, torch.float32, torch.device("cpu"))
    found = run_alone(Decoder(checkpoint.plan, params, kernels="reference"), prompt(12), chunk=12).logits
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("kind", [*DENSE, *BLOCKS])
def test_every_type_that_is_read_is_copied_byte_for_byte(kind: str, tmp_path: Path) -> None:
    source, target = write(tmp_path / "source.gguf", kind), tmp_path / "out" / "copy.gguf"
    report = convert(source, target, "gguf")
    before, after = contents(source), contents(target)
    assert kind in {dtype for dtype, _, _ in before.values()}
    assert after == before
    assert set(report.deeds) <= {"kept", "generated"}
    assert open_checkpoint(target).plan == open_checkpoint(source).plan
    assert torch.equal(logits(target), logits(source))


def test_types_are_numbered_as_llama_cpp_does() -> None:
    assert FILE_TYPES.keys() == {*DENSE, *TYPES}
    numbers = {each.name.removeprefix("MOSTLY_").removeprefix("ALL_"): each.value for each in library.LlamaFileType}
    numbers |= {"MXFP4": numbers["MXFP4_MOE"]} | {f"Q{bits}_K": numbers[f"Q{bits}_K_S"] for bits in (3, 4, 5)}
    assert {name: numbers[name] for name in FILE_TYPES} == FILE_TYPES


def test_a_copy_says_what_its_source_said(tmp_path: Path) -> None:
    source, target = given("tiny-e-Q4_K_M.gguf"), tmp_path / "copy.gguf"
    convert(source, target, "gguf")
    before, after = (Source.open(path).metadata for path in (source, target))
    for key, value in before.items():
        if not key.startswith("general.alignment"):
            same = value.decode() if isinstance(value, Array) else value
            found = after[key].decode() if isinstance(after[key], Array) else after[key]
            assert found == same, key
    assert contents(target) == contents(source)


def test_what_is_quantized_anew_keeps_its_name_and_gets_its_own_type(tmp_path: Path) -> None:
    target = tmp_path / "q8.gguf"
    convert(write(tmp_path / "source.gguf", "Q4_K"), target, "gguf", "Q8_0")
    found = Source.open(target).metadata
    assert found["general.name"] == PROVENANCE["general.name"]
    assert found["general.license"] == "apache-2.0"
    assert found["general.file_type"] == FILE_TYPES["Q8_0"]
