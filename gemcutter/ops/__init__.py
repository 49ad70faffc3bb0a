"""The vocabulary of kernels: what can be computed, and where.

Words are small (`linear`, `attention`); sentences are a layer's lines (`project, attend, mix, feed, inject`) and the model's
ends (`embed, ple, norm, head`), written in words. A provider may replace a word, a sentence, or all lines of a layer at once
(`layer`). This module imports no torch, so that the choice can be explained from headers alone. Read `bind.py` for the table of
providers, `reference.py` for what each verb means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemcutter.plan import LayerPlan

WORDS = ("linear", "attention")
LINES = ("project", "attend", "mix", "feed", "inject")
SENTENCES = ("embed", "ple", *LINES, "layer", "norm", "head")

# The matrices that a sentence multiplies with or gathers from, by canonical name within its layer or model. The head's depends on
# the plan; the rows-only table of `ple` may be stored in any way.
MATRICES: dict[str, tuple[str, ...]] = {
    "embed": ("embed.tokens",),
    "ple": ("ple.in",),
    "project": ("attn.in",),
    "mix": ("attn.out",),
    "feed": ("mlp.in", "mlp.out", "moe.router", "moe.in", "moe.out"),
    "inject": ("ple.gate", "ple.out"),
}
NEXT_NORM = "next.norm"  # a whole layer is also given the norm that the layer after it begins with
MATRICES["layer"] = tuple(name for line in LINES for name in MATRICES.get(line, ()))


@dataclass(frozen=True, slots=True)
class Site:
    """Where a kernel would run; everything static.

    `device` and `dtype`, that of rows, are spelled as torch spells them ("cpu", "bfloat16"); `stored` is how the weights are
    stored, a dtype or a packed scheme, "mixed" where the parts of one weight differ, several joined by "+" where those of a
    sentence do; `kernels` is what was asked for, one of `bind.CHOICES`; `adapted` says that adapters change the products of some
    rows.
    """

    verb: str
    layer: LayerPlan | None
    device: str
    dtype: str
    stored: str
    kernels: str = "auto"
    adapted: bool = False

    @property
    def invariant(self) -> bool:
        """Tell whether a row's result must not depend on its neighbours, bit for bit."""
        return self.kernels == "reference"
