"""LoRA adapters made by hand: drawn for any plan, written as PEFT writes them, and added to the oracle's own weights.

Owns `Changes` (random factors by parameter and part) and the three things that tests do with them; refuses to judge. Read
`tests/formats/test_lora.py` and `tests/parity/test_adapters.py` next.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.param_spec import Access, ParamKind
from gemcutter.plan import ModelPlan
from gemcutter.tower_plan import TowerPlans

Place = tuple[str, str | None]  # a parameter and its part
Changes = dict[Place, tuple[Tensor, Tensor]]  # A [r, in] and B [out, r]

PREFIX = "base_model.model."
ALPHA = 6.0
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": ALPHA, "target_modules": "all-linear", "bias": "none"}


def places(plan: ModelPlan) -> list[Place]:
    """List every matrix that a linear module holds: all but the embeddings and the stacked experts."""
    found: list[Place] = []
    for spec in plan.params():
        if len(spec.shape) == 2 and not spec.name.startswith("embed."):
            found += [(spec.name, part) for part, _ in spec.parts] or [(spec.name, None)]
    return found


def draw(plan: ModelPlan, wanted: Iterable[Place], rank: int = 3, seed: int = 0) -> Changes:
    """Draw changes large enough to turn the model's choices."""
    generator = torch.Generator().manual_seed(seed)
    specs = {spec.name: spec for spec in plan.params()}
    changes: Changes = {}
    for name, part in wanted:
        rows, columns = dict(specs[name].parts)[part] if part else specs[name].shape[0], specs[name].shape[1]
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        changes[name, part] = down, torch.randn(rows, rank, generator=generator) / (2 * rank**0.5)
    return changes


def module_of(place: Place) -> str:
    """Format the module that transformers keeps a matrix in."""
    return hf.spell(*place).removesuffix(".weight")


def tensors_of(changes: Changes, prefix: str = PREFIX) -> dict[str, Tensor]:
    """Name the factors as PEFT does."""
    halves = {}
    for place, (down, up) in changes.items():
        halves[f"{prefix}{module_of(place)}.lora_A.weight"] = down
        halves[f"{prefix}{module_of(place)}.lora_B.weight"] = up
    return halves


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], /, **config: Any) -> Path:
    """Write an adapter's two files; `config` changes or adds keys."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def tower_tensors(plans: TowerPlans, seed: int = 0) -> dict[str, Tensor]:
    """Draw a change of every matrix of some towers that rows are multiplied with, and name the factors as PEFT does."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for spec in plans.params():
        if spec.kind is not ParamKind.MATRIX or spec.access is Access.ROWS:
            continue
        columns = spec.shape[1]
        for part, rows in spec.parts or ((None, spec.shape[0]),):
            module = PREFIX + hf_towers.spell(spec.name, part).removesuffix(".weight")
            found[f"{module}.lora_A.weight"] = torch.randn(3, columns, generator=generator) / columns**0.5
            found[f"{module}.lora_B.weight"] = torch.randn(rows, 3, generator=generator) * 0.3
    return found


@torch.no_grad()
def adapted(model: PreTrainedModel, changes: Changes, scale: float = ALPHA / 3) -> PreTrainedModel:
    """Copy a transformers model and add the changes to its weights, in float64."""
    copied = copy.deepcopy(model)
    state = dict(copied.named_parameters())
    for place, (down, up) in changes.items():
        weight = state[hf.spell(*place)]
        weight.copy_(weight.double() + scale * (up.double() @ down.double()))
    return copied
