"""The backend of the Triton kernels.

Owns when they serve and what the loader, the cache and the engine must know of them: packed weights are repacked for the device,
k_eq_v layers are stored compactly, attention reads block tables on the device, steps can be captured as graphs. Imports neither
torch nor Triton until a kernel is loaded. Read `layer_ops.py` for the kernels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gemcutter.ops import LAYER_OPS, MODEL_OPS, KernelSite, devices
from gemcutter.ops.backend import DENSE, NEIGHBOURS, NO_GPU, AttnKinds, KernelImpl

if TYPE_CHECKING:  # what follows imports torch
    from torch import device as Device
    from torch import dtype as Dtype

    from gemcutter.ops.step import Step
    from gemcutter.plan import GroupId, LayerPlan
    from gemcutter.quant import Weight
    from gemcutter.quant.packing import Packer

PACKED = "gpu-packed-"  # begins the name of a scheme that was repacked for these kernels
UNPACKED = re.compile(r".*-indexed")  # begins the schemes that stay as they are: scattered groups
HEAD_DIMS = (16, 32, 64, 128, 256, 512)


class TritonBackend:
    """Triton's kernels, on a GPU; on a CPU under Triton's interpreter alone, to be tested, and only if they are asked for."""

    name = "triton"

    def __init__(self) -> None:
        accepts = {"attention": self._accepts_attention, "layer": self._accepts_layer}
        self.kernels = (
            KernelImpl("linear", "triton", "triton.linear:linear", self._accepts_matrices),
            *(KernelImpl(op, "triton", f"triton.model_ops:build_{op}", self._accepts_matrices) for op in MODEL_OPS),
            *(
                KernelImpl(op, "triton", f"triton.layer_ops:build_{op}", accepts.get(op, self._accepts_matrices))
                for op in (*LAYER_OPS, "layer")
            ),
        )

    def refusal(self, device: str, kernels: str) -> str | None:
        """Return why Triton's kernels can't serve a type of device and a choice of kernels; None where they do."""
        if kernels == "reference":
            return NEIGHBOURS
        if device == "cpu" and kernels != "triton":
            return "runs on CUDA"
        if find_spec("triton") is None:
            return "Triton is not installed"
        if device == "cpu":
            is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            return None if is_interpreted else "runs on a CPU only under TRITON_INTERPRET=1, to be tested"
        return devices.cuda_missing()

    def row_dtype(self, compute: str) -> str:
        """Return the compute dtype."""
        return compute

    def activations(self, compute: str, asked: str | None) -> str:
        """Return "float32": rows are multiplied as they are."""
        return "float32"

    def packing(self, stored: str) -> str:
        """Return the name of the packing that weights stored so get."""
        return stored if stored in DENSE or UNPACKED.match(stored) else PACKED + stored

    def packer(self, device: Device, dtype: Dtype) -> Packer:
        """Return what repacks packed weights for the device and lays the parts of a weight side by side."""
        from gemcutter.quant.packing import GpuPacker

        return GpuPacker(device, dtype)

    def is_compact(self, layer: LayerPlan) -> bool:
        """Return whether the layer's values are its normalised keys, which the kernels can read from one copy."""
        return layer.can_compact

    def attn_metadata(self, step: Step, kinds: AttnKinds) -> Mapping[GroupId, object]:
        """Return a `TritonAttnMetadata` for each group."""
        from gemcutter.ops.triton.attn_metadata import build

        return build(step)

    def static_metadata(self, **tensors: Any) -> object:
        """Return a `TritonAttnMetadata` over the given tensors."""
        from gemcutter.ops.triton.attn_metadata import TritonAttnMetadata

        return TritonAttnMetadata(**tensors)

    def capture_refusal(self, device: Device, kernels: Collection[str], ple_table: Weight | None) -> str | None:
        """Return why steps can't be captured: a kernel, or the host's gathering of per-layer embeddings, would wait."""
        from gemcutter.ops.triton.attn_metadata import is_near

        if device.type != "cuda":
            return NO_GPU
        others = sorted({*kernels} - {"triton"})
        if others:
            return f"kernels of {', '.join(others)} may wait for the host"
        if ple_table is not None and not is_near(ple_table, device):
            return "the host gathers the per-layer embeddings"
        return None

    def _accepts_matrices(self, site: KernelSite) -> str | None:
        known = (*DENSE, "mixed")  # whose parts the product takes one by one; they are listed apart where an op is selected
        foreign = [kind for kind in site.stored.split("+") if kind not in known and not kind.startswith(PACKED)]
        if reason := self.refusal(site.device, site.kernels):
            return reason
        return f"no Triton kernel for {', '.join(foreign)}" if foreign else None

    def _accepts_attention(self, site: KernelSite) -> str | None:
        if site.layer is not None and site.layer.head_dim not in HEAD_DIMS:
            return f"head_dim {site.layer.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
        return self.refusal(site.device, site.kernels)

    def _accepts_layer(self, site: KernelSite) -> str | None:
        return self._accepts_matrices(site) or self._accepts_attention(site)


TRITON = TritonBackend()
