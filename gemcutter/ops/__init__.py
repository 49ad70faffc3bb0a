"""The vocabulary of kernels: which ops there are, and where an implementation would run.

Primitive ops (`linear`) compose into layer ops (`qkv, attention, attn_out, mlp, ple_gate`) and model ops (`embed, ple_embed,
final_norm, lm_head`). A kernel may implement any of them, a whole layer at once (`layer`), a drafter's bursts (`draft`), or a
layer of a tower (`vision_layer`, `audio_layer`). This module imports no torch, so that the selection can be explained from
headers alone. Read `registry.py` for the table of implementations, `reference.py` for what each op computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemcutter.plan import LayerPlan

PRIMITIVE_OPS = ("linear",)
LAYER_OPS = ("qkv", "attention", "attn_out", "mlp", "ple_gate")
MODEL_OPS = ("embed", "ple_embed", "final_norm", "lm_head")
DRAFTER_OPS = ("draft",)  # beside those of its decoder
TOWER_OPS = ("vision_layer", "audio_layer")
SUMMED_OPS = ("attn_out", "mlp", "layer", "draft")  # in the middle of which tensor-parallel ranks sum a product
OPS = (*PRIMITIVE_OPS, "embed", "ple_embed", *LAYER_OPS, "layer", "final_norm", "lm_head")  # in the order of a step

# The matrices that an op multiplies with or gathers from, by canonical name within its layer or model. The LM head's depends on
# the plan; the rows-only table of `ple_embed` may be stored in any way.
MATRICES: dict[str, tuple[str, ...]] = {
    "embed": ("embed.tokens",),
    "ple_embed": ("ple.in",),
    "qkv": ("attn.in",),
    "attn_out": ("attn.out",),
    "mlp": ("mlp.in", "mlp.out", "moe.router", "moe.in", "moe.out"),
    "ple_gate": ("ple.gate", "ple.out"),
}
DRAFT_MATRICES = ("draft.in", "draft.out", "draft.centroids")  # beside those of a drafter's layers and its head
MATRICES["layer"] = tuple(name for op in LAYER_OPS for name in MATRICES.get(op, ()))


@dataclass(frozen=True, slots=True)
class KernelSite:
    """Where a kernel would run; everything static.

    `device` and `dtype`, that of rows, are spelled as torch spells them ("cpu", "bfloat16"); `stored` is how the weights are
    held, a dtype or a packed scheme, "mixed" where the parts of one weight differ, several joined by "+" where those of an op
    do; `kernels` is what was asked for, one of `registry.KERNELS`; `ranks` how tensor-parallel ranks sum: "" where there is one,
    "native" where the CPU library does, else "group".
    """

    op: str
    layer: LayerPlan | None
    device: str
    dtype: str
    stored: str
    kernels: str = "auto"
    ranks: str = ""

    @property
    def invariant(self) -> bool:
        """Return whether a row's result must not depend on its neighbours, bit for bit."""
        return self.kernels == "reference"
