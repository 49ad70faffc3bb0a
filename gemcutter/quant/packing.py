"""What a backend does to weights while they are loaded: nothing, panels for the CPU kernels, or words for the GPU kernels.

Owns the protocol `Packer` and its three implementations, so that the loader knows no backend. Refuses to know files. Read
`cpu_packing.py` and `gpu_packing.py` for the two packings, `checkpoint/load/` for who calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gemcutter.quant import Part
from gemcutter.quant.cpu_packed import one_order
from gemcutter.quant.cpu_packing import join, pack_for_cpu
from gemcutter.quant.gpu_packing import adjoin, pack_for_gpu, place
from gemcutter.quant.packed import DenseStack, Packed
from gemcutter.quant.recipes import Scheme
from gemcutter.quant.recipes import pack as quantize

Release = Callable[[], None]  # gives back the mapped pages that were read so far


class Packer(Protocol):
    """Brings the parts of a weight into the form that a backend's kernels read."""

    @property
    def makes_panels(self) -> bool:
        """Return whether packed weights become `CpuPackedWeight`, which can be kept in a file and mapped."""
        ...

    def pack(self, part: Packed, release: Release) -> Part:
        """Repack a part that a file packs; what has no other form stays as it is, on the device."""
        ...

    def quantize(self, chunks: Iterable[Tensor], shape: tuple[int, ...], scheme: Scheme) -> Part:
        """Quantize a dense matrix that comes in chunks of rows, and pack it. Raises ValueError for values that are not finite."""
        ...

    def arrange(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Return the parts of one weight as they are best placed beside each other."""
        ...


class PlainPacker:
    """Leaves weights as they are."""

    makes_panels = False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device

    def pack(self, part: Packed, release: Release) -> Part:
        """Return the part itself."""
        return part

    def quantize(self, chunks: Iterable[Tensor], shape: tuple[int, ...], scheme: Scheme) -> Part:
        """Quantize into memory of its own. Raises ValueError for values that are not finite."""
        return quantize(chunks, shape, scheme, self.device)

    def arrange(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Return the parts as they are."""
        return tuple(parts)


class CpuPacker:
    """Repacks into panels of 16 rows, which the native CPU kernels read as one stream."""

    makes_panels = True

    def pack(self, part: Packed, release: Release) -> Part:
        """Repack a part; what has no such form stays mapped."""
        return pack_for_cpu(part, release) or part

    def quantize(self, chunks: Iterable[Tensor], shape: tuple[int, ...], scheme: Scheme) -> Part:
        """Quantize into panels. Raises ValueError for values that are not finite."""
        return join((scheme.quantize(chunk) for chunk in chunks), shape)

    def arrange(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Return the parts as they are, or under another scheme where they do not take rows in one order of columns."""
        return one_order(parts)


class GpuPacker:
    """Repacks into 32-bit words on a device, the parts of a weight one after the other so that one launch reads all."""

    makes_panels = False

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def pack(self, part: Packed, release: Release) -> Part:
        """Repack a part; what has no such form moves to the device."""
        if isinstance(part, DenseStack):
            return torch.stack([item.to(self.device, self.dtype) for item in part.items])
        return pack_for_gpu(part, self.device, release) or place(part, self.device)

    def quantize(self, chunks: Iterable[Tensor], shape: tuple[int, ...], scheme: Scheme) -> Part:
        """Quantize on the device and repack. Raises ValueError for values that are not finite."""
        found = quantize(chunks, shape, scheme, self.device)
        return pack_for_gpu(found, self.device) or found

    def arrange(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Return the parts one after the other in memory, where they are of one kind."""
        return adjoin(parts)
