"""Where the per-layer-embedding table lives beside a GPU: in its memory, in pinned memory of the host, or mapped as on a CPU.

A token reads one row of it, some 20 KB, so it need not take the GPU's memory: kernels read pinned memory over the bus. A mapped
table costs nothing, but its rows are gathered by the host, which has to know each token first. Where several GPUs share the
table, this places the rows that one of them holds. Refuses to know files.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from gemcutter.errors import KernelError
from gemcutter.quant import Part, Weight
from gemcutter.quant.gpu_packing import pack_for_gpu
from gemcutter.quant.packed import DenseStack

SHARE = 4  # a table goes to the GPU by itself if this many of its size are free there


def place_table(table: Weight, where: str | None, device: torch.device) -> Weight:
    """Bring a mapped table to its place on behalf of `device`, which "split" puts there, too; None chooses by the free memory."""
    if device.type != "cuda" or where == "mmap":
        return table
    (part,) = table.parts
    if where is None:
        free, _ = torch.cuda.mem_get_info(device)
        where = "gpu" if part.nbytes * SHARE <= free else "host"
    return Weight((_moved(part, torch.device("cpu") if where == "host" else device),), table.names)


def _moved(part: Part, place: torch.device) -> Part:
    """Copy a table to the GPU, or into pinned memory; one that kernels can't read stays mapped."""
    if isinstance(part, Tensor):
        return _pinned(part.clone()) if place.type == "cpu" else part.to(place)
    gpu_packed = None if isinstance(part, DenseStack) else pack_for_gpu(part, place)
    if gpu_packed is None:
        return part
    return gpu_packed.each(_pinned) if place.type == "cpu" else gpu_packed


def _pinned(array: Tensor) -> Tensor:
    """Pin an array's own memory as long as it lives, and give it back.

    torch's pinned memory comes in powers of two: a table of 4.7 GB would take 8.6. Raises KernelError where the driver refuses.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = array.data_ptr()
    error = int(runtime.cudaHostRegister(address, array.nbytes, 0))
    if error:
        problem = f"the CUDA driver can't pin {array.nbytes / 1e9:.1f} GB of memory (error {error})"
        raise KernelError(f"ple host: {problem}; raise ulimit -l, or take --ple mmap")
    weakref.finalize(array, runtime.cudaHostUnregister, address)
    return array
