"""Models of a released geometry with synthetic weights, made in memory in seconds: nobody needs a download to measure speed.

Owns which scheme each weight gets under a quantization's name, and the values: a piece is drawn for each kind of matrix and
repeated, since speed does not depend on values. Refuses to know layers: the plan says what is needed. Tables that are only
gathered from are zeros that the system provides when they are read, so they cost no memory. Read `checkpoint/write/synth.py`
for the sizes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemcutter import config as configs
from gemcutter.checkpoint.write.synth import SIZES, Size, distribution, find_size, shrink, spell_config
from gemcutter.checkpoint.write.synth_assistant import ASSISTANTS, shrink_assistant, spell_assistant
from gemcutter.errors import ConfigError
from gemcutter.ops.types import Param
from gemcutter.param_spec import Access, ParamSpec
from gemcutter.plan import ModelPlan, derive
from gemcutter.quant import Part, Weight
from gemcutter.quant.affine import Affine
from gemcutter.quant.bits import E2M1_DOUBLED
from gemcutter.quant.cpu_layout import PANEL
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.gguf_blocks import TYPES, Blocks
from gemcutter.quant.gguf_blocks_short import NONLINEAR
from gemcutter.quant.gpu_packing import GpuPackedWeight
from gemcutter.quant.hugepage_arena import allocate
from gemcutter.quant.packing import Packer, PlainPacker
from gemcutter.quant.recipes import DENSE, RECIPES, BlockScheme, Recipe, Scheme

CPU = torch.device("cpu")
SMALL = "tiny:"  # before the name of a size: all of its traits, little of its width
Q8_0 = (BlockScheme("Q8_0"),)
Q6_K = (BlockScheme("Q6_K"), *Q8_0)  # the second where super-blocks do not fill a row
IQ4_XS = (BlockScheme("IQ4_XS"), BlockScheme("IQ4_NL"), *Q8_0)
# As the files of each kind are found: llama.cpp keeps the head in 6 bits, the routers and the per-layer projection dense.
QUANTS = {
    "q4_0": Recipe((BlockScheme("Q4_0"),), {"embed.tokens": Q6_K, "head": Q6_K, "ple.in": DENSE, "moe.router": DENSE}),
    "mlx4": RECIPES["mlx4"],
    "q8_0": RECIPES["Q8_0"],
    "bf16": Recipe((), {}),
    "q4": RECIPES["q4"],
    "q8": RECIPES["q8"],
    "mlx8": RECIPES["mlx8"],
    "mxfp4": Recipe(
        (BlockScheme("MXFP4"),), {"embed.tokens": Q8_0, "head": Q8_0, "embed.ple": Q8_0, "ple.in": DENSE, "moe.router": DENSE}
    ),
    "iq4_xs": Recipe(IQ4_XS, {"embed.tokens": Q6_K, "head": Q6_K, "embed.ple": Q8_0, "ple.in": DENSE, "moe.router": DENSE}),
}
PIECE_ELEMENTS = 1 << 20  # drawn for a kind of matrix
Q6_K_DEVIATION = 18.5 * 40  # of 6-bit codes around 32, times the mean of their runs' scales
E2M1_DEVIATION = math.sqrt(sum(level**2 for level in E2M1_DOUBLED) / 16)
NONLINEAR_DEVIATION = math.sqrt(sum(level**2 for level in NONLINEAR) / 16)
IQ4_XS_DEVIATION = NONLINEAR_DEVIATION * 18.5  # of 6-bit scales around 32


def size_of(preset: str) -> Size:
    """Return the geometry of a size such as "E2B"; "tiny:E2B" is a narrow one. Raises ConfigError for an unknown size."""
    is_small = preset.lower().startswith(SMALL)
    size = SIZES[find_size(preset[len(SMALL) :] if is_small else preset)]
    return shrink(size) if is_small else size


def plan_of(preset: str, layers: int | None = None) -> ModelPlan:
    """Derive the plan of a size, or of its first `layers` layers. Raises ConfigError for more layers than it has."""
    plan = derive(configs.read(spell_config(size_of(preset))))
    if layers is None:
        return plan
    if not 1 <= layers <= len(plan.layers):
        raise ConfigError(f"layers: {preset} has {len(plan.layers)}, found {layers}")
    return replace(plan, layers=plan.layers[:layers])


def assistant_plan_of(preset: str, target: ModelPlan) -> ModelPlan:
    """Derive the plan of a size's assistant, whose layers read a target of the same preset. Raises ConfigError."""
    own = ASSISTANTS[find_size(preset.lower().removeprefix(SMALL))]
    own = shrink_assistant(own) if preset.lower().startswith(SMALL) else own
    return derive(configs.read(spell_assistant(own, size_of(preset))), target)


