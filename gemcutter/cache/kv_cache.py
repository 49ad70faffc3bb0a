"""Storage of keys and values, page by page.

Owns one pair of tensors per KV-*writing* layer and the page allocators of every group; layers that only read have no storage.
Refuses to know sequences: a page is taken, shared and dropped by `block_table.py`. Pages of a group are numbered alike in all its
layers. A layer whose values are its normalised keys may be stored compactly (`ops/step.py:KEqVCache`); int8 comes with scales
(`ops/step.py:Int8KVCache`). Shape letters: T slots, K key heads, E head dim.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemcutter.errors import CapacityError, KernelError
from gemcutter.ops.step import Int8KVCache, KEqVCache, KVRange, store
from gemcutter.plan import INT8_SCALE_BYTES, GroupId, ModelPlan

PAGE_BOOK_BYTES = 136  # of Python's memory for one free page: an integer, and its places in a list, a set and a heap
LARGEST_BOOK = 1 / 8  # of the machine's memory


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many pages a group has, and how many positions one page holds."""

    pages: int
    tokens: int


def check_books(counts: Mapping[GroupId, PoolSize]) -> None:
    """Raise CapacityError where the lists of free pages alone would take more than a part of this machine's memory.

    Storage itself is refused by torch, or provided by the system where it is touched; these lists are filled at once.
    """
    nbytes = PAGE_BOOK_BYTES * sum(each.pages for each in counts.values())
    if nbytes > machine_bytes() * LARGEST_BOOK:
        raise CapacityError(
            f"a cache of {spell_positions(counts)} positions needs {nbytes / 1e9:,.0f} GB for its lists of pages alone, and this "
            f"machine has {machine_bytes() / 1e9:,.0f} GB; lower the context, the batch (max_num_seqs) or prefix_cache_bytes"
        )


def spell_positions(counts: Mapping[GroupId, PoolSize]) -> str:
    """Return how many positions each group of layers has room for."""
    return ", ".join(f"{each.pages * each.tokens} {group}" for group, each in counts.items())


def scale_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of the scale beside each key and value vector of a head in a cache of this dtype; 0: it has none."""
    return INT8_SCALE_BYTES if dtype == torch.int8 else 0


def machine_bytes() -> int:
    """Return this machine's memory; where the system does not tell, as much as none has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 50


class PageAllocator:
    """Which pages of one group are free, and how many block tables hold each of the others."""

    def __init__(self, count: PoolSize) -> None:
        self.tokens = count.tokens
        self.ref_counts = [0] * count.pages
        self._free = set(range(count.pages))
        self._lowest = list(range(count.pages))  # a heap that may name pages taken since

    @property
    def free(self) -> int:
        """Count the free pages."""
        return len(self._free)

    def take(self, after: int | None) -> int:
        """Take a free page: the one that follows `after` if it can be had, so that reading stays a view; else the lowest."""
        if after is not None and after + 1 in self._free:
            page = after + 1
        else:
            while self._lowest and self._lowest[0] not in self._free:
                heapq.heappop(self._lowest)
            if not self._lowest:
                raise CapacityError("no free cache page is left")
            page = heapq.heappop(self._lowest)
        self._free.remove(page)
        self.ref_counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """Let one more table hold a page."""
        self.ref_counts[page] += 1

    def drop(self, page: int) -> None:
        """Let one table go of a page; it is free once nobody holds it."""
        self.ref_counts[page] -= 1
        if not self.ref_counts[page]:
            self._free.add(page)
            heapq.heappush(self._lowest, page)
            if len(self._lowest) > 2 * len(self.ref_counts):  # pages taken by `after` stay in it
                self._lowest = sorted(self._free)  # a sorted list is a heap


class PoolMirror(Protocol):
    """Who has caches of the same pages elsewhere: the other tensor-parallel ranks."""

    def copy_page(self, pool: PagedKVCache, group: GroupId, source: int, target: int) -> None:
        """Copy one page of a group in all its layers."""


