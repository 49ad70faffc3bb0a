"""One step of the decoder: flat rows of any number of sequences.

Prefill, chunk, decode and verification differ only in row counts. Owns the `Step` and the protocol of the pool it writes to and
reads from; refuses to know requests and page accounting. Shape letters: N rows, M kept rows, S sequences, T keys, K key heads,
E head dim. Read `engine/step.py` for who builds it, `cache/pool.py` for the pool.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, repeat
from typing import Any, Protocol

import torch
from torch import Tensor

from gemcutter.plan import RopeSpec

ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True)
class Span:
    """The keys of one sequence in one group: positions start, start + 1, ... lie in the slots `where` of the pool.

    `where` is a slice when the pages are consecutive (then reading is a view), else slot numbers [T]. `pages` are the pages of
    `page_tokens` slots that hold them, in order; a span that was written by hand need not name them.
    """

    start: int
    where: slice | Tensor
    pages: tuple[int, ...] = ()
    page_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Compact:
    """A layer's slots where values are the normalised keys n: n is stored once, as values, and keys only where they turn.

    The R columns of a key whose pairs turn, 0 to R/2 - 1 and E/2 to E/2 + R/2 - 1, are stored beside n; the others are
    weight_E * n, which readers rebuild or leave to the queries. `weight_E` is the key norm's weight in float32, 1 where
    columns turn.
    """

    normed_TKE: Tensor
    turned_TKR: Tensor
    weight_E: Tensor

    def turning(self, x_E: Tensor) -> tuple[Tensor, Tensor]:
        """Give the columns of the last axis that turn, as views of both halves."""
        pairs, half = self.turned_TKR.shape[-1] // 2, self.weight_E.shape[0] // 2
        return x_E[..., :pairs], x_E[..., half : half + pairs]

    def write(self, slots_N: Tensor, k_NKE: Tensor, n_NKE: Tensor) -> None:
        """Store keys, and values that are the keys without weight and rotation."""
        store(self.normed_TKE, slots_N, n_NKE)
        store(self.turned_TKR, slots_N, torch.cat(self.turning(k_NKE), dim=-1))

    def keys(self, where: slice | Tensor) -> Tensor:
        """Rebuild the keys [T, K, E] of some slots."""
        keys = (self.normed_TKE[where].float() * self.weight_E).to(self.normed_TKE.dtype)
        for found, stored in zip(self.turning(keys), self.turned_TKR[where].chunk(2, dim=-1), strict=True):
            found.copy_(stored)
        return keys


def store(slots_TKX: Tensor, slots_N: Tensor, rows_NKX: Tensor) -> None:
    """Put rows into slots, rounded to the dtype that the slots have."""
    rows = rows_NKX.to(slots_TKX.dtype)
    if slots_TKX.dtype == torch.float8_e4m3fn:  # which torch moves as bytes only
        slots_TKX, rows = slots_TKX.view(torch.uint8), rows.view(torch.uint8)
    slots_TKX.index_copy_(0, slots_N, rows)


class Pool(Protocol):
    """What kernels need of the cache: storage of the layers that write."""

    def write(self, layer: int, slots_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        """Store keys and values of a writing layer."""

    def read(self, layer: int, span: Span) -> tuple[Tensor, Tensor]:
        """Give keys and values [T, K, E] of a span."""

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """Give the tensors [T, K, E] in which a writing layer's slots lie; the same ones as long as the pool lives.

        Raises KernelError for a compact layer.
        """

    def compact(self, layer: int) -> Compact | None:
        """Give the slots of a layer that is stored compactly; None for all others."""


@dataclass(frozen=True, slots=True)
class Step:
    """Flat rows of S sequences; row_start has S + 1 entries, sequence s owns rows row_start[s] to row_start[s + 1] - 1.

    `positions_N` are absolute. `spans` and `slots` are keyed by window (None: the global group): what each sequence may read,
    this step's rows included, and where each row's keys go. `keep` lists the rows whose logits or states are wanted, ascending;
    None keeps all.
    """

    ids_N: Tensor
    ple_ids_N: Tensor
    positions_N: Tensor
    row_start: tuple[int, ...]
    spans: dict[int | None, tuple[Span, ...]]
    slots: dict[int | None, Tensor]
    keep: tuple[int, ...] | None
    rope: dict[RopeSpec, tuple[Tensor, Tensor]]  # cos and sin [N, 1, E/2] for these rows, in the rows' dtype
    adapters: tuple[str | None, ...] = ()  # whose changes each sequence's rows get; () where no sequence wants any
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)  # what kernels made of it, once

    def kept(self) -> Step:
        """Narrow the step to the rows it keeps; what has been written stays readable."""
        if self.keep is None:
            return self
        if "kept" not in self.memo:
            self.memo["kept"] = self._narrow(self.keep, self.keep_M)
        found: Step = self.memo["kept"]
        return found

    def _narrow(self, rows: tuple[int, ...], keep_M: Tensor | None) -> Step:
        return replace(
            self,
            ids_N=self.ids_N[keep_M],
            ple_ids_N=self.ple_ids_N[keep_M],
            positions_N=self.positions_N[keep_M],
            row_start=tuple(bisect_left(rows, start) for start in self.row_start),
            slots={},
            keep=None,
            rope={spec: (cos[keep_M], sin[keep_M]) for spec, (cos, sin) in self.rope.items()},
        )

    @property
    def keep_M(self) -> Tensor | None:
        """Give the kept rows beside the rows, sent there once; None where all are kept."""
        if self.keep is None:
            return None
        if "keep" not in self.memo:
            (self.memo["keep"],) = send((self.keep,), torch.long, self.positions_N.device)
        found: Tensor = self.memo["keep"]
        return found

    @property
    def num_rows(self) -> int:
        """Count the rows."""
        return self.row_start[-1]

    @property
    def keeps_none(self) -> bool:
        """Tell whether no row is wanted, as in the middle chunks of a prompt."""
        return self.keep is not None and not self.keep


def send(fields: Iterable[Iterable[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Bring lists of integers (int32 or int64) to a device, in one copy that the host does not wait for.

    Each begins at a multiple of ALIGNMENT bytes: kernels that are compiled for how their arguments are aligned meet one case.
    """
    code, unit = ("i", ALIGNMENT // 4) if dtype == torch.int32 else ("q", ALIGNMENT // 8)
    arrays = [array(code, field) for field in fields]
    sizes = [len(each) for each in arrays]
    for each in arrays:
        each.extend(repeat(0, -len(each) % unit))
    flat = array(code, chain.from_iterable(arrays)) or array(code, (0,))
    here = torch.frombuffer(flat, dtype=dtype)
    there = here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
    starts = accumulate(map(len, arrays), initial=0)
    return [there[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def window_mask(q_positions_M: Tensor, k_positions_T: Tensor, window: int | None) -> Tensor:
    """Tell which keys each query sees, [M, T]: not later than itself, and at most `window` of them counting its own."""
    seen = k_positions_T <= q_positions_M[:, None]
    return seen if window is None else seen.logical_and_(k_positions_T > q_positions_M[:, None] - window)
