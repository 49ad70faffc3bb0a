"""The vocabulary of kernels: what can be computed, and where.

Words are small (`linear`, `attention`); sentences are a layer's lines (`project, attend, mix, feed, inject`) and the model's
ends (`embed, ple, head`), written in words. A provider may replace a word or a whole sentence. This module imports no torch, so
that the choice can be explained from headers alone. Read `bind.py` for the table of providers, `reference.py` for what each
verb means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemcutter.plan import LayerPlan

WORDS = ("linear", "attention")
SENTENCES = ("embed", "ple", "project", "attend", "mix", "feed", "inject", "head")


@dataclass(frozen=True, slots=True)
class Site:
    """Where a kernel would run; everything static.

    `device` and `dtype` are spelled as torch spells them ("cpu", "bfloat16"); `stored` is how the weights are stored, a dtype
    or a packed scheme, "mixed" where the parts of one weight differ; `invariant` asks
    that a row's result not depend on its neighbours, bit for bit.
    """

    verb: str
    layer: LayerPlan | None
    device: str
    dtype: str
    stored: str
    invariant: bool = False
