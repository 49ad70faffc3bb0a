"""Small checkpoints in every container, and random damage to them: what the doctor says of each must be what loading does.

Owns the making of the sound checkpoints and the mutations, each a function of a folder and a random generator. Refuses to judge;
read `test_doctor_agrees.py` for that, and `tools/fuzz.py` for the long runs.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gemcutter import config as configs
from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.tower_plan import derive_towers
from tests.topologies import plan_of

RAW: dict[str, Any] = {
    "model_type": "gemma4_text",
    "dtype": "bfloat16",
    "vocab_size": 4096,
    "vocab_size_per_layer_input": 4096,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "max_position_embeddings": 512,
    "eos_token_id": [1],
    "tie_word_embeddings": True,
}
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TOWERS: dict[str, Any] = {
    "vision_config": {"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
    | {"use_clipped_linears": True},
    "audio_config": {"model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"subsampling_conv_channels": [128, 4], "output_proj_dims": 40},
}
CONTAINERS = ("hf", "mlx", "gguf", "towers", "mmproj")
ADDED = (
    *("quantization_config", "quantization", "rope_scaling", "num_experts", "enable_moe_block", "attention_k_eq_v", "dtype"),
    *("torch_dtype", "pad_token_id", "final_logit_softcapping", "per_layer_config", "rope_parameters", "foo", "vision_config"),
)
Mutation = Callable[[Path, random.Random], None]


def write_sound(container: str, folder: Path) -> Path:
    """Write a sound checkpoint of random weights into a folder, and return what a user would name."""
    plain = folder if container in ("hf", "towers") else folder.with_name(f"{folder.name}-plain")
    plain.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for spec in plan_of(RAW).params():
        parts = spec.parts or ((None, spec.shape[-2] if len(spec.shape) > 1 else 0),)
        for part, rows in parts:
            shape = spec.shape if part is None else (*spec.shape[:-2], rows, spec.shape[-1])
            tensors[hf.spell(spec.name, part)] = (torch.randn(shape, generator=generator) * 0.1).bfloat16()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text(json.dumps(RAW))
    for name in BESIDE:
        shutil.copy(DEMO_FOLDER / name, plain / name)
    if container in ("towers", "mmproj"):
        _add_towers(plain, generator)
    if container in ("hf", "towers"):
        return folder
    if container == "mmproj":
        folder.mkdir()
        convert(plain, folder / "mmproj.gguf", "mmproj", "Q8_0")
        convert(plain, folder / "model.gguf", "gguf", "Q8_0")
        return folder / "model.gguf"
    target = folder if container == "mlx" else folder / "model.gguf"
    if container == "gguf":
        folder.mkdir()
    convert(plain, target, container, "mlx4" if container == "mlx" else "Q8_0")
    return target


def _add_towers(folder: Path, generator: torch.Generator) -> None:
    """Put the decoder of a folder into a wrapper with random towers, whose bounds cut little off."""
    raw = {"model_type": "gemma4", "dtype": "bfloat16", "text_config": RAW, "eos_token_id": [1], **TOWERS}
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    for spec in derive_towers(configs.read(raw)).params():
        for part, rows in spec.parts or ((None, 0),):
            shape = spec.shape if part is None else (rows, *spec.shape[1:])
            middle = 0.0 if not spec.buffer else -4.0 if spec.name.endswith("_min") else 4.0
            drawn = torch.rand(shape, generator=generator) - 0.5 + middle
            tensors[hf_towers.spell(spec.name, part)] = drawn.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))


# ---- mutations ----

VALUES: tuple[Any, ...] = (None, -1, 0, 1, 3, 2**40, 1e30, 0.5, "x", "", [], {}, True, False, [1, "a"], {"a": {}}, 64, 4096)


def _edit_json(path: Path, random: random.Random, keys: int = 1) -> None:
    """Drop keys of a JSON file, at any depth, or give them other values."""
    raw = json.loads(path.read_text())
    for _ in range(keys):
        target = raw
        while isinstance(target, dict) and target:
            key = random.choice(sorted(target))
            if isinstance(target[key], dict) and target[key] and random.random() < 0.5:
                target = target[key]
                continue
            if random.random() < 0.4:
                del target[key]
            else:
                target[key] = random.choice(VALUES)
            break
    path.write_text(json.dumps(raw))


def edit_config(folder: Path, random: random.Random) -> None:
    """Drop or change keys of config.json."""
    _edit_json(folder / "config.json", random, random.choice((1, 1, 2)))


def add_to_config(folder: Path, random: random.Random) -> None:
    """Add a key that configs may have, with any value."""
    path = folder / "config.json"
    key = random.choice(ADDED)
    value = random.choice((*VALUES, {"bits": 4, "group_size": None}, {"quant_method": "gptq", "bits": 4}, "float16"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def edit_tensors(folder: Path, random: random.Random) -> None:
    """Drop, add, rename, resize or retype a tensor."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = random.choice(sorted(tensors))
    how = random.choice(("drop", "add", "rename", "resize", "retype", "prefix", "empty"))
    if how == "drop":
        del tensors[name]
    elif how == "add":
        tensors[random.choice(("foo.weight", "lm_head.weight", "model.layers.9.mlp.up_proj.weight", f"{name}_scale"))] = tensors[
            name
        ].clone()
    elif how == "rename":
        tensors[name.replace("layers.1", "layers.7").replace("embed", "bed")] = tensors.pop(name)
    elif how == "resize":
        rows = torch.atleast_1d(tensors[name])
        tensors[name] = rows[: max(1, len(rows) // 2)].clone()
    elif how == "retype":
        dtype = random.choice((torch.float16, torch.float32, torch.int8, torch.uint8, torch.int64, torch.float64))
        tensors[name] = tensors[name].to(dtype)
    elif how == "prefix":
        tensors = {f"{random.choice(('module.', '_orig_mod.', 'x.'))}{key}": value for key, value in tensors.items()}
    else:
        tensors[name] = torch.empty(0, dtype=tensors[name].dtype)
    save_file(tensors, path, {"format": "mlx"} if "mlx" in folder.name else {"format": "pt"})


def edit_beside(folder: Path, random: random.Random) -> None:
    """Change keys of a file beside the weights."""
    names = [name for name in BESIDE if name.endswith(".json") and (folder / name).is_file()]
    if names:
        _edit_json(folder / random.choice(names), random, random.choice((1, 2)))


def damage_beside(folder: Path, random: random.Random) -> None:
    """Remove, shorten or garble a file beside the weights."""
    present = [name for name in (*BESIDE, "config.json") if (folder / name).is_file()]
    if not present:
        return
    path = folder / random.choice(present)
    content = bytearray(path.read_bytes())
    how = random.choice(("remove", "cut", "flip", "empty", "link"))
    path.unlink()
    if how == "link":
        path.symlink_to("/nowhere")
    elif how != "remove":
        if how == "flip":
            for _ in range(3):
                content[random.randrange(len(content))] = random.randrange(256)
        path.write_bytes(bytes(content if how == "flip" else content[: random.randrange(len(content)) if how == "cut" else 0]))


def damage_header(folder: Path, random: random.Random) -> None:
    """Change bytes of the headers of the weights, or cut the file."""
    path = next(path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf"))
    content = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 1, 3))):
        content[random.randrange(min(len(content), random.choice((64, 2000, 20_000, 200_000, 2_000_000))))] = random.randrange(
            256
        )
    if random.random() < 0.1:
        del content[random.randrange(len(content)) :]
    path.write_bytes(bytes(content))


OF_FOLDERS: tuple[Mutation, ...] = (edit_config, add_to_config, edit_tensors, edit_beside, damage_beside, damage_header)
MUTATIONS: dict[str, tuple[Mutation, ...]] = {"hf": OF_FOLDERS, "mlx": OF_FOLDERS, "gguf": (damage_header,)}
MUTATIONS |= {"towers": OF_FOLDERS, "mmproj": (damage_header,)}
