"""The backend of the native CPU kernels.

Owns when they serve and what the loader, the cache and the engine must know of them: rows are float32 whatever the compute dtype,
packed weights are repacked, attention is told of a step through `gc_step`. Imports no torch until a kernel is loaded. Read
`layer_ops.py` for the kernels, `gemcutter/native.py` for the library.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from gemcutter import native
from gemcutter.errors import KernelError
from gemcutter.ops import LAYER_OPS, MODEL_OPS, SUMMED_OPS, KernelSite
from gemcutter.ops.backend import ASKED, DENSE, NEIGHBOURS, NO_GPU, AttnKinds, KernelImpl

if TYPE_CHECKING:  # what follows imports torch
    from torch import Tensor
    from torch import device as Device
    from torch import dtype as Dtype

    from gemcutter.ops.step import Step
    from gemcutter.plan import GroupId, LayerPlan
    from gemcutter.quant import Weight
    from gemcutter.quant.packing import Packer

ACTIVATIONS = ("int8", "bf16")  # how matmuls can take the rows of packed weights, where these are not float32
PACKED = "cpu-packed-"  # begins the name of a scheme that was repacked for these kernels
SCATTERED, APART = "-indexed", "-apart"  # in schemes whose columns are sorted by group; of parts that are not sorted alike
SORTED_OPS = ("linear", *LAYER_OPS, "layer")  # which take rows in the order of such columns


class CpuBackend:
    """The native kernels of csrc/cpu, on CPUs for which the library was built."""

    name = "cpu"

    def __init__(self) -> None:
        accepts = {"attention": self._accepts_attention}
        self.kernels = (
            KernelImpl("linear", "native", "cpu.layer_ops:linear", self._accepts_matrices),
            *(KernelImpl(op, "native", f"cpu.model_ops:build_{op}", self._accepts_matrices) for op in MODEL_OPS),
            *(
                KernelImpl(op, "native", f"cpu.layer_ops:build_{op}", accepts.get(op, self._accepts_matrices))
                for op in (*LAYER_OPS, "layer")
            ),
            KernelImpl("draft", "native", "cpu.draft_ops:build_draft", self._accepts_matrices),
            KernelImpl("vision_layer", "native", "cpu.vision_ops:build_vision_layer", self._accepts_matrices),
            KernelImpl("audio_layer", "native", "cpu.audio_ops:build_audio_layer", self._accepts_matrices),
        )

    def refusal(self, device: str, kernels: str) -> str | None:
        """Return why the native kernels can't serve a type of device and a choice of kernels; None where they do."""
        if kernels != "auto":
            return NEIGHBOURS if kernels == "reference" else ASKED
        if device != "cpu":
            return "runs on the CPU"
        return native.missing()

    def row_dtype(self, compute: str) -> str:
        """Return "float32": rows stay so whatever the compute dtype."""
        return "float32"

    def activations(self, compute: str, asked: str | None) -> str:
        """Return how matmuls take the rows of packed weights: as they are only in float32 where nothing else was asked for."""
        return asked or ("float32" if compute == "float32" else "int8")

    def packing(self, stored: str) -> str:
        """Return the name of the packing that weights stored so get."""
        return stored if stored in DENSE else PACKED + stored

    def unpacked(self, held: str) -> str:
        """Return the name of the stored scheme of weights that are held so."""
        return held.removeprefix(PACKED).removesuffix(APART)

    def packer(self, device: Device, dtype: Dtype) -> Packer:
        """Return what repacks packed weights into panels."""
        from gemcutter.quant.packing import CpuPacker

        return CpuPacker()

    def is_compact(self, layer: LayerPlan) -> bool:
        """Return False: keys and values are stored apart."""
        return False

    def attn_metadata(self, step: Step, kinds: AttnKinds) -> Mapping[GroupId, object]:
        """Return a `CpuAttnMetadata` for each group."""
        from gemcutter.ops.cpu.attn_metadata import build

        return build(step, kinds)

    def static_metadata(self, **tensors: Any) -> object:
        """Raise KernelError: every step has structs of its own."""
        raise KernelError("steps of the native kernels can't run over static memory")

    def capture_refusal(self, device: Device, kernels: Collection[str], ple_table: Weight | None) -> str | None:
        """Return why steps can't be captured: there is no GPU."""
        return NO_GPU

    def matmul(self, weight: Weight, rows_ND: Tensor, activations: str) -> Callable[[], None]:
        """Return a call that multiplies rows with a weight, the result thrown away: for measuring what the kernel reaches."""
        from gemcutter.ops.cpu.layer_ops import bind_matmul

        return bind_matmul(weight, rows_ND, activations)

    def _accepts_matrices(self, site: KernelSite) -> str | None:
        foreign = [kind for kind in site.stored.split("+") if kind not in DENSE and not kind.startswith(PACKED)]
        if reason := self.refusal(site.device, site.kernels):
            return reason
        if site.ranks and site.op == "draft":
            return "ranks share the token table"
        if site.ranks == "group" and site.op in SUMMED_OPS:
            return "ranks sum in the middle of it, by other means than the library's"
        if SCATTERED in site.stored and site.op not in SORTED_OPS:
            return "takes no rows in the order of scattered groups"
        if APART in site.stored and site.op != "linear":
            return "the groups of its matrices are scattered each in another way"
        return f"no native layout for {', '.join(foreign)}" if foreign else None

    def _accepts_attention(self, site: KernelSite) -> str | None:
        return self.refusal(site.device, site.kernels)


CPU = CpuBackend()
