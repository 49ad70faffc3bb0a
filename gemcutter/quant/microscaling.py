"""Microscaling: 4- or 8-bit floats with an 8-bit float as the scale of each short group (mxfp4, mxfp8, nvfp4).

Owns `Micro` and the three dialects that files use: MLX's words, compressed-tensors' bytes, which divide by a global scale, and
ModelOpt's, which multiply. All pack neighbouring values into a byte, the first in the low bits; GGUF packs otherwise, see
`gguf_blocks.py`. Refuses to know files and names, and activations: input scales are not weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.quant.bits import E2M1, float8, in_runs, look_up, unpack
from gemcutter.quant.packed import (
    cut_columns,
    cut_expert,
    cut_rows,
    dtype_name,
    gather_rows,
    lead_axes,
    mismatches,
    refuse,
    stored_bytes,
)

_LAYOUTS = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}  # (bits, group) -> scheme
_LARGEST_NVFP4 = 2688  # 448 * 6: MLX's global scale is the value that the largest scale times the largest code stands for


@dataclass(frozen=True, slots=True, eq=False)
class Micro:
    """w = float(code) * float(scale), the scale first multiplied with or divided by `factor` where there is one.

    `codes` are uint8 [..., rows, bytes], `scales` one byte each, [..., rows, columns / group]: E8M0 in mxfp4 and mxfp8, E4M3 in
    nvfp4. `factor` is float32 [..., rows, 1], one number of the whole matrix repeated.
    """

    scheme: str
    codes: Tensor
    scales: Tensor
    factor: Tensor | None = None
    is_divisor: bool = False

    @property
    def group(self) -> int:
        """Count the columns that share a scale."""
        return 16 if self.scheme == "nvfp4" else 32

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the logical shape."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group)

    @property
    def nbytes(self) -> int:
        """Count the stored bytes."""
        return stored_bytes(self)

    def rows(self, start: int, stop: int) -> Micro:
        """Give rows start to stop - 1 of every expert without copying."""
        return cut_rows(self, start, stop)

    def columns(self, start: int, stop: int) -> Micro:
        """Give columns start to stop - 1, whole groups, without copying."""
        return cut_columns(self, start, stop, self.group)

    def expert(self, index: int) -> Micro:
        """Give one matrix of a stack without copying."""
        return cut_expert(self, index)

    def gather(self, ids_N: Tensor) -> Micro:
        """Copy the rows that ids name."""
        return gather_rows(self, ids_N)

    def dequantize(self) -> Tensor:
        """Compute the values in float32: the scale with its factor first, then the code times that.

        Deviates: an E8M0 scale of 255 is NaN as in the OCP standard; MLX and compressed-tensors take it for infinity.
        """
        if self.scheme == "mxfp8":
            values = float8(self.codes, torch.float8_e4m3fn)
        else:
            values = look_up(E2M1, unpack(self.codes, 4, dtype=torch.int32))
        scales = float8(self.scales, torch.float8_e4m3fn if self.scheme == "nvfp4" else torch.float8_e8m0fnu)
        if self.factor is not None:
            scales = scales / self.factor if self.is_divisor else scales * self.factor
        return in_runs(values, self.group).mul_(scales.unsqueeze(-1)).flatten(-2)


def from_mlx(words: Tensor, scales: Tensor, columns: int, global_scale: Tensor | None = None) -> Micro:
    """Take uint32 words and uint8 scales as MLX stores them; the mode follows from the shapes.

    Raises ValueError, naming every array that does not fit.
    """
    lead = lead_axes("words", words)
    lead_axes("scales", scales)
    layout = (words.shape[-1] * 32 // columns, columns // max(scales.shape[-1], 1))
    if layout not in _LAYOUTS:
        raise ValueError(
            f"words {list(words.shape)} and scales {list(scales.shape)} for {columns} columns: 4 bits in groups of 32 (mxfp4) or "
            f"16 (nvfp4), or 8 bits in groups of 32 (mxfp8) expected, found {layout[0]} bits in groups of {layout[1]}"
        )
    bits, group = layout
    problems = mismatches("words", words, (*lead, columns * bits // 32), (torch.uint32, torch.int32))
    problems += mismatches("scales", scales, (*lead, columns // group), (torch.uint8,))
    problems += [f"columns: a multiple of {group} expected, found {columns}"] if columns % group else []
    if global_scale is not None and layout != (4, 16):
        problems.append(f"global scale: only nvfp4 has one, and this is {_LAYOUTS[layout]}")
    factor = None if global_scale is None else _factor("global scale", global_scale / _LARGEST_NVFP4, lead, problems)
    refuse(problems)
    return Micro(_LAYOUTS[layout], words.view(torch.uint8), scales, factor)


def from_compressed(packed: Tensor, scales: Tensor, global_scale: Tensor | None = None) -> Micro:
    """Take `weight_packed` and `weight_scale` of compressed-tensors: nvfp4 with a global scale to divide by, mxfp4 without.

    Its mxfp8 has float8_e4m3fn values in `weight` instead. Raises ValueError, naming every array that does not fit.
    """
    return _from_bytes(packed, scales, global_scale, "weight_global_scale", is_divisor=True)


def from_modelopt(weight: Tensor, scales: Tensor, second_scale: Tensor) -> Micro:
    """Take `weight`, `weight_scale` and `weight_scale_2` of ModelOpt's NVFP4, whose second scale multiplies.

    Raises ValueError, naming every array that does not fit.
    """
    return _from_bytes(weight, scales, second_scale, "weight_scale_2", is_divisor=False)


def _from_bytes(packed: Tensor, scales: Tensor, factor: Tensor | None, factor_name: str, *, is_divisor: bool) -> Micro:
    is_wide = factor is None and packed.dtype == torch.float8_e4m3fn
    lead, columns = lead_axes("weight", packed), packed.shape[-1] * (1 if is_wide else 2)
    scheme, group, dtypes = "nvfp4", 16, (torch.float8_e4m3fn, torch.uint8)
    if factor is None:
        scheme, group, dtypes = "mxfp8" if is_wide else "mxfp4", 32, (torch.uint8, torch.float8_e8m0fnu)
    problems = [] if is_wide else mismatches("weight", packed, (*lead, columns // 2), (torch.uint8,))
    problems += mismatches("weight_scale", scales, (*lead, columns // group), dtypes)
    problems += [f"columns: a multiple of {group} expected, found {columns}"] if columns % group else []
    factor = None if factor is None else _factor(factor_name, factor, lead, problems)
    refuse(problems)
    return Micro(scheme, packed.view(torch.uint8), scales.view(torch.uint8), factor, is_divisor)


def _factor(name: str, factor: Tensor, lead: tuple[int, ...], problems: list[str]) -> Tensor | None:
    """Repeat a number of the whole matrix, or of each expert, as float32 [..., rows, 1], without storing it again."""
    if factor.dtype != torch.float32 or factor.numel() not in (1, *lead[:-1]):
        experts = f" or [{lead[0]}]" if len(lead) == 2 else ""
        problems.append(f"{name}: float32 [] or [1]{experts} expected, found {dtype_name(factor.dtype)} {list(factor.shape)}")
        return None
    return factor.reshape(-1, *(1 for _ in lead)).expand(*lead, 1)
