"""What this machine's processor and GPU can do, asked of the system and the driver, without torch.

Owns these two questions; refuses to know kernels. Read `backend.py` for who asks.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

OLDEST_GPU = 8  # major compute capability: the first with bfloat16 products


@cache
def cpu_features() -> frozenset[str]:
    """List the processor's feature flags in /proc/cpuinfo's spelling; empty where they can't be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset({"amx_bf16"}) if platform.machine() == "arm64" else frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@cache
def cuda_missing() -> str | None:
    """Return why Triton's kernels can't run on this machine's GPU; None where they can. Asks the driver, which needs no torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no CUDA driver"
    found = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(found)) or not found.value:
        return "this machine has no CUDA device"
    capability = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    if driver.cuDeviceGetAttribute(ctypes.byref(found), capability, 0) or found.value < OLDEST_GPU:
        return f"its compute capability is {found.value}.x, {OLDEST_GPU}.0 is needed"
    return None
