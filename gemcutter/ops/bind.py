"""The table of kernels, and the choice among them.

Owns `PROVIDERS`, in order of preference, and `choose`, which takes the first that accepts a site and keeps the refusals'
reasons, so that "why is this slow here?" has an answer. Imports no torch until a kernel is built. Add a kernel: one file, and
its rows here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemcutter import native
from gemcutter.errors import KernelError
from gemcutter.ops import SENTENCES, WORDS, Site
from gemcutter.plan import ModelPlan

CHOICES = ("auto", "triton", "reference")  # the fastest that accept, Triton's or an error, the definitions
ACTIVATIONS = ("int8", "bf16")  # how native products take the rows that meet packed weights, where they are not float32
DENSE = ("float32", "bfloat16", "float16")
GPU_PACKED = "gpu-packed-"  # begins the name of a scheme that was repacked for Triton's kernels
CPU_PACKED = "cpu-packed-"  # begins the name of a scheme that was repacked for the native kernels
UNTILED = re.compile(r"mxfp8|fp8|.*-indexed")  # begin the schemes that stay as they are: 8-bit floats, scattered groups
UNSTRIPED = re.compile(r".*-indexed")  # the same for Triton's kernels
HEAD_DIM_UNIT = 32  # of native attention
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256, 512)
OLDEST_GPU = 8  # major compute capability: the first with bfloat16 products
NEIGHBOURS = "a row's last bits depend on how many rows run beside it"
ASKED = "Triton's kernels were asked for"


@dataclass(frozen=True, slots=True)
class Provider:
    """One implementation of one verb. `accepts` gives None or the reason why not; `build` names the function as
    "module:function".
    """

    verb: str
    name: str
    build: str
    accepts: Callable[[Site], str | None] = lambda site: None

    def load(self) -> Callable[..., Any]:
        """Import the implementation."""
        module, _, function = self.build.partition(":")
        found: Callable[..., Any] = getattr(import_module(f"gemcutter.ops.{module}"), function)
        return found


@dataclass(frozen=True, slots=True)
class Choice:
    """The provider taken for a site, and why the preferred ones were not."""

    site: Site
    provider: Provider
    refusals: tuple[tuple[str, str], ...]


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


def _library(site: Site) -> str | None:
    if site.kernels == "triton":
        return ASKED
    return "library kernels let a row's last bits depend on its neighbours" if site.invariant else None


def native_refusal(device: str, kernels: str) -> str | None:
    """Say why the native kernels can't serve a device and a choice of kernels; None where they do."""
    if kernels != "auto":
        return NEIGHBOURS if kernels == "reference" else ASKED
    if device != "cpu":
        return "runs on the CPU"
    return native.missing()


def row_dtype(device: str, dtype: str, kernels: str) -> str:
    """Give the dtype of rows: native kernels keep them in float32 whatever the compute dtype."""
    return dtype if native_refusal(device, kernels) else "float32"


def row_form(device: str, dtype: str, kernels: str, activations: str | None) -> str:
    """Give the form in which rows meet packed weights: "float32", as they are, where nothing else was asked for."""
    if native_refusal(device, kernels):
        return "float32"
    return activations or ("float32" if dtype == "float32" else "int8")


def held_as(stored: str, device: str, kernels: str) -> str:
    """Spell how weights that a file stores so are held once they are loaded: packed ones repacked for the kernels that serve."""
    if stored in DENSE:
        return stored
    if triton_refusal(device, kernels) is None:
        return stored if UNSTRIPED.match(stored) else GPU_PACKED + stored
    return stored if UNTILED.match(stored) or native_refusal(device, kernels) else CPU_PACKED + stored


def _native_word(site: Site) -> str | None:
    foreign = [kind for kind in site.stored.split("+") if kind not in DENSE and not kind.startswith(CPU_PACKED)]
    if reason := native_refusal(site.device, site.kernels):
        return reason
    return f"no native layout for {', '.join(foreign)}" if foreign else None


def _native_sentence(site: Site) -> str | None:
    return _native_word(site) or ("adapters change its products at run time" if site.adapted else None)


def _native_attention(site: Site) -> str | None:
    if site.layer is not None and site.layer.head_dim % HEAD_DIM_UNIT:
        return f"head_dim {site.layer.head_dim} is not a multiple of {HEAD_DIM_UNIT}"
    return native_refusal(site.device, site.kernels)


def _native_layer(site: Site) -> str | None:
    return _native_sentence(site) or _native_attention(site)


