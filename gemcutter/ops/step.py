"""One step of the decoder: flat rows of any number of sequences.

Prefill, chunk, decode and verification differ only in row counts. Owns `Step`, a value that holds all that kernels need of a
step, and the protocol of the cache that they write to and read from; refuses to know requests and page accounting. Shape letters:
N rows, M rows that go on after the last writer, S sequences, T keys, K key heads, E head dim, D hidden. Read `engine/step.py` for
who builds it, `cache/pool.py` for the cache, `backend.py` for the attention metadata.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, repeat
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from gemcutter.plan import GroupId, RopeSpec

ALIGNMENT = 16  # bytes
INT8_STEPS = 127.0  # from 0 to the largest magnitude of a vector
LEAST_MAGNITUDE = 1e-36  # the inverse of anything smaller overflows: such a vector is stored as zeros

Rows = slice | Tensor  # neighbours as a slice, others as row numbers
AdapterRows = Mapping[str, Rows]  # which rows of a step get which adapter's changes
NO_ADAPTERS: AdapterRows = MappingProxyType({})
Rotation = tuple[Tensor, Tensor]  # cos and sin [N, 1, E/2]


@dataclass(frozen=True, slots=True)
class KVRange:
    """The keys of one sequence in one group: positions start, start + 1, ... are in the slots `where` of the cache.

    `where` is a slice when the pages are consecutive (then reading is a view), else slot numbers [T]. `pages` are the pages of
    `page_tokens` slots that hold them, in order; a range that was written by hand need not name them.
    """

    start: int
    where: slice | Tensor
    pages: tuple[int, ...] = ()
    page_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KEqVCache:
    """A layer's slots where values are the normalised keys n: n is stored once, as values, and of keys the rotary columns alone.

    The R columns of a key whose pairs rotate, 0 to R/2 - 1 and E/2 to E/2 + R/2 - 1, are stored apart; the others are
    weight_E * n, which readers rebuild or leave to the queries. `weight_E` is the key norm's weight in float32, 1 in the
    rotary columns.
    """

    normed_TKE: Tensor
    rotary_TKR: Tensor
    weight_E: Tensor

    def rotary(self, x_E: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary columns of the last axis, as views of both halves."""
        pairs, half = self.rotary_TKR.shape[-1] // 2, self.weight_E.shape[0] // 2
        return x_E[..., :pairs], x_E[..., half : half + pairs]

    def write(self, slots_N: Tensor, k_NKE: Tensor, n_NKE: Tensor) -> None:
        """Store keys, and values that are the keys without weight and rotation."""
        store(self.normed_TKE, slots_N, n_NKE)
        store(self.rotary_TKR, slots_N, torch.cat(self.rotary(k_NKE), dim=-1))

    def keys(self, where: slice | Tensor) -> Tensor:
        """Rebuild the keys [T, K, E] of some slots."""
        keys = (self.normed_TKE[where].float() * self.weight_E).to(self.normed_TKE.dtype)
        for found, stored in zip(self.rotary(keys), self.rotary_TKR[where].chunk(2, dim=-1), strict=True):
            found.copy_(stored)
        return keys


