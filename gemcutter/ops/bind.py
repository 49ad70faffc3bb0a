"""The table of kernels, and the choice among them.

Owns `PROVIDERS`, in order of preference, and `choose`, which takes the first that accepts a site and keeps the refusals'
reasons, so that "why is this slow here?" has an answer. Imports no torch until a kernel is built. Add a kernel: one file, and
its rows here.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from gemcutter.errors import KernelError
from gemcutter.ops import SENTENCES, WORDS, Site
from gemcutter.plan import ModelPlan

CHOICES = ("auto", "reference")


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


def _not_invariant(site: Site) -> str | None:
    return "library kernels let a row's last bits depend on its neighbours" if site.invariant else None


def _native_linear(site: Site) -> str | None:
    if site.stored not in ("float32", "bfloat16", "float16"):
        return f"multiplies dense weights, these are stored as {site.stored}"
    if site.device != "cpu" or site.dtype == site.stored == "float32":
        return _not_invariant(site)
    if site.dtype != site.stored:
        return f"weights stored as {site.stored} need converting to {site.dtype}"
    if site.dtype == "bfloat16" and cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return _not_invariant(site)
    return f"this processor has no {site.dtype} products; the library would emulate them"


def _tiled_linear(site: Site) -> str | None:
    return _not_invariant(site) if site.device == "cpu" else "converts tiles on the CPU"


PROVIDERS = (
    Provider("linear", "torch", "torch_fast:linear_native", _native_linear),
    Provider("linear", "torch-tiled", "torch_fast:linear_tiled", _tiled_linear),
    Provider("linear", "reference", "reference:linear"),
    Provider("attention", "torch", "torch_fast:build_attention", _not_invariant),
    Provider("attention", "reference", "reference:build_attention"),
    *(Provider(sentence, "reference", f"reference:build_{sentence}") for sentence in SENTENCES),
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
    for verb in WORDS + SENTENCES:
        if (verb in ("ple", "inject")) <= bool(plan.ple_dim):
            yield choose(Site(verb, plan.layers[0], device, dtype, stored, invariant=kernels == "reference"))
