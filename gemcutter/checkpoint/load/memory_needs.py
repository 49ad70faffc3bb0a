"""What a model will take in memory, told from headers and the plan before anything is loaded or downloaded.

Owns the count of weights by how they are held (mapped, in memory, read by rows), whole or what a rank takes of them, which
follows `held.py` and the loader, the estimate of all else, which was measured, and what a quantization leaves as it is. Refuses
to know options and how numbers are shown. Imports no torch, unless weights are to be quantized: read `cli/inspect.py` for the
user, `load_params.py` for what is counted here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.load.held import ITEM_BYTES, stays_mapped
from gemcutter.checkpoint.load.match import Checkpoint, Piece
from gemcutter.param_spec import Access, ParamSpec
from gemcutter.plan import INT8_SCALE_BYTES, ModelPlan

Shape = tuple[int, ...]
Shapes = Sequence[Shape]

PANEL_ROWS, PANEL_ALIGN = 16, 64  # as in `quant/cpu_layout.py`, which imports torch
# Bits of a value in the panels of the CPU kernels, its scales included; `quant/cpu_layout.py` is the definition.
PANEL_BITS = {
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q5_0": 6.5,
    "Q5_1": 7.0,
    "Q8_0": 8.5,
    "IQ4_NL": 4.5,
    "MXFP4": 4.5,
    "NVFP4": 5.0,
    "Q2_K": 8.0,
    "Q3_K": 4.5625,
    "Q4_K": 4.625,
    "Q5_K": 6.625,
    "Q6_K": 6.5625,
    "IQ4_XS": 4.5625,
    "IQ3_S": 4.5625,
    "IQ3_XXS": 4.5625,
    "IQ2_S": 4.5625,
    "IQ2_XS": 4.5625,
    "IQ2_XXS": 4.5625,
    "IQ1_M": 4.5625,
    "IQ1_S": 4.5625,
    "TQ2_0": 4.0625,
    "TQ1_0": 4.0625,
    "mxfp4": 4.5,
    "nvfp4": 5.0,
}
INTEGERS = re.compile(r"(?P<kind>affine|packed|int|awq)(?P<bits>[1-8])(?:g(?P<group>\d+))?(?P<zeros>z?)")
SCALE_BITS = {"affine": 32, "packed": 16, "int": 16, "awq": 64}  # of a group: a scale, and a bias beside it in two of them
ZEROS_BITS = 64  # of a group with zero points, whose scale and bias are float32

# All else, fitted to peaks of resident memory on Linux with torch 2.13: from 0.26 GB (the demo) to 3.9 GB, all within 15 %.
PROCESS_BYTES = 245_000_000  # Python, torch, and this package
PIECE_BYTES = 250  # of the tokenizer, for each piece of the vocabulary
PACKING_BYTES, MOST_PACKING_BYTES = 20_000_000, 100_000_000  # beside the largest stored matrix, while it is packed
STEP_ROWS = 512  # of the chunk of a long prompt
BUFFER_SHARE = 0.8  # of what the rows of a step would take if nothing were reused


@dataclass(frozen=True, slots=True)
class WeightMemory:
    """Bytes of weights by how they are held."""

    mapped: int = 0  # used where they lie in the file: in the page cache, which other processes share and the system may drop
    resident: int = 0  # in memory of the process's own, or of the GPU
    by_rows: int = 0  # tables that stay on disk: only the rows of the tokens in use are read

    def __add__(self, other: WeightMemory) -> WeightMemory:
        """Return both together."""
        return WeightMemory(self.mapped + other.mapped, self.resident + other.resident, self.by_rows + other.by_rows)

    @property
    def held(self) -> int:
        """Count the bytes that are in memory as a whole."""
        return self.mapped + self.resident

    @property
    def nbytes(self) -> int:
        """Count the bytes, wherever they are."""
        return self.mapped + self.resident + self.by_rows


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A piece of a matrix as a file stores it: dtype or packed scheme, whole shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    is_packed: bool

    @staticmethod
    def of(data: LazyTensor | PackedTensor) -> StoredPart:
        """Return what headers tell of a stored tensor."""
        return StoredPart(data.dtype, data.shape, data.nbytes, isinstance(data, PackedTensor))

    def share(self, shape: Shape) -> int:
        """Count the bytes of what is taken of it, rows or columns that make such a shape."""
        return self.nbytes * math.prod(shape) // max(1, math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class Holding:
    """How weights are held once they are loaded for a compute dtype on a type of device.

    `packing` is a backend's name for how a stored scheme is held, `quant` the recipe by which dense weights are quantized.
    """

    compute: str
    device: str
    packing: Callable[[str], str]
    quant: str | None = None

    def weight(
        self, spec: ParamSpec, parts: Sequence[StoredPart], shapes: Sequence[Shapes], changed: Sequence[bool]
    ) -> WeightMemory:
        """Count the bytes of one parameter, of which `shapes` are taken of each stored part.

        An adapter is merged into the parts that are `changed`.
        """
        if len(spec.shape) < 2:
            return WeightMemory(resident=4 * spec.elements)
        if spec.access is Access.ROWS and self.device == "cpu":
            held = zip(parts, shapes, strict=True)
            return WeightMemory(by_rows=sum(part.share(shape) for part, taken in held for shape in taken))
        dense = [part.dtype for part in parts if not part.is_packed]
        scheme = None if self.quant is None or spec.access is Access.ROWS else recipe_scheme(self.quant, spec)
        found = {"mapped": 0, "resident": 0}
        for part, taken, is_changed in zip(parts, shapes, changed, strict=True):
            for shape in taken:
                how, nbytes = self._part(part, shape, dense, scheme, is_changed)
                found[how] += nbytes
        return WeightMemory(**found)

    def _part(self, part: StoredPart, shape: Shape, dense: list[str], scheme: str | None, is_changed: bool) -> tuple[str, int]:
        """Return how what is taken of a stored part is held, and in how many bytes."""
        elements = math.prod(shape)
        stored, computed = part.share(shape), elements * ITEM_BYTES[self.compute]
        if scheme is not None and (is_changed or not part.is_packed):
            return "resident", self._packed_bytes(scheme, shape, computed)
        if is_changed:
            return "resident", computed
        if part.is_packed:
            is_repacked = self.packing(part.dtype) != part.dtype
            if self.device != "cpu":
                return "resident", stored
            return ("resident", self._packed_bytes(part.dtype, shape, stored)) if is_repacked else ("mapped", stored)
        if stays_mapped(dense, part.dtype, self.compute, self.device):
            return "mapped", stored
        return "resident", computed

    def _packed_bytes(self, scheme: str, shape: Shape, otherwise: int) -> int:
        """Count the bytes of a matrix in the form that kernels read; `otherwise` where it is not known."""
        bits = panel_bits(scheme)
        if bits is None:
            return otherwise
        return panel_bytes(shape, bits) if self.device == "cpu" else int(math.prod(shape) * bits / 8)


def weight_memory(
    checkpoint: Checkpoint,
    compute: str,
    device: str,
    packing: Callable[[str], str],
    quant: str | None = None,
    changed: Collection[Piece] = (),
) -> WeightMemory:
    """Count the bytes that the weights of a whole model take, held as `Holding` says.

    `changed` are the pieces that an adapter is merged into.
    """
    return sum(param_memory(checkpoint, Holding(compute, device, packing, quant), changed).values(), WeightMemory())


def param_memory(checkpoint: Checkpoint, holding: Holding, changed: Collection[Piece] = ()) -> dict[str, WeightMemory]:
    """Count the bytes that each parameter of a whole model takes."""
    found = dict[str, WeightMemory]()
    for spec in checkpoint.plan.params():
        pieces = checkpoint.matched.pieces[spec.name]
        parts = [StoredPart.of(piece.data) for piece in pieces]
        whole = [(part.shape,) for part in parts]
        found[spec.name] = holding.weight(spec, parts, whole, [(spec.name, piece.part) in changed for piece in pieces])
    return found


def recipe_scheme(quant: str, spec: ParamSpec) -> str | None:
    """Return the scheme that a recipe gives a matrix; None where it stays dense."""
    from gemcutter.quant.recipes import RECIPES  # imports torch

    scheme = RECIPES[quant].scheme(spec.name, spec.stored_shape[-1])
    return None if scheme is None else scheme.name


def panel_bytes(shape: Shape, bits: float) -> int:
    """Count the bytes of a matrix, or a stack of them, in panels of whole rows, each of which begins at a cache line."""
    stride = -(-PANEL_ROWS * shape[-1] * bits // (8 * PANEL_ALIGN)) * PANEL_ALIGN
    return math.prod(shape[:-2]) * -(-shape[-2] // PANEL_ROWS) * int(stride)


def panel_bits(scheme: str) -> float | None:
    """Return how many bits a value of a scheme takes once it is repacked for the CPU kernels; None where it is not known."""
    if scheme in PANEL_BITS:
        return PANEL_BITS[scheme]
    found = INTEGERS.fullmatch(scheme)
    if found is None:
        return None
    bits, group = int(found["bits"]), int(found["group"] or 0)
    codes = 4 if bits <= 4 else 6 if bits <= 6 else 8
    scales = ZEROS_BITS if found["zeros"] else SCALE_BITS[found["kind"]]
    return codes + (scales / group if group else 0.0)


def kv_widths(compute: str, kv: str | None) -> tuple[int, int]:
    """Return the bytes of an element of the cache, and of the scale beside each key and value vector of a head."""
    return ITEM_BYTES[compute] if kv is None else 1, INT8_SCALE_BYTES if kv == "int8" else 0


def other_memory(checkpoint: Checkpoint, is_packing: bool) -> int:
    """Estimate what a process on a CPU takes beside weights, keys and values; `is_packing` where weights are packed at load."""
    plan = checkpoint.plan
    largest = max(
        (piece.data.nbytes for spec in plan.params() if spec.access is not Access.ROWS for piece in _pieces(checkpoint, spec)),
        default=0,
    )
    packing = min(PACKING_BYTES + largest, MOST_PACKING_BYTES) if is_packing else 0
    return PROCESS_BYTES + PIECE_BYTES * plan.vocab + packing + step_memory(plan)


def step_memory(plan: ModelPlan, rows: int = STEP_ROWS) -> int:
    """Estimate the bytes of the rows of one step, in float32, on their way through the widest layer."""
    widest = 0
    for layer in plan.layers:
        experts = layer.moe.top_k * 2 * (plan.hidden + layer.moe.width) if layer.moe else 0
        widest = max(widest, 2 * layer.heads * layer.head_dim + 2 * layer.mlp_width + experts)
    return int(BUFFER_SHARE * rows * 4 * (4 * plan.hidden + widest))


def quant_notes(checkpoint: Checkpoint, quant: str, changed: Collection[Piece] = ()) -> list[str]:
    """Return a note where quantizing while loading leaves matrices as they are, because the file holds them packed.

    Those that an adapter has changed are packed again.
    """
    specs = [spec for spec in checkpoint.plan.params() if len(spec.shape) > 1 and spec.access is not Access.ROWS]
    found = [(spec.name, piece) for spec in specs for piece in _pieces(checkpoint, spec)]
    packed = [
        piece.data.dtype for name, piece in found if isinstance(piece.data, PackedTensor) and (name, piece.part) not in changed
    ]
    if not packed:
        return []
    how_many = f"{len(packed)} of {len(found)}"
    start = f"quant {quant} has no effect: all" if len(packed) == len(found) else f"quant {quant}: {how_many}"
    return [f"{start} matrices ({', '.join(sorted(set(packed)))}) are packed in the file already, and stay as they are"]


def _pieces(checkpoint: Checkpoint, spec: ParamSpec) -> tuple[StoredTensor, ...]:
    return checkpoint.matched.pieces[spec.name]
