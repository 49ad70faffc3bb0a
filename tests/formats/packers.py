"""How other tools pack a matrix: the stored tensors by the endings of their names, and the values that they stand for.

compressed-tensors' own layouts are written by that package; GPTQ's, AWQ's, ModelOpt's, Gemma's and transformers' FP8 are written
here from their descriptions, since their tools need hardware or a network. Knows nothing of gemcutter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

Stored = dict[str, Tensor]  # ending of the name -> tensor
Packer = Callable[[Tensor], tuple[Stored, Tensor]]  # a float32 matrix -> what is stored, and the values of that

GROUP = 32  # columns; also GPTQ's, AWQ's
BLOCK = (24, 40)  # rows and columns; neither divides the widths of the tests' models
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring rows each nibble of a word holds


# ---- compressed-tensors ----


@functools.cache
def ct_scheme(preset: str) -> Any:
    """Return one of compressed-tensors' presets, its groups and blocks made to fit small matrices; skip where there is none."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors, which writes these files")
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.strategy == "group" and scheme.weights.group_size == 128:
        scheme.weights.group_size = GROUP
    if scheme.weights.strategy == "block":
        scheme.weights.block_structure = list(BLOCK)
    return scheme


def pack_ct(preset: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize a matrix as compressed-tensors' observers and compressors do."""
    scheme = ct_scheme(preset)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = scheme.weights
    state = {"weight": weight}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    low, high = _ranges(weight, args)
    scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    stored = compressor.compress(state, scheme)
    if args.type == "float" and args.num_bits == 4:  # its own decompression rounds to bfloat16
        codes = unpack_fp4_from_uint8(stored["weight_packed"], *weight.shape, dtype=torch.float32)
        factor = stored.get("weight_global_scale")
        values = dequantize(codes, scale.float(), args=args, dtype=torch.float32, global_scale=factor)
    else:
        values = compressor.decompress(stored, scheme)["weight"].float()
    return {name: tensor.detach().contiguous() for name, tensor in stored.items()}, values[: weight.shape[0], : weight.shape[1]]


def _ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of all that share a scale."""
    if args.strategy == "tensor":
        return weight.min(), weight.max()
    if args.strategy == "channel":
        return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    rows, columns = args.block_structure if args.strategy == "block" else (1, args.group_size)
    tall, wide = -weight.shape[0] % rows, -weight.shape[1] % columns
    padded = torch.nn.functional.pad(weight, (0, wide, 0, tall))
    blocks = padded.view(padded.shape[0] // rows, rows, -1, columns)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def ct_config(preset: str) -> dict[str, Any]:
    """Return the quantization_config that compressed-tensors writes for a model of one preset."""
    scheme = ct_scheme(preset)
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig

    kind = infer_module_format(torch.nn.Linear, scheme).value
    found = QuantizationConfig(config_groups={"group_0": scheme}, format=kind, ignore=["lm_head", "re:.*router.*"])
    dumped: dict[str, Any] = found.model_dump(mode="json")
    return dumped | {"transform_config": {}, "sparsity_config": {}}


# ---- packed integers of others ----


def _integers(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize runs of columns: codes [rows, columns], scales and zero points [rows, groups]."""
    rows, columns = weight.shape
    runs = torch.nn.functional.pad(weight, (0, -columns % group)).view(rows, -1, group)
    low, high = runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    codes = (weight / spread(scales.float(), group, columns) + spread(zeros, group, columns)).round().clamp(0, 2**bits - 1)
    return codes.long(), scales, zeros.long()


def spread(by_group: Tensor, group: int, columns: int) -> Tensor:
    """Repeat numbers of groups for their columns."""
    return by_group.repeat_interleave(group, 1)[:, :columns]


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Write the last axis as a stream of bits in int32 words."""
    lanes = (codes.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(-2)
    lanes = torch.nn.functional.pad(lanes, (0, -lanes.shape[-1] % 32)).view(*codes.shape[:-1], -1, 32)
    return (lanes << torch.arange(32)).sum(-1).to(torch.int32)


def pack_gptq(bits: int, group: int, is_v2: bool, weight: Tensor) -> tuple[Stored, Tensor]:
    """Pack as AutoGPTQ and AutoRound do."""
    codes, scales, zeros = _integers(weight, bits, group)
    columns = weight.shape[1]
    values = (codes - spread(zeros, group, columns)) * spread(scales.float(), group, columns)
    stored = {
        "qweight": words_of(codes, bits).t().contiguous(),
        "qzeros": words_of((zeros - (0 if is_v2 else 1)).t(), bits).contiguous(),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(columns) // group).int(),
    }
    return stored, values


def pack_awq(weight: Tensor) -> tuple[Stored, Tensor]:
    """Pack as AutoAWQ's GEMM version does."""
    codes, scales, zeros = _integers(weight, 4, GROUP)
    columns = weight.shape[1]
    values = (codes - spread(zeros, GROUP, columns)) * spread(scales.float(), GROUP, columns)
    order = torch.tensor(AWQ_ORDER)

    def interleave(x: Tensor) -> Tensor:
        rows = x.t().reshape(x.shape[1], -1, 8)[..., order]
        return words_of(rows.flatten(1), 4)

    return {"qweight": interleave(codes), "qzeros": interleave(zeros), "scales": scales.t().contiguous()}, values


def pack_gemma(bits: int, ending: str, blocks: int, weight: Tensor) -> tuple[Stored, Tensor]:
    """Pack as Gemma's own quantizer does: unsigned in bytes below 8 bits, signed at 8; scales of rows or of blocks of columns."""
    rows, columns = weight.shape
    half, width = 2 ** (bits - 1), columns // blocks
    scales = (weight.view(rows, blocks, width).abs().amax(-1) / half).clamp(min=1e-6)
    codes = (weight / spread(scales, width, columns)).round().clamp(-half, half - 1)
    values = codes * spread(scales, width, columns)
    if bits == 8:
        stored = codes.to(torch.int8)
    else:
        per_byte = 8 // bits
        lanes = (codes + half).long().view(rows, -1, per_byte) << bits * torch.arange(per_byte)
        stored = lanes.sum(-1).to(torch.uint8)
    extra = {"input_activation_scale": torch.tensor(0.5), "output_activation_scale": torch.tensor(0.0)}
    return {ending: stored, f"{ending.split('_')[0]}_scale": scales} | (extra if ending == "weight" else {}), values


# ---- small floats of others ----


def pack_fp8_blocks(weight: Tensor) -> tuple[Stored, Tensor]:
    """Pack as transformers' fine-grained FP8 does; `weight_scale_inv` multiplies."""
    low, high = _ranges(weight, _Blocks())
    scales = (torch.maximum(-low, high) / 448).clamp(min=1e-6)
    rows, columns = weight.shape
    wide = scales.repeat_interleave(BLOCK[0], 0)[:rows].repeat_interleave(BLOCK[1], 1)[:, :columns]
    codes = (weight / wide).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * wide


class _Blocks:
    strategy, block_structure = "block", BLOCK


def pack_modelopt_fp8(weight: Tensor) -> tuple[Stored, Tensor]:
    """Pack as ModelOpt's FP8 does: one scale of the tensor, without axes."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.25)}, codes.float() * scale


def pack_modelopt_nvfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    """Pack as ModelOpt's NVFP4 does: the second scale multiplies."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    second = weight.abs().max() / 2688
    runs = weight.view(weight.shape[0], -1, 16)
    scales = (runs.abs().amax(-1) / 6 / second).clamp(min=2**-6).to(torch.float8_e4m3fn)
    wide = (scales.float() * second).unsqueeze(-1)
    codes = (runs.abs() / wide).unsqueeze(-1).sub(table).abs().argmin(-1)
    values = (table[codes] * runs.sign()).mul(wide).flatten(1)
    nibbles = (codes + 8 * (runs < 0)).flatten(1)
    packed = (nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": second, "input_scale": torch.tensor(0.25)}, values


CT_PRESETS = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM", "W8A16", "W3A16", "NVFP4", "MXFP4", "MXFP8")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
PACKERS: dict[str, tuple[Packer, Callable[[], dict[str, Any]]]] = {
    **{f"ct-{preset}": (partial(pack_ct, preset), partial(ct_config, preset)) for preset in CT_PRESETS},
    "gptq": (partial(pack_gptq, 4, GROUP, False), lambda: GPTQ),
    "gptq-8-bit-v2": (partial(pack_gptq, 8, GROUP, True), lambda: GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}),
    "auto-round": (  # 64 columns are one and a third of a group
        partial(pack_gptq, 4, 48, False),
        lambda: GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "group_size": 48},
    ),
    "auto-round-plain": (
        partial(pack_gptq, 2, GROUP, True),
        lambda: GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 2},
    ),
    "awq": (pack_awq, lambda: {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "gemma-2-bit": (partial(pack_gemma, 2, "weight", 1), lambda: {"quant_method": "gemma", "num_bits": 2}),
    "gemma-4-bit": (partial(pack_gemma, 4, "weight", 1), lambda: {"quant_method": "gemma", "num_bits": 4}),
    "gemma-8-bit": (partial(pack_gemma, 8, "weight", 1), lambda: {"quant_method": "gemma", "num_bits": 8}),
    "fp8-blocks": (pack_fp8_blocks, lambda: {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "modelopt-fp8": (pack_modelopt_fp8, lambda: {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt-nvfp4": (
        pack_modelopt_nvfp4,
        lambda: {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "kv_cache_scheme": {"num_bits": 8}},
    ),
}
