"""Writes a GGUF file with a released size's geometry and synthetic weights, which llama.cpp and gemcutter both load.

Owns which type each tensor has in such a file and where its vocabulary comes from: another GGUF file, or the packaged demo,
whose vocabulary is padded. Text is noise, speed is that of real weights. Refuses to know how values are drawn
(`benchmark/synthetic.py`) and how bytes are laid out (`checkpoint/write/write_gguf.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gemcutter import config as configs
from gemcutter.benchmark.synthetic import QUANTS, draw_piece, plan_of, size_of
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import gguf, gguf_metadata
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import distribution, spell_config
from gemcutter.checkpoint.write.write_gguf import write_gguf
from gemcutter.checkpoint.write.write_safetensors import Spec
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan
from gemcutter.quant.gguf_blocks import TYPES, Blocks

FILE_TYPES = {"q4_0": "Q4_0", "q8_0": "Q8_0", "bf16": "BF16"}  # how most bytes are stored


def write_model(path: Path, preset: str, quant: str, layers: int | None = None, vocabulary: Path | None = None) -> None:
    """Write the file at `path`; with `layers` it holds the first ones only. Raises ConfigError and CheckpointError."""
    plan = plan_of(preset, layers)
    config = configs.read(spell_config(size_of(preset)))
    metadata = gguf_metadata.describe(config, plan, f"synthetic {preset}", FILE_TYPES[quant]) + _vocabulary(plan, vocabulary)
    divisors = torch.tensor(gguf_metadata.frequencies(plan))
    specs: list[Spec] = [*_specs(plan, quant), (gguf.ROPE_DIVISORS, "F32", tuple(divisors.shape))]
    partial = path.with_suffix(".part")
    write_gguf(partial, metadata, specs, _data(plan, quant, divisors))
    partial.replace(path)


def _vocabulary(plan: ModelPlan, other: Path | None) -> list[gguf_metadata.Entry]:
    if other is not None:
        return gguf_metadata.carried_over(Source.open(other).metadata)
    raw, special = (json.loads((DEMO_FOLDER / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    return gguf_metadata.tokenizer(raw, special, {}, plan.vocab, "the demo's tokenizer.json")


def _specs(plan: ModelPlan, quant: str) -> Iterator[Spec]:
    for spec in plan.params():
        for part, shape in _stored(spec):
            yield gguf.spell(spec.name, part), _type(spec, quant), shape


def _stored(spec: ParamSpec) -> Iterator[tuple[str | None, tuple[int, ...]]]:
    """List the tensors of a parameter: its parts one by one, but a stack of experts whole."""
    if not spec.parts or len(spec.shape) == 3:
        yield None, spec.shape
    else:
        yield from ((part, (rows, spec.shape[-1])) for part, rows in spec.parts)


def _type(spec: ParamSpec, quant: str) -> str:
    if len(spec.shape) == 1 or spec.name.endswith("moe.router"):
        return "F32"  # which llama.cpp wants of these
    scheme = QUANTS[quant].scheme(spec.name, spec.shape[-1])
    return "BF16" if scheme is None else scheme.name


def _data(plan: ModelPlan, quant: str, divisors: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of all tensors, each a piece over and over."""
    generator, pieces = torch.Generator().manual_seed(0), dict[tuple[object, ...], memoryview]()
    for spec in plan.params():
        center, spread = distribution(spec, plan)
        if _type(spec, quant) == "F32":
            yield _bytes(torch.randn(spec.shape, generator=generator) * spread + center)
            continue
        scheme = QUANTS[quant].scheme(spec.name, spec.shape[-1])
        key = (spec.shape[-1], scheme, spread)
        if key not in pieces:
            piece = draw_piece(*key, generator)
            assert isinstance(piece, Tensor | Blocks)
            pieces[key] = _bytes(piece if isinstance(piece, Tensor) else piece.data)
        row_bytes = 2 * spec.shape[-1] if scheme is None else TYPES[scheme.name].row_bytes(spec.shape[-1])
        for _, shape in _stored(spec):
            size = math.prod(shape[:-1]) * row_bytes
            yield from (pieces[key][: size - start] for start in range(0, size, len(pieces[key])))
    yield _bytes(divisors)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
