"""What no implementation can beat here: the bytes that a token must read, and the operations that a prompt needs.

Owns these two counts, which over the machine's rates give ceilings. Weights are counted as they are held (a packed matrix by its
packed bytes), keys, values and operations by the plan. Refuses to know how the rates are measured: that is in `hardware.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gemcutter.param_spec import Access, ParamSpec
from gemcutter.plan import ModelPlan


class HasBytes(Protocol):
    """What is counted of a parameter: one that is there, or one that is only planned."""

    @property
    def nbytes(self) -> int:
        """Count the bytes that it takes, or would take."""


def held_bytes(plan: ModelPlan, params: Mapping[str, HasBytes]) -> int:
    """Count the bytes of the weights that are read whole: all but the tables that are only gathered from by the row."""
    return sum(params[spec.name].nbytes for spec in plan.params() if not _is_gathered(plan, spec))


def token_bytes(plan: ModelPlan, params: Mapping[str, HasBytes], batch: int = 1) -> int:
    """Count the bytes of weights that decoding one token of each of `batch` sequences must read.

    All are read once, of experts those that some sequence chooses, as many as independent choices give, of tables a row each.

    Keys and values come on top: `plan.read_bytes(tokens, 0, itemsize)`.
    """
    return int(sum(read_bytes(plan, spec, params[spec.name].nbytes, batch) for spec in plan.params()))


def read_bytes(plan: ModelPlan, spec: ParamSpec, nbytes: int, batch: int) -> float:
    """Count what such a step reads of one parameter of `nbytes`."""
    if not _is_gathered(plan, spec):
        return nbytes * plan.read_share(spec, batch)
    return batch * nbytes / spec.shape[0] if spec.shape[0] else 0.0  # one row of a table for each


def prefill_flops(plan: ModelPlan, depth: int, tokens: int) -> int:
    """Count the operations of `tokens` more prompt rows after `depth`, when the last one alone wants logits."""
    return plan.flops(depth + tokens) - plan.flops(depth, wanted=0)


def _is_gathered(plan: ModelPlan, spec: ParamSpec) -> bool:
    return spec.access is Access.ROWS or (spec.name == "embed.tokens" and not plan.tied_head)
