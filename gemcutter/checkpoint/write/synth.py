"""Random checkpoints that have every trait of a released size: small ones for tests, full-sized ones for measurements.

Owns the table of released sizes, the rule that makes one small, and the random values. The layout is the one that transformers'
`save_pretrained` writes, so both engines load the result; tokenizer and template are the packaged demo's. Refuses to know which
layer needs which tensor: it writes a config, and the plan derived from that config says so. Imports no torch.
Read `write_safetensors.py` for how a file comes to be, `formats/hf.py` for the names in it, `synth_assistant.py` for assistants.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from gemcutter import config as configs
from gemcutter.checkpoint.formats import hf
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.atomic_replace import put_in_place
from gemcutter.checkpoint.write.write_safetensors import Spec, write_json, write_sharded
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan, derive

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BLOCK_ELEMENTS = 1_048_583  # drawn once a tensor and repeated; a prime, so that no two rows of a table are the same
BYTES = 2  # of a bfloat16, the dtype of all tensors but indices


@dataclass(frozen=True, slots=True)
class Size:
    """What tells one size from the others. Every `period`-th layer is global, with heads of twice `head_dim`."""

    hidden: int
    mlp: int
    layers: int
    period: int
    heads: int
    kv_heads: int
    global_kv_heads: int | None = None  # given: global layers take the raw key projection as the value
    head_dim: int = 256
    window: int = 1024
    context: int = 262144
    readers: int = 0  # layers at the end that own no keys and values
    wide_readers: bool = False  # whose MLP is twice as wide
    ple: int = 0
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    media_blocks: str | None = "vision"  # rows of an image see each other
    family: str = "gemma4"
    vocab: int = 262144


SIZES = {
    "E2B": Size(1536, 6144, 35, 5, 8, 1, window=512, context=131072, readers=20, wide_readers=True, ple=256, media_blocks=None),
    "E4B": Size(2560, 10240, 42, 6, 8, 2, window=512, context=131072, readers=18, ple=256, media_blocks=None),
    "12B": Size(3840, 15360, 48, 6, 16, 8, global_kv_heads=1, family="gemma4_unified"),
    "26B-A4B": Size(2816, 2112, 30, 6, 16, 8, global_kv_heads=2, experts=128, top_k=8, expert_width=704),
    "31B": Size(5376, 21504, 60, 6, 32, 16, global_kv_heads=4),
}


def shrink(size: Size) -> Size:
    """Make a size small without losing a trait: head counts, their ratios and the order of layers stay.

    Two periods of writers are left, so that a reader's source is the last of several, and one period of readers. Widths are
    multiples of 64, which suits group-wise quantization.
    """
    readers = size.period if size.readers else 0
    return replace(
        size,
        hidden=narrow(size.hidden),
        mlp=narrow(size.mlp),
        layers=2 * size.period + readers,
        head_dim=size.head_dim // 16,
        window=size.window // 16,
        readers=readers,
        ple=narrow(size.ple),
        experts=size.experts // 8,
        top_k=size.top_k // 2,
        expert_width=narrow(size.expert_width),
        vocab=_demo_config()["vocab_size"],
    )


def narrow(width: int) -> int:
    """Return a small multiple of 64 for a width."""
    return -(-width // 2048) * 64


def write_checkpoint(like: str, out: Path, *, full: bool = False, seed: int = 0) -> tuple[Path, ...]:
    """Write a random checkpoint with the traits of the size named `like` (see SIZES) into `out`; return the files written.

    It is small, with the demo's vocabulary; `full` keeps the true geometry (E2B takes 9.3 GB of disk, 31B 61 GB) and
    still needs only some 50 MB of memory. Raises ConfigError for an unknown size or seed, CheckpointError as `write_size`.
    """
    size = SIZES[find_size(like)]
    return write_size(size if full else shrink(size), out, seed=seed)


def plan_of_size(name: str) -> ModelPlan:
    """Derive the plan of a released size. Raises ConfigError for an unknown one."""
    return derive(configs.read(spell_config(SIZES[find_size(name)])))


def find_size(name: str) -> str:
    """Return the released size that a name means, in capitals or not, "26b" for "26B-A4B". Raises ConfigError for any other."""
    for size in SIZES:
        if name.lower() in (size.lower(), size.lower().partition("-")[0]):
            return size
    raise ConfigError(f"there is no size {name!r}; known are {', '.join(SIZES)}")


def write_size(size: Size, out: Path, *, seed: int = 0) -> tuple[Path, ...]:
    """Write a random checkpoint of any geometry into `out`, which is made if absent; return the files written.

    The same size and seed give the same bytes. The folder gets its name once it is complete. Raises ConfigError for a geometry
    that contradicts itself or a negative seed, CheckpointError if `out` is not empty or can't be written.
    """
    return write_config(spell_config(size), out, COPIED, seed=seed)


def write_config(
    raw: dict[str, Any],
    out: Path,
    copied: Sequence[str],
    beside: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    *,
    seed: int = 0,
) -> tuple[Path, ...]:
    """Write a random checkpoint of a config.json; return the files written. Raises as `write_size`.

    `copied` are files of the demo that it gets, `beside` further JSON files by name.
    """
    if seed < 0:
        raise ConfigError(f"seed: expected 0 or more, found {seed}")
    plan = derive(configs.read(raw, "the config to write"))
    _check_empty(out)
    with put_in_place(out, is_folder=True, force=False) as partial:
        written = [*write_sharded(partial, _specs(plan), _data(plan, seed)), *(partial / name for name in copied)]
        for name in copied:
            _copy(name, partial)
        for name, content in (*beside.items(), ("config.json", raw)):
            written.append(partial / name)
            write_json(written[-1], content)
    return tuple(out / path.name for path in written)


def spell_config(size: Size) -> dict[str, Any]:
    """Return the config.json of a size, key for key as transformers' `save_pretrained` writes that of a text model.

    What all sizes have in common, and the ids of the demo's tokenizer, come from the demo's config.
    """
    is_global = [(index + 1) % size.period == 0 for index in range(size.layers)]
    special = {"head_dim": 2 * size.head_dim}
    if size.global_kv_heads is not None:
        special["num_key_value_heads"] = size.global_kv_heads
    digits = len(str(size.layers - 1))
    return _demo_config() | {
        "architectures": ["Gemma4UnifiedForCausalLM" if size.family == "gemma4_unified" else "Gemma4ForCausalLM"],
        "attention_k_eq_v": size.global_kv_heads is not None,
        "enable_moe_block": size.experts > 0,
        "head_dim": size.head_dim,
        "hidden_size": size.hidden,
        "hidden_size_per_layer_input": size.ple,
        "intermediate_size": size.mlp,
        "layer_types": [configs.FULL if found else configs.SLIDING for found in is_global],
        "max_position_embeddings": size.context,
        "model_type": f"{size.family}_text",
        "moe_intermediate_size": size.expert_width or None,
        "num_attention_heads": size.heads,
        "num_experts": size.experts or None,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "num_kv_shared_layers": size.readers,
        "per_layer_config": {f"{index:0{digits}}": special for index, found in enumerate(is_global) if found},
        "sliding_window": size.window,
        "top_k_experts": size.top_k or None,
        "use_bidirectional_attention": size.media_blocks,
        "use_double_wide_mlp": size.wide_readers,
        "vocab_size": size.vocab,
        "vocab_size_per_layer_input": size.vocab,
    }


def _demo_config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEMO_FOLDER / "config.json").read_text(encoding="utf-8"))
    return found


def special_tokens() -> dict[str, Any]:
    """Return the ids of the demo's tokenizer that a config names."""
    return {key: ids for key, ids in _demo_config().items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")}


# ---- tensors ----


def _specs(plan: ModelPlan) -> Iterator[Spec]:
    for spec in plan.params():
        for name, shape in _stored(spec):
            yield name, "I64" if spec.integer else "BF16", shape


def _stored(spec: ParamSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List the tensors that hold a parameter: its parts one by one, but a stack of experts whole."""
    if not spec.parts or len(spec.shape) == 3:
        yield hf.spell(spec.name, None), spec.shape
        return
    for part, rows in spec.parts:
        yield hf.spell(spec.name, part), (rows, spec.shape[-1])


def _data(plan: ModelPlan, seed: int) -> Iterator[memoryview]:
    """Yield the bytes of all tensors in the order of `_specs`, no chunk larger than a block."""
    for spec in plan.params():
        for name, shape in _stored(spec):
            key = [seed, zlib.crc32(name.encode())]
            if spec.integer:
                yield _permutation(key, math.prod(shape))
            else:
                yield from _random_bytes(key, math.prod(shape), *distribution(spec, plan))


def distribution(spec: ParamSpec, plan: ModelPlan) -> tuple[float, float]:
    """Return mean and deviation of a parameter's values, such that activations, scores and logits have a deviation near 1."""
    if spec.name.endswith(("q_norm", "k_norm")):
        center: float = spec.shape[0] ** -0.25  # attention has no scale of its own: the two norms bring 1/sqrt(head_dim)
        return center, 0.1 * center
    if len(spec.shape) == 1:
        return 1.0, 0.05 if spec.buffer else 0.1
    if spec.name.endswith("moe.router"):
        return 0.0, 1.0  # it divides by sqrt(hidden) itself
    columns = plan.ple_dim if spec.name == "embed.ple" else spec.shape[-1]  # a layer's share of a row is scaled on its own
    return 0.0, float(columns**-0.5)


def _permutation(key: list[int], elements: int) -> memoryview:
    """Return the numbers below `elements` in an order drawn from `key`: each token under one centroid."""
    return np.random.default_rng(key).permutation(elements).astype("<i8").data.cast("B")


def _random_bytes(key: list[int], elements: int, center: float, spread: float) -> Iterator[memoryview]:
    """Yield normal bfloat16 values, one block drawn from `key` over and over."""
    generator = np.random.default_rng(key)
    block = generator.standard_normal(min(elements, BLOCK_ELEMENTS), dtype=np.float32) * np.float32(spread) + np.float32(center)
    content = _bfloat16(block).data.cast("B")
    for start in range(0, elements, BLOCK_ELEMENTS):
        yield content[: BYTES * (elements - start)]


def _bfloat16(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Round to the nearest bfloat16, ties to even, and give its bits."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")


# ---- the folder ----


def _check_empty(out: Path) -> None:
    try:
        found = sorted(os.listdir(out))
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{out} can't hold a checkpoint: {error.strerror}; choose another folder") from error
    if found:
        raise CheckpointError(f"{out} is not empty, it holds {', '.join(found[:4])}; choose another folder")


def _copy(name: str, out: Path) -> None:
    """Copy one of the demo's files; it gets its name once it is complete."""
    part = out / f".{name}.part"
    try:
        part.write_bytes((DEMO_FOLDER / name).read_bytes())
        part.replace(out / name)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{out / name} can't be written: {error.strerror}; free some space, or choose another") from error
