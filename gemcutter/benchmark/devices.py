"""Devices that a model may be planned for without having one: memory, rates and the link between ranks.

Owns the table of named ones. Figures are the makers' own, of dense bfloat16 and of one direction of a link; latencies are
assumptions, since no data sheet has them. docs/guide/scale.md names the source of each. Refuses to know models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemcutter.errors import ConfigError

GB, TFLOPS, MICROSECONDS = 1e9, 1e12, 1e-6


@dataclass(frozen=True, slots=True)
class Device:
    """What one rank runs on; what is None is not known. `place` is the type of device that kernels and loader know."""

    name: str
    title: str
    place: str
    memory_bytes: float | None = None
    bandwidth: float | None = None  # bytes a second, read from memory
    flops: float | None = None  # operations a second
    link_bandwidth: float | None = None  # bytes a second that a rank receives from the others
    link_latency_s: float | None = None  # of one exchange, however small

    def changed(self, **given: float | None) -> Device:
        """Return the device with the figures that are given."""
        told: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, **told)


def _gpu(name: str, title: str, memory: float, bandwidth: float, flops: float, link: float, latency: float) -> Device:
    return Device(name, title, "cuda", memory * GB, bandwidth * GB, flops * TFLOPS, link * GB, latency * MICROSECONDS)


DEVICES: Mapping[str, Device] = {
    each.name: each
    for each in (
        Device("cpu", "a CPU", "cpu"),
        Device("cuda", "a GPU", "cuda"),
        _gpu("h100", "H100 SXM", 80, 3350, 989, 450, 10),
        _gpu("h200", "H200 SXM", 141, 4800, 989, 450, 10),
        _gpu("a100-80g", "A100 SXM 80 GB", 80, 2039, 312, 300, 10),
        _gpu("l40s", "L40S", 48, 864, 362, 32, 25),
        _gpu("rtx-4090", "GeForce RTX 4090", 24, 1008, 165.2, 32, 25),
        _gpu("mi300x", "Instinct MI300X", 192, 5300, 1307.4, 448, 15),
        Device("m4-max", "Apple M4 Max", "cpu", 128 * GB, 546 * GB),
        # 12 modules of 32 GB, DDR5-4800; 96 cores at 2.4 GHz, 64 operations a cycle; three xGMI links to the other socket
        Device("epyc-9004", "EPYC 9004, a socket", "cpu", 384 * GB, 460.8 * GB, 14.7 * TFLOPS, 192 * GB, 5 * MICROSECONDS),
    )
}


def find_device(name: str) -> Device:
    """Return a named device, whatever its capitals. Raises ConfigError that lists all."""
    found = DEVICES.get(name.strip().lower())
    if found is None:
        raise ConfigError(
            f"device: expected {', '.join(DEVICES)}, found {name!r}; for another one take cpu or cuda, and say what it has: "
            "--memory, --memory-bandwidth, --flops"
        )
    return found
