"""What a backend is: the kernels of one kind, and everything that the rest of the engine must know about running on them.

Owns the protocol `Backend`, `KernelImpl`, and the two backends that need no kernels of our own: torch's and the reference. One
object answers what is decided once a model is loaded: whether it can serve, the dtype of rows, how weights are packed, how keys
and values are stored, what attention kernels are told of a step, and whether steps can be captured. Imports no torch until a
kernel is loaded. Read `registry.py` for the table of backends and the selection among their kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from gemcutter.errors import KernelError
from gemcutter.ops import DRAFTER_OPS, OPS, TOWER_OPS, KernelSite
from gemcutter.ops.devices import cpu_features

if TYPE_CHECKING:  # what follows imports torch
    from torch import device as Device
    from torch import dtype as Dtype

    from gemcutter.ops.step import Step
    from gemcutter.plan import GroupId, LayerPlan, RopeSpec
    from gemcutter.quant import Weight
    from gemcutter.quant.packing import Packer

DENSE = ("float32", "bfloat16", "float16")
NEIGHBOURS = "a row's last bits depend on how many rows run beside it"
ASKED = "Triton's kernels were asked for"
NO_GPU = "graphs are captured on a GPU"

AttnKinds = Sequence[tuple["GroupId", "RopeSpec"]]  # the pairs of block table and rotary embedding among a model's layers


@dataclass(frozen=True, slots=True)
class KernelImpl:
    """One implementation of one op. `accepts` returns None or the reason why not; `build` names the function as
    "module:function", within `gemcutter.ops`.
    """

    op: str
    name: str
    build: str
    accepts: Callable[[KernelSite], str | None] = lambda site: None

    def load(self) -> Callable[..., Any]:
        """Import the implementation."""
        module, _, function = self.build.partition(":")
        found: Callable[..., Any] = getattr(import_module(f"gemcutter.ops.{module}"), function)
        return found


class Backend(Protocol):
    """A kind of kernels, and what the loader, the cache and the engine must know of it."""

    @property
    def name(self) -> str:
        """Return the name: "cpu", "triton", "torch" or "reference"."""

    @property
    def kernels(self) -> tuple[KernelImpl, ...]:
        """Return the implementations, the preferred one of an op first."""

    def refusal(self, device: str, kernels: str) -> str | None:
        """Return why the backend can't serve a type of device and a choice of kernels; None where it can."""

    def row_dtype(self, compute: str) -> str:
        """Return the dtype of the residual stream for a compute dtype."""

    def activations(self, compute: str, asked: str | None) -> str:
        """Return how matmuls take the rows of packed weights: "float32" (as they are), "int8" or "bf16"."""

    def packing(self, stored: str) -> str:
        """Return how weights that a file stores so are held in memory."""

    def packer(self, device: Device, dtype: Dtype) -> Packer:
        """Return what packs weights for the kernels while they are loaded; dense ones are held in `dtype`."""

    def is_compact(self, layer: LayerPlan) -> bool:
        """Return whether the cache stores a layer's keys and values once, as `KEqVCache`."""

    def attn_metadata(self, step: Step, kinds: AttnKinds) -> Mapping[GroupId, object]:
        """Return what the attention kernels are told of a step, for each group."""

    def static_metadata(self, **tensors: Any) -> object:
        """Return attention metadata over tensors that are filled anew for every step, as `TritonAttnMetadata` names them.

        Raises KernelError for a backend whose steps can't run over static memory.
        """

    def capture_refusal(self, device: Device, kernels: Collection[str], ple_table: Weight | None) -> str | None:
        """Return why steps on these kernels (by name) can't be captured as graphs; None where they can.

        `ple_table` is the table of per-layer embeddings, if the model has one.
        """


@dataclass(frozen=True, slots=True)
class PlainBackend:
    """A backend whose kernels take weights, keys and values as they are: torch's, and the reference."""

    name: str
    kernels: tuple[KernelImpl, ...]
    refusals: Mapping[str, str]  # by the choice of kernels, why it can't be served

    def refusal(self, device: str, kernels: str) -> str | None:
        """Return why the backend can't serve a choice of kernels; it runs on any device."""
        return self.refusals.get(kernels)

    def row_dtype(self, compute: str) -> str:
        """Return the compute dtype."""
        return compute

    def activations(self, compute: str, asked: str | None) -> str:
        """Return "float32": rows are multiplied as they are."""
        return "float32"

    def packing(self, stored: str) -> str:
        """Return the stored scheme: nothing is repacked."""
        return stored

    def packer(self, device: Device, dtype: Dtype) -> Packer:
        """Return the packer that leaves weights as they are."""
        from gemcutter.quant.packing import PlainPacker

        return PlainPacker(device)

    def is_compact(self, layer: LayerPlan) -> bool:
        """Return False: keys and values are stored apart."""
        return False

    def attn_metadata(self, step: Step, kinds: AttnKinds) -> Mapping[GroupId, object]:
        """Return nothing: the attention reads the step's own KV ranges."""
        return {}

    def static_metadata(self, **tensors: Any) -> object:
        """Raise KernelError: the attention reads the KV ranges of each step."""
        raise KernelError(f"steps of the {self.name} kernels can't run over static memory")

    def capture_refusal(self, device: Device, kernels: Collection[str], ple_table: Weight | None) -> str | None:
        """Return why steps can't be captured: always."""
        return NO_GPU if device.type != "cuda" else f"kernels of {', '.join(sorted(kernels))} may wait for the host"


def library_refusal(site: KernelSite) -> str | None:
    """Return why kernels of a library can't serve a site; None where they can."""
    if site.kernels == "triton":
        return ASKED
    return "library kernels let a row's last bits depend on its neighbours" if site.invariant else None


def _torch_linear(site: KernelSite) -> str | None:
    if site.kernels == "triton":
        return ASKED
    if site.stored not in DENSE:
        return f"multiplies dense weights, these are stored as {site.stored}"
    if site.device != "cpu" or site.dtype == site.stored == "float32":
        return library_refusal(site)
    if site.dtype != site.stored:
        return f"weights stored as {site.stored} need converting to {site.dtype}"
    if site.dtype == "bfloat16" and cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return library_refusal(site)
    return f"this processor has no {site.dtype} products; the library would emulate them"


def _chunked_linear(site: KernelSite) -> str | None:
    return library_refusal(site) if site.device == "cpu" else "converts chunks of a weight on the CPU"


def _reference(site: KernelSite) -> str | None:
    """Accept all, but where Triton was asked for: only what may have to be computed op by op."""
    return ASKED if site.kernels == "triton" and site.op not in ("layer", "draft", *TOWER_OPS) else None


TORCH = PlainBackend(
    "torch",
    (
        KernelImpl("linear", "torch", "torch.matmul:linear_dense", _torch_linear),
        KernelImpl("linear", "torch-chunked", "torch.matmul:linear_chunked", _chunked_linear),
        KernelImpl("attention", "torch", "torch.attention:build_attention", library_refusal),
    ),
    {"reference": NEIGHBOURS, "triton": ASKED},
)
REFERENCE = PlainBackend(
    "reference",
    tuple(
        KernelImpl(op, "reference", f"reference:{'linear' if op == 'linear' else f'build_{op}'}", _reference)
        for op in (*OPS, *DRAFTER_OPS, *TOWER_OPS)
    ),
    {"triton": ASKED},
)