@dataclass(frozen=True, slots=True)
class Int8KVCache:
    """A layer's slots in 8 bits: codes [T, K, E] of keys and values, and scales [T, K], one for each of these vectors.

    A vector is its codes times its scale, in float32. The scale is the vector's largest magnitude over 127, and 0 for a vector
    of zeros; codes are rounded to nearest, ties to even. A vector with an element that is not finite becomes NaN as a whole.
    """

    keys_TKE: Tensor
    values_TKE: Tensor
    key_scales_TK: Tensor
    value_scales_TK: Tensor

    def write(self, slots_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        """Quantize and store keys and values [N, K, E], one slot a row."""
        stored = ((k_NKE, self.keys_TKE, self.key_scales_TK), (v_NKE, self.values_TKE, self.value_scales_TK))
        for rows_NKE, slots_TKE, scales_TK in stored:
            codes_NKE, scales_NK = quantize_vectors(rows_NKE)
            slots_TKE.index_copy_(0, slots_N, codes_NKE)
            scales_TK.index_copy_(0, slots_N, scales_NK)

    def read(self, where: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [T, K, E] of some slots in float32."""
        keys_TKE = self.keys_TKE[where].float() * self.key_scales_TK[where].unsqueeze(-1)
        return keys_TKE, self.values_TKE[where].float() * self.value_scales_TK[where].unsqueeze(-1)


def quantize_vectors(x_NKE: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [N, K, E] and float32 scales [N, K] of vectors, as `Int8KVCache` describes them."""
    wide = x_NKE.float()
    largest = wide.abs().amax(-1, keepdim=True)
    is_finite = largest.isfinite()
    by = torch.where(largest > LEAST_MAGNITUDE, INT8_STEPS / largest, 0.0)
    codes = torch.where(is_finite, (wide * by).round(), 0.0).to(torch.int8)
    scales = torch.where(is_finite, torch.where(by > 0, largest / INT8_STEPS, 0.0), torch.nan)
    return codes, scales.squeeze(-1)


def store(slots_TKX: Tensor, slots_N: Tensor, rows_NKX: Tensor) -> None:
    """Put rows into slots, rounded to the dtype that the slots have."""
    rows = rows_NKX.to(slots_TKX.dtype)
    if slots_TKX.dtype == torch.float8_e4m3fn:  # which torch moves as bytes only
        slots_TKX, rows = slots_TKX.view(torch.uint8), rows.view(torch.uint8)
    slots_TKX.index_copy_(0, slots_N, rows)


class KVCache(Protocol):
    """What kernels need of the cache: storage of the layers that write."""

    def write(self, layer: int, slots_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        """Store keys and values of a writing layer."""

    def read(self, layer: int, kv_range: KVRange) -> tuple[Tensor, Tensor]:
        """Return keys and values [T, K, E] of a range."""

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the tensors [T, K, E] that hold a writing layer's slots; the same ones as long as the cache lives.

        Raises KernelError for a layer that is stored compactly, or in 8 bits with scales.
        """

    def compact(self, layer: int) -> KEqVCache | None:
        """Return the slots of a layer that is stored compactly; None for all others."""

    def int8(self, layer: int) -> Int8KVCache | None:
        """Return the slots of a layer that is stored in 8 bits with scales; None for all others."""


@dataclass(frozen=True, slots=True)
class MediaRows:
    """Rows of a step that are no tokens: row rows_K[k] of the step enters the layers as embeds_KD[k]."""

    rows_K: Tensor
    embeds_KD: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """Flat rows of S sequences; query_start has S + 1 entries, sequence s owns rows query_start[s] to query_start[s + 1] - 1.

    `positions_N` are absolute, ascending within a sequence. `kv_ranges` says what each sequence may read of a group, this step's
    rows included, `slot_mapping` where each row's keys and values go. `logit_rows` lists the rows whose final states are wanted,
    ascending; None: all. `last_visible` is, by group, the last position that each row may see there, [N], its own where it is
    less, never descending within a sequence; in groups that it does not name rows see up to themselves. What follows `adapters`
    is made by `prepare`.
    """

    ids_N: Tensor
    ple_ids_N: Tensor
    positions_N: Tensor
    query_start: tuple[int, ...]
    kv_ranges: dict[GroupId, tuple[KVRange, ...]]
    slot_mapping: dict[GroupId, Tensor]
    logit_rows: tuple[int, ...] | None
    rope: dict[RopeSpec, Rotation]  # for these rows, in the rows' dtype
    last_visible: Mapping[GroupId, Tensor] = field(default_factory=dict)
    media: MediaRows | None = None
    adapters: tuple[str | None, ...] = ()  # whose changes each sequence's rows get; () where no sequence wants any
    adapter_rows: AdapterRows = field(default_factory=lambda: NO_ADAPTERS)
    attn_metadata: Mapping[GroupId, object] = field(default_factory=dict)  # as the backend's attention kernels want it
    logit_rows_M: Tensor | None = None  # `logit_rows` on the rows' device; None where all go on
    kept: Step | None = None  # the step of the rows that go on after the last writer; None where all do

    @property
    def num_rows(self) -> int:
        """Count the rows."""
        return self.query_start[-1]

    @property
    def keeps_none(self) -> bool:
        """Return whether no row's state is wanted, as in the middle chunks of a prompt."""
        return self.logit_rows is not None and not self.logit_rows

    @property
    def remaining(self) -> Step:
        """Return the step of the rows that go on after the last writer: itself where all do."""
        return self if self.kept is None else self.kept

    def narrow(self, rows: tuple[int, ...], rows_M: Tensor) -> Step:
        """Return the step of some rows, given twice: what has been written stays readable, nothing more is written."""
        return replace(
            self,
            ids_N=self.ids_N[rows_M],
            ple_ids_N=self.ple_ids_N[rows_M],
            positions_N=self.positions_N[rows_M],
            query_start=tuple(bisect_left(rows, start) for start in self.query_start),
            slot_mapping={},
            logit_rows=None,
            rope={spec: (cos[rows_M], sin[rows_M]) for spec, (cos, sin) in self.rope.items()},
            last_visible={group: last_N[rows_M] for group, last_N in self.last_visible.items()},
            media=None,
            adapter_rows=NO_ADAPTERS,
            attn_metadata={},
            logit_rows_M=None,
            kept=None,
        )


def prepare(step: Step, metadata: Callable[[Step], Mapping[GroupId, object]] = lambda step: {}) -> Step:
    """Complete a step: the rows that go on, the rows of every adapter, and the attention metadata of both sets of rows."""
    step = replace(step, adapter_rows=rows_of_adapters(step))
    if step.logit_rows is None:
        return replace(step, attn_metadata=metadata(step), logit_rows_M=None, kept=None)
    (rows_M,) = send((step.logit_rows,), torch.long, step.positions_N.device)
    kept = step.narrow(step.logit_rows, rows_M)
    kept = replace(kept, adapter_rows=rows_of_adapters(kept))
    kept = replace(kept, attn_metadata=metadata(kept) if step.logit_rows else {})
    return replace(step, attn_metadata=metadata(step), logit_rows_M=rows_M, kept=kept)


def rows_of_adapters(step: Step) -> AdapterRows:
    """Return the rows of every adapter that some sequence of a step wants."""
    found: dict[str, list[int]] = {}
    for index, adapter in enumerate(step.adapters):
        if adapter is not None:
            found.setdefault(adapter, []).extend(range(step.query_start[index], step.query_start[index + 1]))
    device = step.positions_N.device
    return {adapter: _as_slice(rows, device) for adapter, rows in found.items() if rows}


def _as_slice(rows: list[int], device: torch.device) -> Rows:
    """Return ascending row numbers as a slice if there is no gap."""
    is_run = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if is_run else torch.tensor(rows, device=device)


def send(fields: Iterable[Iterable[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Bring lists of integers (int32 or int64) to a device, in one copy that the host does not wait for.

    Each begins at a multiple of ALIGNMENT bytes: kernels that are compiled for how their arguments are aligned see one case.
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


def visible_mask(
    q_positions_M: Tensor, k_positions_T: Tensor, window: int | None, last_visible_M: Tensor | None = None
) -> Tensor:
    """Return which keys each query sees, [M, T]: none later than itself, or than its last visible position where that is later,
    and none `window` or more positions before itself.
    """
    last_M = q_positions_M if last_visible_M is None else torch.maximum(q_positions_M, last_visible_M)
    seen = k_positions_T <= last_M[:, None]
    return seen if window is None else seen.logical_and_(k_positions_T > q_positions_M[:, None] - window)
