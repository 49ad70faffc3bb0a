"""The kernel registry: all backends, and the selection of an implementation for every op of a model.

Owns the order of preference and `select_kernel`, which takes the first implementation that accepts a site and keeps the refusals'
reasons, so that "why is this slow here?" has an answer. A decoder and `inspect` select through the same `KernelPlan`, from loaded
weights or from headers alone. Imports no torch until a kernel is loaded. Add a kernel: one file, and its row in its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gemcutter.errors import KernelError
from gemcutter.ops import DRAFT_MATRICES, LAYER_OPS, MATRICES, OPS, KernelSite
from gemcutter.ops.backend import REFERENCE, TORCH, Backend, KernelImpl
from gemcutter.ops.cpu.backend import ACTIVATIONS, CPU
from gemcutter.ops.triton.backend import TRITON
from gemcutter.param_spec import Access
from gemcutter.plan import LayerPlan, ModelPlan

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "CPU",
    "IMPLEMENTATIONS",
    "KERNELS",
    "TRITON",
    "Selection",
    "select_backend",
    "select_kernel",
]

KERNELS = ("auto", "triton", "reference")  # the fastest that accept, Triton's or an error, the definitions
BACKENDS: tuple[Backend, ...] = (CPU, TRITON, TORCH, REFERENCE)  # the preferred one first
IMPLEMENTATIONS: tuple[KernelImpl, ...] = tuple(impl for backend in BACKENDS for impl in backend.kernels)


@dataclass(frozen=True, slots=True)
class Selection:
    """The implementation selected for a site, and why the preferred ones were not."""

    site: KernelSite
    impl: KernelImpl
    refusals: tuple[tuple[str, str], ...]


def select_backend(device: str, kernels: str) -> Backend:
    """Return the first backend that serves a type of device and a choice of kernels. Raises KernelError if none does."""
    refusals = list[str]()
    for backend in BACKENDS:
        reason = backend.refusal(device, kernels)
        if reason is None:
            return backend
        refusals.append(f"{backend.name}: {reason}")
    raise KernelError(f"no kernels {kernels!r} on {device}", refusals)


def select_kernel(site: KernelSite) -> Selection:
    """Return the first implementation of the site's op that accepts it. Raises KernelError with all refusals if none does."""
    refusals = list[tuple[str, str]]()
    for impl in IMPLEMENTATIONS:
        if impl.op != site.op:
            continue
        reason = impl.accepts(site)
        if reason is None:
            return Selection(site, impl, tuple(refusals))
        refusals.append((impl.name, reason))
    raise KernelError(f"no kernel for {site.op} on {site.device}", [f"{name}: {reason}" for name, reason in refusals])


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """The sites of a model's ops: `stored` lists how the parts of a parameter, by name, are held in memory."""

    plan: ModelPlan
    site: KernelSite
    stored: Callable[[str], Sequence[str]]

    def at(self, op: str, layer: LayerPlan | None = None) -> KernelSite:
        """Return the site of an op: how the matrices that it multiplies with are held."""
        prefix = "" if layer is None else f"layers.{layer.index}."
        names = [prefix + name for name in self._matrices(op)]
        kinds = sorted({kind for name in names for kind in self.stored(name)})
        return replace(self.site, op=op, layer=layer, stored="+".join(kinds) or self.site.stored)

    def _matrices(self, op: str) -> tuple[str, ...]:
        head = "embed.tokens" if self.plan.tied_head else "head"
        if op == "lm_head":
            return (head,)
        if op == "draft":
            return (*DRAFT_MATRICES, head)
        return MATRICES.get(op, ())

    def selections(self) -> Iterator[tuple[Selection, tuple[int, ...]]]:
        """Select a kernel for every op of every layer, and for the model's other ops, in the order of a step.

        Layers that get the same kernel for the same reasons share one selection, made for the first of them; they are listed
        beside it.
        """
        multiplied = (spec for spec in self.plan.params() if spec.access is Access.DENSE)
        kinds = dict.fromkeys(kind for spec in multiplied for kind in self.stored(spec.name))
        for op in OPS:
            if op in ("ple_embed", "ple_gate") and not self.plan.ple_dim:
                continue
            if op == "linear":
                sites = [replace(self.site, op=op, stored=kind) for kind in kinds or (self.site.stored,)]
            elif op in LAYER_OPS or op == "layer":
                sites = [self.at(op, layer) for layer in self.plan.layers]
            else:
                sites = [self.at(op)]
            found: dict[tuple[object, ...], list[Selection]] = {}
            for site in sites:
                selection = select_kernel(site)
                key = (selection.impl.name, selection.refusals, site.stored if op == "linear" else "")
                found.setdefault(key, []).append(selection)
            for same in found.values():
                yield same[0], tuple(each.site.layer.index for each in same if each.site.layer is not None)


def explain(plan: ModelPlan, device: str, dtype: str, stored: str, kernels: str = "auto") -> Iterator[Selection]:
    """Select the kernels of a model whose weights are all held alike, as the backend holds what is stored as `stored`."""
    backend = select_backend(device, kernels)
    site = KernelSite("linear", None, device, backend.row_dtype(dtype), stored, kernels)
    yield from (selection for selection, _ in KernelPlan(plan, site, lambda name: (stored,)).selections())
