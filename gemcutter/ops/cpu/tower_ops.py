"""What layers of vision and audio encoders on the native kernels share: products as C structs, and pieces of some rows.

Owns how long a piece takes; refuses to know layers. Read `vision_ops.py` and `audio_ops.py` for who uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gemcutter.native import ClipView
from gemcutter.ops.cpu.adapters import carry_deltas
from gemcutter.ops.cpu.bindings import whole_matrix
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import Param, matrix
from gemcutter.quant import Weight
from gemcutter.tower_plan import BOUNDS

PIECE_SECONDS = 0.03  # that others wait for a piece of an image or a sound, at most by intention
UNIT_ROWS, FIRST_ROWS, MOST_ROWS = 64, 256, 1 << 16  # of a piece: a multiple, the first guess, a bound


class Products:
    """The matrices of a layer and how they are clipped, by a struct's names; it keeps them, and what adapters add, alive.

    `names` says the parameter, and the part of it, of each.
    """

    def __init__(self, params: Mapping[str, Param], names: Mapping[str, tuple[str, str | None]]) -> None:
        self._weights, self._clips, self._alive = dict[str, Weight](), dict[str, ClipView](), list[Any]()
        for own, (name, part) in names.items():
            weight = matrix(params, name) if part is None else matrix(params, name).part(part)
            self._weights[own] = weight
            prefix = name if part is None else f"{name}.{part}"
            given = [bound for each in BOUNDS if isinstance(bound := params.get(f"{prefix}.{each}"), Tensor)]
            if given:
                self._clips[f"{own}_clip"] = ClipView(*map(float, given))

    @property
    def is_clipped(self) -> bool:
        """Return whether values are clamped around the products."""
        return bool(self._clips)

    def fields(self) -> dict[str, Any]:
        """Return the fields of the layer's struct."""
        matrices = {own: whole_matrix(weight) for own, weight in self._weights.items()}
        self._alive += [carry_deltas(matrices[own], weight.deltas) for own, weight in self._weights.items() if weight.deltas]
        return matrices | self._clips


class Pieces:
    """One half of a layer, computed some rows at a time: as many as take about PIECE_SECONDS, by what earlier ones took.

    How rows are cut does not change a bit of them: a piece has more than the 16 rows for which sums are ordered otherwise.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call, self._rows = call, FIRST_ROWS

    def run(self, rows: int, turns: Turns, before: tuple[int, ...], more: tuple[int, ...]) -> None:
        """Compute all rows, a turn a piece; `before` and `more` are the arguments on either side of a piece's edges."""
        first = 0
        while first < rows:
            last = first + self._rows if rows - first >= 2 * self._rows else rows
            with turns.turn():
                start = time.perf_counter()
                self._call(*before, first, last, *more)
                seconds = time.perf_counter() - start
            fit = int((last - first) * PIECE_SECONDS / max(seconds, 1e-6)) // UNIT_ROWS * UNIT_ROWS
            self._rows, first = min(max(fit, UNIT_ROWS, self._rows // 2), 2 * self._rows, MOST_ROWS), last