def make_params(plan: ModelPlan, quant: str, packer: Packer | None = None, device: torch.device = CPU) -> dict[str, Param]:
    """Make every parameter of a plan; `packer` brings packed matrices into the form that a backend reads.

    Raises ConfigError for an unknown quantization.
    """
    if quant not in QUANTS:
        raise ConfigError(f"quant: expected {', '.join(QUANTS)}, found {quant!r}")
    workshop = _Workshop(packer or PlainPacker(device), device)
    return {spec.name: _param(spec, plan, QUANTS[quant], workshop) for spec in plan.params()}


def _param(spec: ParamSpec, plan: ModelPlan, recipe: Recipe, workshop: _Workshop) -> Param:
    if spec.integer:  # the order of an assistant's tokens
        return torch.randperm(spec.elements, generator=workshop.generator).to(workshop.device)
    center, spread = distribution(spec, plan)
    if len(spec.shape) == 1:
        return (torch.randn(spec.shape, generator=workshop.generator) * spread + center).to(workshop.device)
    scheme = recipe.scheme(spec.name, spec.shape[-1])
    if spec.access is Access.ROWS and workshop.device == CPU:
        return Weight((_zeros(spec.shape, scheme),))
    names = tuple(name for name, _ in spec.parts)
    sizes = tuple(rows for _, rows in spec.parts) or (spec.shape[-2],)
    shapes = ((*spec.shape[:-2], rows, spec.shape[-1]) for rows in sizes)
    parts = tuple(workshop.matrix(shape, scheme, spread) for shape in shapes)
    return Weight(workshop.packer.arrange(parts), names)


