"""What this machine is, and what it can do at best: bytes read and products made per second.

Owns the measurements that ceilings are made of, all taken with the threads that the model runs with; refuses to know models.
Read `roofline.py` for what becomes of them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gemcutter
from gemcutter import native
from gemcutter.benchmark.memory import peak_rss_bytes
from gemcutter.benchmark.peak import peak_rates
from gemcutter.model.text import Decoder
from gemcutter.ops import KernelSite
from gemcutter.ops.devices import cpu_features
from gemcutter.ops.registry import CPU as CPU_BACKEND
from gemcutter.ops.registry import select_kernel
from gemcutter.ops.types import matrix
from gemcutter.quant import Weight

CPU = torch.device("cpu")
GPU_STREAM_BYTES, GPU_MATMUL_SIZE = 8 << 30, 8192  # large enough that starting a kernel does not count
STREAM_BYTES = 512 << 20  # of the buffer that is summed: larger than any cache
MATMUL_SIZE = 2048
CACHED_ELEMENTS, CACHED_ROWS = 1 << 21, 512  # of a packed matrix that stays in the caches, and of its rows
TRIES = 5  # of a measurement, the best of which counts
SHORT_TRIES = 50  # of one that takes milliseconds
REST_S = 0.2  # until the threads of torch's own products, which wait by spinning, are asleep
UNITS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
)  # that decide speed, as Linux spells


def describe(device: torch.device = CPU) -> dict[str, Any]:
    """Name the machine, a GPU if the model is there, and the versions behind the numbers."""
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return gpu | {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "features": [name for name in UNITS if name in cpu_features()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemcutter": gemcutter.__version__,
        "native": native.level() or f"none: {native.missing()}",
    }


CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Name the processor, by its model's number, too, where its name has none: virtual machines call many of them the same."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = found.get("model name") or platform.processor() or platform.machine()
    number = found.get("model", "")
    return name if any(map(str.isdecimal, name)) or not number.isdecimal() else f"{name}, model {number}"


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that were ever taken: of a GPU by tensors, else by this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def measure_rates(device: torch.device = CPU) -> dict[str, float]:
    """Measure what the machine can do: bytes read, operations of each kind of product that torch has, and the processor's own.

    Names end in `_flops_per_s` where a whole product of matrices was timed, in `_peak_ops_per_s` for the instructions alone.
    """
    if device.type == "cuda":
        size, rate = GPU_MATMUL_SIZE, partial(matmul_rate, device=device)
        return {"read_bytes_per_s": read_rate(device), "bfloat16_flops_per_s": rate(torch.bfloat16, size=size)}
    rates = {"read_bytes_per_s": read_rate(), "float32_flops_per_s": matmul_rate()}
    if cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"}:  # elsewhere they are emulated
        rates["bfloat16_flops_per_s"] = matmul_rate(torch.bfloat16)
    return rates | {f"{kind}_peak_ops_per_s": rate for kind, rate in peak_rates().items()}


def read_rate(device: torch.device = CPU) -> float:
    """Measure the bytes per second that a sum over a large buffer reads."""
    nbytes = STREAM_BYTES if device == CPU else GPU_STREAM_BYTES
    buffer = torch.ones(nbytes // 4, device=device)
    return nbytes / best_seconds(_finished(buffer.sum, device))


def matmul_rate(dtype: torch.dtype = torch.float32, device: torch.device = CPU, size: int = MATMUL_SIZE) -> float:
    """Measure the operations per second of torch's product of two large matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return 2 * size**3 / best_seconds(_finished(lambda: a @ b, device))


def _finished(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Let work take as long as the device does."""
    if device.type != "cuda":
        return work

    def wait() -> None:
        work()
        torch.cuda.synchronize(device)

    return wait


def native_rate(decoder: Decoder) -> float | None:
    """Measure the operations per second of the native kernel for a decoder's matrices, on a piece that stays in the cache.

    None where no native kernel multiplies with them.
    """
    weight = matrix(decoder.params, f"layers.{decoder.plan.own_layers[0].index}.mlp.in")
    if select_kernel(KernelSite("linear", None, decoder.device.type, "float32", weight.stored)).impl.name != "native":
        return None
    return product_rate(weight.slice(0, CACHED_ELEMENTS // weight.columns), decoder.precision.activations)


def product_rate(weight: Weight, activations: str) -> float:
    """Measure the operations per second of the native product of CACHED_ROWS rows, taken in the form `activations`."""
    work = CPU_BACKEND.matmul(weight, torch.randn(CACHED_ROWS, weight.columns), activations)
    time.sleep(REST_S)
    return 2 * CACHED_ROWS * weight.rows * weight.columns / best_seconds(work, SHORT_TRIES)


def best_seconds(work: Callable[[], object], tries: int = TRIES) -> float:
    """Return the shortest of a few times that `work` takes."""
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