def _torch_linear(site: Site) -> str | None:
    if site.kernels == "triton":
        return ASKED
    if site.stored not in DENSE:
        return f"multiplies dense weights, these are stored as {site.stored}"
    if site.device != "cpu" or site.dtype == site.stored == "float32":
        return _library(site)
    if site.dtype != site.stored:
        return f"weights stored as {site.stored} need converting to {site.dtype}"
    if site.dtype == "bfloat16" and cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return _library(site)
    return f"this processor has no {site.dtype} products; the library would emulate them"


def _tiled_linear(site: Site) -> str | None:
    return _library(site) if site.device == "cpu" else "converts tiles on the CPU"


@cache
def cuda_missing() -> str | None:
    """Say why Triton's kernels can't run on this machine's GPU; None where they can. Asks the driver, which needs no torch."""
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


def triton_refusal(device: str, kernels: str) -> str | None:
    """Say why Triton's kernels can't serve a device and a choice of kernels; None where they do.

    On a CPU they run under Triton's interpreter alone, to be tested, and only if they are asked for.
    """
    if kernels == "reference":
        return NEIGHBOURS
    if device == "cpu" and kernels != "triton":
        return "runs on CUDA"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "runs on a CPU only under TRITON_INTERPRET=1, to be tested"
    return cuda_missing()


def _triton_word(site: Site) -> str | None:
    known = (*DENSE, "mixed")  # whose parts the product takes one by one; they are listed apart where a sentence is chosen
    foreign = [kind for kind in site.stored.split("+") if kind not in known and not kind.startswith(GPU_PACKED)]
    if reason := triton_refusal(site.device, site.kernels):
        return reason
    return f"no Triton kernel for {', '.join(foreign)}" if foreign else None


def _triton_attention(site: Site) -> str | None:
    if site.layer is not None and site.layer.head_dim not in TRITON_HEAD_DIMS:
        return f"head_dim {site.layer.head_dim} is none of {', '.join(map(str, TRITON_HEAD_DIMS))}"
    return triton_refusal(site.device, site.kernels)


def _triton_layer(site: Site) -> str | None:
    return _triton_word(site) or _triton_attention(site)


def _reference(site: Site) -> str | None:
    """Accept all, but where Triton was asked for: only for whole layers, which may have to be read line by line."""
    return ASKED if site.kernels == "triton" and site.verb != "layer" else None


# the sentences that depend on more than their matrices
NATIVE = {"attend": _native_attention, "layer": _native_layer}
TRITON = {"attend": _triton_attention, "layer": _triton_layer}

PROVIDERS = (
    Provider("linear", "native", "cpu_native:linear", _native_word),
    Provider("linear", "triton", "triton_linear:linear", _triton_word),
    Provider("linear", "torch", "torch_fast:linear_dense", _torch_linear),
    Provider("linear", "torch-tiled", "torch_fast:linear_tiled", _tiled_linear),
    Provider("linear", "reference", "reference:linear", _reference),
    Provider("attention", "native", "cpu_native:build_attention", _native_attention),
    Provider("attention", "triton", "triton_attention:build_attention", _triton_attention),
    Provider("attention", "torch", "torch_fast:build_attention", _library),
    Provider("attention", "reference", "reference:build_attention", _reference),
    *(Provider(verb, "native", f"cpu_native:build_{verb}", NATIVE.get(verb, _native_sentence)) for verb in SENTENCES),
    *(Provider(verb, "triton", f"triton_sentences:build_{verb}", TRITON.get(verb, _triton_word)) for verb in SENTENCES),
    *(Provider(verb, "reference", f"reference:build_{verb}", _reference) for verb in SENTENCES),
)


def choose(site: Site) -> Choice:
    """Take the first provider of the site's verb that accepts it. Raises KernelError with all refusals if none does."""
    refusals = list[tuple[str, str]]()
    for provider in PROVIDERS:
        if provider.verb != site.verb:
            continue
        reason = provider.accepts(site)
        if reason is None:
            return Choice(site, provider, tuple(refusals))
        refusals.append((provider.name, reason))
    raise KernelError(f"no kernel for {site.verb} on {site.device}", [f"{name}: {reason}" for name, reason in refusals])


def explain(plan: ModelPlan, device: str, dtype: str, stored: str, kernels: str = "auto") -> Iterator[Choice]:
    """List the choices for a model's words and sentences, one a verb (its layers agree as long as their weights do)."""
    rows = row_dtype(device, dtype, kernels)
    for verb in WORDS + SENTENCES:
        if (verb in ("ple", "inject")) <= bool(plan.ple_dim):
            yield choose(Site(verb, plan.layers[0], device, rows, stored, kernels))
