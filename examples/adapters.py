"""Several LoRA adapters beside one model: each request picks one, or none, and all run in one batch."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import gemcutter


def write_random_adapter(folder: Path, seed: int) -> Path:
    """Write an adapter as PEFT saves it; yours comes from training. It changes the demo's first query projection."""
    generator = torch.Generator().manual_seed(seed)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    down, up = torch.randn(4, 256, generator=generator), torch.randn(256, 4, generator=generator)
    folder.mkdir()
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


with tempfile.TemporaryDirectory() as scratch:
    first, second = (write_random_adapter(Path(scratch) / name, seed) for seed, name in enumerate(("first", "second")))
    with gemcutter.load("demo", adapters={"first": str(first)}) as model:
        model.load_adapter("second", second)  # also while requests run
        names = [None, "first", "second"]
        prepared = [model.prepare("In the beginning", adapter=name, max_tokens=12, temperature=0.0) for name in names]
        for name, stream in zip(names, model.submit_many(prepared), strict=True):  # one batch
            print(f"{name or 'no adapter'}: {stream.finish().text!r}")
        model.unload_adapter("first")
