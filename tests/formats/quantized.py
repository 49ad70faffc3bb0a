"""Quantized checkpoints for tests: a random model of each size, packed module by module, beside a dense twin of the same values.

Owns the names under which tools store packed modules and experts. Read `packers.py` for how a matrix is packed.
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.write.synth import SIZES, shrink, write_size
from gemcutter.quant import Weight
from tests.formats.packers import Packer, Stored

Tensors = dict[str, Tensor]
Raw = dict[str, Any]
CPU = torch.device("cpu")
LINEARS = ("_proj.weight", "per_layer_input_gate.weight", "per_layer_projection.weight")  # what tools quantize by default
MOE = "26B-A4B"
TEXT, WRAPPER = "model.", "model.language_model."
FUSED, APART, APART_MOE, SUFFIXED = "experts.{}", "experts.{}.{}", "moe.experts.{}.{}", "experts.{}.{} with underscores"


@dataclass(frozen=True)
class Files:
    """A quantized checkpoint and its dense twin."""

    packed: Path
    dense: Path
    size_bytes: int


@functools.cache
def random_model(like: str) -> tuple[Raw, Tensors]:
    """Give config and tensors of a small model with a size's traits; every width is a multiple of 32, some of no 48."""
    size = shrink(SIZES[like])
    small = replace(
        size,
        hidden=64,
        mlp=96,
        head_dim=16,
        vocab=96,
        ple=32 if size.ple else 0,
        experts=size.experts // 4,
        expert_width=64 if size.experts else 0,
        period=2,
        readers=2 if size.readers else 0,
        layers=4 if size.readers else 2,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_size(small, Path(folder) / like)
        raw = json.loads((Path(folder) / like / "config.json").read_text())
        return raw, {name: tensor.float() for name, tensor in load_file(Path(folder) / like / "model.safetensors").items()}


def wrap(raw: Raw) -> Raw:
    """Nest a text config as multimodal checkpoints do."""
    return {"model_type": raw["model_type"].removesuffix("_text"), "text_config": raw, "vision_config": {"model_type": "vision"}}


def _once(pack: Packer, weight: Tensor) -> tuple[Stored, Tensor]:
    """Pack a matrix of a random model, which stays where it is, once for all tests."""
    key = (pack, weight.data_ptr(), tuple(weight.shape))
    if key not in _packed:
        _packed[key] = pack(weight)
    return _packed[key]


_packed: dict[tuple[Packer, int, tuple[int, ...]], tuple[Stored, Tensor]] = {}


def write(folder: Path, raw: Raw, tensors: Tensors, quantization: Raw | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw | ({"quantization_config": quantization} if quantization else {})))
    return folder


def pack_experts(stem: str, weight: Tensor, pack: Packer, experts: str) -> tuple[Tensors, Tensor]:
    """Pack a stack of experts under the names that `experts` stands for."""
    halves = {"gate_proj": 0, "up_proj": 1} if "gate_up" in stem else {"down_proj": 0}
    base = stem.rpartition("experts.")[0]
    if experts == FUSED:
        packed = [pack(matrix) for matrix in weight]
        stacks = {ending: torch.stack([one[ending] for one, _ in packed]) for ending in packed[0][0]}
        if "weight_shape" in stacks:
            stacks["weight_shape"] = torch.tensor(weight.shape)
        names = {ending: stem if ending == "weight" else f"{stem}_{ending.removeprefix('weight_')}" for ending in stacks}
        return {names[ending]: tensor for ending, tensor in stacks.items()}, torch.stack([value for _, value in packed])
    stored, values = Tensors(), []
    for index, matrix in enumerate(weight):
        parts = []
        for projection, half in halves.items():
            one, value = pack(matrix.chunk(len(halves))[half].contiguous())
            for ending, tensor in one.items():
                if experts == SUFFIXED:
                    name = f"{base}experts.{index}.{projection}_{ending.removeprefix('weight_')}"
                else:
                    name = f"{base}{'moe.' * (experts == APART_MOE)}experts.{index}.{projection}.{ending}"
                stored[name] = tensor
            parts.append(value)
        values.append(torch.cat(parts))
    return stored, torch.stack(values)


def quantize(
    folder: Path,
    like: str | tuple[Raw, Tensors],
    pack: Packer,
    quantization: Raw | None,
    *,
    experts: str = APART,
    prefix: str = TEXT,
    extra: Tensors | None = None,
) -> Files:
    """Write a size's random model, or the one given, packed, and its twin."""
    raw, tensors = random_model(like) if isinstance(like, str) else like
    stored, twin, pack = Tensors(), Tensors(), partial(_once, pack)
    for name, tensor in tensors.items():
        bare = name.removeprefix("model.")
        if tensor.ndim == 3:
            found, twin[name] = pack_experts(bare, tensor, pack, experts)
            stored |= {prefix + key: value for key, value in found.items()}
        elif name.endswith(LINEARS) and not name.endswith("model_projection.weight"):
            one, twin[name] = pack(tensor)
            stored |= {f"{prefix}{bare.removesuffix('weight')}{ending}": value for ending, value in one.items()}
        else:
            stored[prefix + bare] = tensor.bfloat16()
            twin[name] = tensor
    config = wrap(raw) if prefix == WRAPPER else raw
    packed = write(folder / "packed", config, stored | (extra or {}), quantization)
    size = sum(tensor.nbytes for tensor in stored.values())
    return Files(packed, write(folder / "dense", raw, twin), size)


def params_of(path: Path) -> tuple[Checkpoint, dict[str, Weight | Tensor]]:
    checkpoint = open_checkpoint(path)
    return checkpoint, load_params(checkpoint, torch.float32, CPU)
