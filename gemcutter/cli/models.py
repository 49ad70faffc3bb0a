"""`gemcutter models`: the names that stand for recommended checkpoints, and every form that MODEL may take.

Owns the words and the table. The names are in `checkpoint/remote/names.json`; sizes are computed from the plan of each, so that
nothing is looked up. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from gemcutter.checkpoint.remote.hub import NamedModel, named_models
from gemcutter.cli import options
from gemcutter.cli.terminal import spell_bytes

HELP = """
List the short names of recommended models, and what MODEL may be.

A short name stands for one repository on the Hugging Face hub; e2b@main takes a revision of it. The size is about that of the
text model's weights as they are stored, computed from its geometry; towers for images and audio, which are not loaded, come on
top of it in a download. `gemcutter inspect NAME` says what a model needs to run, before anything is downloaded.
"""
EXAMPLES = """\b
Examples:
  gemcutter models
  gemcutter models --json
  gemcutter inspect e4b-q4
  gemcutter run e2b "Why is the sky blue?"
"""
FORMS = """
MODEL may be
  demo                          the small model that comes with gemcutter (./demo is a folder of that name)
  ./folder                      a folder that holds .safetensors files, or one GGUF model
  ./model.gguf                  a .gguf or .safetensors file; any part of a split one
  google/gemma-4-E2B-it         a hub id; with a revision google/gemma-4-E2B-it@main
  owner/name:gemma-Q4_0.gguf    one GGUF file of a hub repository, in a folder owner/name:Q4_0/gemma.gguf
  e2b                           a short name of the list above"""
# How a checkpoint is stored: in words, and the bits of a value of its linear layers and of its embeddings, scales included.
STORED = {
    "bf16": ("safetensors, bfloat16", 16.0, 16.0),
    "w4a16": ("compressed-tensors, 4-bit (QAT)", 4.5, 16.0),
    "mlx4": ("MLX, 4-bit", 4.5, 4.5),
    "fp8": ("compressed-tensors, FP8", 8.0, 16.0),
}


def models(as_json: options.Json = False) -> None:
    """Print the list."""
    found = [describe(name, model) for name, model in named_models().items()]
    if as_json:
        print(json.dumps(found))
        return
    widths = [max(len(row[key]) for row in found) for key in ("name", "repo", "what", "format")]
    for row in found:
        cells = (row[key].ljust(width) for key, width in zip(("name", "repo", "what", "format"), widths, strict=True))
        print(f"{'  '.join(cells)}  {spell_bytes(row['bytes'])}")
    print(FORMS)


def describe(name: str, model: NamedModel) -> dict[str, Any]:
    """Return one row: what a name stands for, and the bytes of its text model."""
    from gemcutter.checkpoint.write.synth import plan_of_size

    plan, (words, linear_bits, embedding_bits) = plan_of_size(model.size), STORED[model.stored]
    bits = 0.0
    for spec in plan.params():
        is_linear = len(spec.shape) > 1 and not spec.name.startswith("embed.")
        bits += spec.elements * (linear_bits if is_linear else embedding_bits)
    return {"name": name, **asdict(model), "what": f"{model.size} {model.kind}", "format": words, "bytes": int(bits / 8)}
