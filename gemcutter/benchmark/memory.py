"""How much memory this process has taken.

Owns the kernel's counters of resident memory; refuses to know what it is taken for. Imports no torch.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


def peak_rss_bytes() -> int:
    """Give the most bytes that were ever resident, mapped files included.

    The kernel's own counter, where there is one: getrusage also counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let the peak begin anew with what is resident now; where the kernel can't do that, the old one stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
