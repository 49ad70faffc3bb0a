"""GGUF checkpoints made here with the gguf library, beside the dense float32 values that they stand for.

Owns the metadata of both families, spelled from a plan, and the storing of a tensor in any type: quantized by the library where
it can, drawn at random where it can't. Refuses to judge: the tests are in `tests/formats/test_gguf.py` and `test_gemma3.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from gemcutter.checkpoint.formats.gguf import spell
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.model.text import Decoder
from gemcutter.plan import Attn, ModelPlan
from gemcutter.quant import Weight
from tests.unit.test_quant_gguf_blocks import spread

Tensors = dict[tuple[str, str | None], Tensor]  # by canonical name and part
Choice = Callable[[str, Tensor], str]  # how to store a matrix, by its canonical name

# Where the scales of a block lie whose type the library decodes but does not encode: 16-bit floats.
SCALES = {
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q4_K": (0, 4),
    "Q5_K": (0, 4),
    "Q6_K": (208, 210),
    "IQ4_NL": (0, 2),
    "IQ4_XS": (0, 2),
    "IQ3_S": (0, 2),
    "IQ3_XXS": (0, 2),
    "IQ2_S": (0, 2),
    "IQ2_XS": (0, 2),
    "IQ2_XXS": (0, 2),
    "IQ1_S": (0, 2),
}
OTHER_SCALES = ("NVFP4", "IQ1_M")  # types alike whose scales have another form


def tensors_of(checkpoint: Checkpoint) -> Tensors:
    """Return every stored tensor of a dense checkpoint."""
    pieces = [piece for found in checkpoint.matched.pieces.values() for piece in found]
    return {(str(piece.name), piece.part): piece.data.torch() for piece in pieces if hasattr(piece.data, "torch")}


def store(values: Tensor, name: str) -> np.ndarray:
    """Store a matrix in a type: bytes [..., rows, bytes of a row]."""
    kind = Kind[name]
    if name not in SCALES and name not in OTHER_SCALES:
        return gguf.quantize(values.float().numpy(), kind)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(values.shape[-1] + values.shape[-2])
    blocks = generator.integers(0, 256, (values.numel() // per_block, block_bytes), dtype=np.uint8)
    if name == "NVFP4":  # 8-bit floats, small ones
        blocks[:, :4] = generator.integers(8, 24, (len(blocks), 4))
        return blocks.reshape(*values.shape[:-1], -1)
    if name == "IQ1_M":
        spread(torch.from_numpy(blocks), torch.from_numpy(generator.uniform(1e-4, 8e-4, len(blocks))))
        return blocks.reshape(*values.shape[:-1], -1)
    first, last = SCALES[name]
    small = generator.uniform(1e-4, 8e-4, (len(blocks), (last - first) // 2)) * (20 if name == "IQ4_NL" else 1)
    blocks[:, first:last] = small.astype(np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def every(name: str) -> Choice:
    """Store each matrix in one type if blocks fill its rows, else in Q8_0; the router in F32, as quantizers leave it."""
    size = gguf.GGML_QUANT_SIZES[Kind[name]][0]
    return lambda canonical, values: "F32" if canonical.endswith("router") else name if values.shape[-1] % size == 0 else "Q8_0"


def save(
    path: Path,
    plan: ModelPlan,
    tensors: Tensors,
    choice: Choice,
    *,
    architecture: str = "gemma4",
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    parts: int = 1,
) -> Path:
    """Write a model as llama.cpp's converter names it; metadata of value None is left out."""
    options = {"split_max_tensors": -(-len(tensors) // parts)} if parts > 1 else {}
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in (describe(plan, architecture) | dict(metadata or {})).items():
        add(writer, key if "." in key and key.split(".")[0] in ("general", "tokenizer") else f"{architecture}.{key}", value)
    for (name, part), values in tensors.items():
        if values.ndim < 2:
            writer.add_tensor(spell(name, part), values.float().numpy())
        else:
            kind = choice(name, values)
            writer.add_tensor(spell(name, part), store(values, kind), raw_dtype=Kind[kind])
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, value)


def describe(plan: ModelPlan, architecture: str) -> dict[str, Any]:
    """Format a plan as metadata."""
    layers = plan.layers
    wide = next((layer for layer in layers if layer.attn is Attn.GLOBAL), layers[0])
    narrow = next((layer for layer in layers if layer.attn is Attn.SLIDING), wide)
    common = {
        "block_count": len(layers),
        "context_length": plan.context,
        "embedding_length": plan.hidden,
        "attention.head_count": wide.heads,
        "attention.layer_norm_rms_epsilon": plan.eps,
        "attention.key_length": wide.head_dim,
        "attention.value_length": wide.head_dim,
        "attention.sliding_window": narrow.window or 512,
        "rope.freq_base": wide.rope.theta,
        "tokenizer.ggml.eos_token_id": 1,
    }
    if architecture == "gemma3":
        return common | {"feed_forward_length": wide.mlp_width, "attention.head_count_kv": wide.kv_heads}
    moe = wide.moe
    return common | {
        "feed_forward_length": [layer.mlp_width for layer in layers],
        "attention.head_count_kv": [layer.kv_heads for layer in layers],
        "attention.key_length_swa": narrow.head_dim,
        "attention.value_length_swa": narrow.head_dim,
        "attention.sliding_window_pattern": [layer.attn is Attn.SLIDING for layer in layers],
        "attention.shared_kv_layers": sum(not layer.writes for layer in layers),
        "rope.freq_base_swa": narrow.rope.theta,
        "final_logit_softcapping": plan.softcap,
        "embedding_length_per_layer_input": plan.ple_dim,
        "expert_count": moe and moe.experts,
        "expert_used_count": moe and moe.top_k,
        "expert_feed_forward_length": moe and moe.width,
    }


def divisors(plan: ModelPlan) -> dict[str, np.ndarray]:
    """Return the tensor that stops the pairs of global layers which do not rotate."""
    rope = next(layer.rope for layer in plan.layers if layer.attn is Attn.GLOBAL)
    return {"rope_freqs.weight": np.array([1.0] * rope.pairs + [1e30] * (rope.head_dim // 2 - rope.pairs), np.float32)}


def dense(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Decoder:
    """Make a decoder of the values that the gguf library reads out of a checkpoint, in float32."""
    params = load_params(checkpoint, dtype, torch.device("cpu"))
    for spec in checkpoint.plan.params():
        if len(spec.shape) < 2:
            continue
        values = [library_values(piece.data.stored[0] if hasattr(piece.data, "stored") else piece.data)
                  for piece in checkpoint.matched.pieces[spec.name]]  # fmt: skip
        if spec.parts and len(values) == 1:
            edges = accumulate((rows for _, rows in spec.parts), initial=0)
            values = [values[0][..., low:high, :] for low, high in pairwise(edges)]
        params[spec.name] = Weight(tuple(values), tuple(name for name, _ in spec.parts))
    return Decoder(checkpoint.plan, params, dtype, "cpu", "reference")


def library_values(tensor: Any) -> Tensor:
    """Decode one stored tensor with the gguf library."""
    raw = tensor.raw().numpy().reshape(*tensor.shape[:-1], -1)
    return torch.from_numpy(np.array(gguf.dequantize(raw, Kind[tensor.dtype]), np.float32)).view(tensor.shape)