class _Workshop:
    """Makes matrices; a piece of each kind is drawn and packed once."""

    def __init__(self, packer: Packer, device: torch.device) -> None:
        self.packer, self.device = packer, device
        self.generator = torch.Generator().manual_seed(0)
        self._pieces: dict[tuple[int, Scheme | None, float], Part] = {}

    def matrix(self, shape: tuple[int, ...], scheme: Scheme | None, spread: float) -> Part:
        """Repeat the piece of its kind until the matrix, or the stack of them, is full."""
        key = (shape[-1], scheme, spread)
        if key not in self._pieces:
            self._pieces[key] = self._lay_out(draw_piece(*key, self.generator))
        piece = self._pieces[key]
        if isinstance(piece, Tensor):
            return _repeated(piece, shape[:-1])
        if isinstance(piece, GpuPackedWeight):
            return piece.each(lambda array: _repeated(array, shape[:-1]))
        if isinstance(piece, CpuPackedWeight):
            panels = (*shape[:-2], -(-shape[-2] // PANEL))
            return replace(piece, data=_repeated(piece.data, panels), num_rows=shape[-2])
        if isinstance(piece, Blocks):
            return replace(piece, data=_repeated(piece.data, shape[:-1]))
        assert isinstance(piece, Affine)
        codes, scales, biases = (_repeated(array, shape[:-1]) for array in (piece.codes, piece.scales, piece.biases))
        return replace(piece, codes=codes, scales=scales, biases=biases)

    def _lay_out(self, drawn: Tensor | Blocks | Affine) -> Part:
        """Bring a piece into the form in which it is multiplied, where that is."""
        if isinstance(drawn, Tensor):
            return drawn.to(self.device)
        return self.packer.pack(drawn, lambda: None)


def draw_piece(columns: int, scheme: Scheme | None, spread: float, generator: torch.Generator) -> Tensor | Blocks | Affine:
    """Draw some rows of normal values as a file would hold them: packed by a scheme, or in bfloat16."""
    rows = max(1, PIECE_ELEMENTS // columns // PANEL) * PANEL
    values = torch.randn(rows, columns, generator=generator) * spread
    return values.bfloat16() if scheme is None else _pack(values, scheme, spread)


def _pack(values: Tensor, scheme: Scheme, spread: float) -> Blocks | Affine:
    """Quantize values, but for blocks that nothing here writes: their codes and scales are drawn."""
    if scheme.name not in _SCALERS:
        return scheme.quantize(values)
    kind = TYPES[scheme.name]
    rows, columns = values.shape
    blocks = np.random.default_rng(0).integers(0, 256, (rows * columns // kind.values, kind.nbytes), np.uint8)
    _SCALERS[scheme.name](blocks, spread)
    return Blocks(torch.from_numpy(blocks).view(rows, -1), kind)


def _scale_q6_k(blocks: NDArray[np.uint8], spread: float) -> None:
    blocks[:, 192:208] = blocks[:, 192:208] % 40 + 20  # the scales of 16 runs
    blocks[:, 208:] = _half(spread / Q6_K_DEVIATION)  # their common factor


def _scale_mxfp4(blocks: NDArray[np.uint8], spread: float) -> None:
    blocks[:, 0] = 128 + round(math.log2(spread / E2M1_DEVIATION))  # the nearest power of two


def _scale_iq4_nl(blocks: NDArray[np.uint8], spread: float) -> None:
    blocks[:, :2] = _half(spread / NONLINEAR_DEVIATION)


def _scale_iq4_xs(blocks: NDArray[np.uint8], spread: float) -> None:
    blocks[:, :2] = _half(spread / IQ4_XS_DEVIATION)


_SCALERS = {"Q6_K": _scale_q6_k, "MXFP4": _scale_mxfp4, "IQ4_NL": _scale_iq4_nl, "IQ4_XS": _scale_iq4_xs}


def _half(value: float) -> NDArray[np.uint8]:
    return np.array([value], np.float16).view(np.uint8)


def _repeated(piece: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Fill [*lead, width] with the rows of a piece [rows, width], over and over, in copies that double in size."""
    if piece.device == CPU:
        out: Tensor = allocate((*lead, piece.shape[1] * piece.itemsize)).view(piece.dtype)
    else:
        out = piece.new_empty(*lead, piece.shape[1])
    rows = out.view(-1, piece.shape[1])
    done = min(len(piece), len(rows))
    rows[:done] = piece[:done]
    while done < len(rows):
        count = min(done, len(rows) - done)
        rows[done : done + count] = rows[:count]
        done += count
    return out


def _zeros(shape: tuple[int, ...], scheme: Scheme | None) -> Part:
    """Make a table of zeros whose memory comes into being where it is read."""
    rows, columns = shape
    if scheme is None:
        return _untouched(rows, 2 * columns).view(torch.bfloat16)
    if isinstance(scheme, BlockScheme):
        kind = TYPES[scheme.name]
        return Blocks(_untouched(rows, kind.row_bytes(columns)), kind)
    scales, biases = (_untouched(rows, 2 * columns // scheme.group).view(torch.bfloat16) for _ in range(2))
    return Affine(_untouched(rows, columns * scheme.bits // 8), scales, biases, scheme.bits, scheme.group)


def _untouched(rows: int, row_bytes: int) -> Tensor:
    return torch.from_numpy(np.zeros((rows, row_bytes), np.uint8))