class PagedKVCache:
    """Keys and values of all writing layers: [T, K, E] each, T = pages x tokens of the layer's group.

    `compact` names the layers to store compactly, by the weight of their key norm: of keys, only the rotary columns are kept.
    In torch.int8, each key and value vector of a head has a float32 scale beside it; then no layer can be compact. A `mirror`
    is told of whole pages that are copied.
    """

    def __init__(
        self,
        plan: ModelPlan,
        counts: Mapping[GroupId, PoolSize],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        compact: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.counts, self.dtype = dict(counts), dtype
        self.mirror: PoolMirror | None = None
        self.groups = plan.groups()
        self.windows = {group.id: group.window for group in self.groups}
        check_books(counts)
        if dtype == torch.int8 and compact:
            raise KernelError("a cache of int8 stores no layer compactly; keep keys and values in another dtype")
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._compact: dict[int, KEqVCache] = {}
        self._int8: dict[int, Int8KVCache] = {}
        for layer in plan.writers:
            count, weight = counts[layer.group], (compact or {}).get(layer.index)
            shape = (count.pages * count.tokens, layer.kv_heads, layer.head_dim)
            key_shape = shape if weight is None else (*shape[:2], layer.rotary_dims)
            try:
                self.keys[layer.index] = torch.empty(key_shape, dtype=dtype, device=device)
                self.values[layer.index] = torch.empty(shape, dtype=dtype, device=device)
                scales = [torch.empty(shape[:2], device=device) for _ in range(2)] if scale_bytes(dtype) else []
            except (RuntimeError, MemoryError) as error:  # torch reports a refused allocation as a RuntimeError
                raise CapacityError(
                    f"no memory for a cache of {spell_positions(counts)} positions ({dtype}); lower the context or the batch"
                ) from error
            if scales:
                self._int8[layer.index] = Int8KVCache(self.keys[layer.index], self.values[layer.index], *scales)
            if weight is not None:
                still = weight.to(device, torch.float32, copy=True)
                found = KEqVCache(self.values[layer.index], self.keys[layer.index], still)
                for columns in found.rotary(still):
                    columns.fill_(1.0)
                self._compact[layer.index] = found
        self.allocators = {group.id: PageAllocator(counts[group.id]) for group in self.groups}

    @property
    def nbytes(self) -> int:
        """Count the bytes of all storage, touched or not."""
        return sum(tensor.nbytes for layer in self.keys for tensor in self._tensors(layer))

    def page_bytes(self, group: GroupId) -> int:
        """Count the bytes of one page of a group in all its layers."""
        layers = next(each.layers for each in self.groups if each.id == group)
        tokens = self.allocators[group].tokens
        return sum(tensor[:tokens].nbytes for layer in layers for tensor in self._tensors(layer))

    def write(self, layer: int, slots_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        """Store keys and values of a writing layer, one slot a row."""
        special = self._compact.get(layer) or self._int8.get(layer)
        if special is not None:
            special.write(slots_N, k_NKE, v_NKE)
            return
        store(self.keys[layer], slots_N, k_NKE)
        store(self.values[layer], slots_N, v_NKE)

    def read(self, layer: int, kv_range: KVRange) -> tuple[Tensor, Tensor]:
        """Return keys and values [T, K, E] of a KV range: views of consecutive pages, else copies, as rebuilt keys always are.

        An int8 cache gives float32, whatever the rows' dtype.
        """
        if layer in self._int8:
            return self._int8[layer].read(kv_range.where)
        compact = self._compact.get(layer)
        keys = self.keys[layer][kv_range.where] if compact is None else compact.keys(kv_range.where)
        return keys, self.values[layer][kv_range.where]

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the tensors [T, K, E] in which a writing layer's slots lie.

        Raises KernelError for a layer that is stored compactly, or in 8 bits with scales.
        """
        for how, layers in (("compactly", self._compact), ("in 8 bits with scales", self._int8)):
            if layer in layers:
                raise KernelError(f"layer {layer} is stored {how}, which this kernel can't read or write")
        return self.keys[layer], self.values[layer]

    def compact(self, layer: int) -> KEqVCache | None:
        """Return the slots of a layer that is stored compactly; None for all others."""
        return self._compact.get(layer)

    def int8(self, layer: int) -> Int8KVCache | None:
        """Return the slots of a layer that is stored in 8 bits with scales; None for all others."""
        return self._int8.get(layer)

    def copy_page(self, group: GroupId, source: int, target: int) -> None:
        """Copy one page of a group in all its layers."""
        if self.mirror is not None:
            self.mirror.copy_page(self, group, source, target)
        tokens = self.allocators[group].tokens
        old, new = (slice(page * tokens, (page + 1) * tokens) for page in (source, target))
        layers = next(each.layers for each in self.groups if each.id == group)
        for layer in layers:
            for tensor in self._tensors(layer):
                tensor[new] = tensor[old]

    def _tensors(self, layer: int) -> tuple[Tensor, ...]:
        """Return all tensors, indexed by slot, that hold a writing layer's keys and values."""
        scaled = self._int8.get(layer)
        scales = () if scaled is None else (scaled.key_scales_TK, scaled.value_scales_TK)
        return (self.keys[layer], self.values[layer], *scales)
