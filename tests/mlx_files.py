"""MLX checkpoints made here, from Hugging Face ones: packed in any mode, beside the dense values that they stand for.

Owns the recipes (how a module is packed) and MLX's names; the files are written with the safetensors library. Refuses to judge:
the tests are in `tests/formats/test_mlx*.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.checkpoint.write.synth import SIZES, Size, shrink
from gemcutter.quant import Weight
from gemcutter.quant.affine import Affine, quantize
from gemcutter.quant.bits import pack
from gemcutter.quant.microscaling import Micro

Tensors = dict[str, Tensor]
Arrays = tuple[Tensors, Tensor]  # what is stored of a module, by ending, and the values that it stands for
Recipe = Callable[[Tensor], Arrays]
Choice = Callable[[str], Recipe | None]  # how to pack a module, by its bare name; None leaves it dense


def affine(bits: int, group: int) -> Recipe:
    """Pack from the least to the largest value of each group, which may be of any size."""

    def recipe(x: Tensor) -> Arrays:
        runs, top = x.float().unflatten(-1, (-1, group)), 2**bits - 1
        low, high = runs.amin(-1, keepdim=True), runs.amax(-1, keepdim=True)
        scales, biases = ((high - low) / top).clamp(min=1e-6).bfloat16(), low.bfloat16()
        codes = ((runs - biases.float()) / scales.float()).round_().clamp_(0, top).to(torch.uint8).flatten(-2)
        return spread(Affine(pack(codes, bits), scales.squeeze(-1), biases.squeeze(-1), bits, group))

    return recipe


def like_mlx(bits: int, group: int) -> Recipe:
    """Pack as MLX's own quantizer does."""
    return lambda x: spread(quantize(x, bits, group))


def spread(packed: Affine) -> Arrays:
    words = packed.codes.view(torch.uint32)
    return {"weight": words, "scales": packed.scales, "biases": packed.biases}, packed.dequantize()


def micro(scheme: str) -> Recipe:
    """Draw codes and scales: quantizing well is not what is tested here."""
    bits, group = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[scheme]
    lowest = 0x10 if scheme == "nvfp4" else 121  # a 32nd, give or take, as E4M3 or as E8M0

    def recipe(x: Tensor) -> Arrays:
        *lead, columns = x.shape
        draw = torch.Generator().manual_seed(columns)
        codes = torch.randint(0, 256, (*lead, columns * bits // 8), dtype=torch.uint8, generator=draw)
        codes &= 0xBF if scheme == "mxfp8" else 0xFF  # exponents below 8: nothing is NaN
        scales = torch.randint(lowest, lowest + 3, (*lead, columns // group), dtype=torch.uint8, generator=draw)
        return {"weight": codes.view(torch.uint32), "scales": scales}, Micro(scheme, codes, scales).dequantize()

    return recipe


def convert(
    folder: Path, out: Path, choose: Choice, *, prefix: str = "model.", extra: Tensors | None = None, **config: Any
) -> tuple[Path, Path]:
    """Write the model in `folder` as MLX does, and densely with the values that the packed one stands for; give both folders."""
    packed, dense = out / "packed", out / "dense"
    stored, plain = dict[str, Tensor](extra or {}), Tensors()
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = []
        for own, part in modules(name.removeprefix("model."), tensor):
            recipe = choose(own) if part.ndim > 1 else None
            arrays, value = recipe(part.contiguous()) if recipe else ({"weight": part}, part)
            ending = "." if part.ndim > 1 or own.endswith("norm") or "layernorm" in own else None
            stored |= {
                f"{prefix}{own}.{end}" if ending else f"{prefix}{own}": array.contiguous() for end, array in arrays.items()
            }
            values.append(value.float())
        plain[name] = torch.cat(values, -2) if len(values) > 1 else values[0]
    raw = json.loads((folder / "config.json").read_text())
    for target, tensors, content in ((packed, stored, wrapped(raw, **config)), (dense, plain, raw)):
        target.mkdir(parents=True)
        save_file(tensors, target / "model.safetensors", {"format": "mlx" if target is packed else "pt"})
        (target / "config.json").write_text(json.dumps(content))
    return packed, dense


def modules(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Give MLX's modules in one of Hugging Face's tensors."""
    experts = name.partition("experts.")[0] + "experts.switch_glu."
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, -2)
        yield from ((experts + "gate_proj", gate), (experts + "up_proj", up))
    elif name.endswith("experts.down_proj"):
        yield experts + "down_proj", tensor
    else:
        yield name.removesuffix(".weight"), tensor


def wrapped(raw: dict[str, Any], multimodal: bool = False, **keys: Any) -> dict[str, Any]:
    if not multimodal:
        return raw | keys
    return {"model_type": "gemma4", "text_config": raw, "vision_config": {"num_hidden_layers": 27}} | keys


def small(like: str) -> Size:
    """Shrink a size to widths that every mode has groups for."""
    size = shrink(SIZES[like])
    experts = {"experts": 4, "top_k": 2, "expert_width": 64} if size.experts else {}
    return replace(size, hidden=64, mlp=128, head_dim=16, window=16, ple=64 if size.ple else 0, vocab=96, **experts)


def misalign(path: Path) -> None:
    """Lengthen a file's header by one byte: MLX does not pad headers, so half of its files have odd offsets."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])


def schemes(checkpoint: Checkpoint) -> dict[str, str]:
    """Name how every matrix is stored, as headers say, having checked that the loaded weights say so too."""
    params = load_params(checkpoint, torch.float32, torch.device("cpu"))
    found = {}
    for name, pieces in checkpoint.matched.pieces.items():
        param = params[name]
        if isinstance(param, Weight):
            kinds = {"bfloat16" if piece.data.dtype == "BF16" else piece.data.dtype for piece in pieces}
            found[name] = kinds.pop() if len(kinds) == 1 else "mixed"
            assert param.stored == found[name]
            assert param.nbytes == sum(piece.data.nbytes for piece in pieces)
    return found
