"""How far apart two sides may lie: the thresholds of a certificate, and its verdict.

Owns four sets of limits and the rule that chooses among them by what the two sides do not share. Limits are several times what
sound models show (docs/numerics.md), because deeper ones drift further: a pass means "within rounding of this kind", not "as
good as can be". Knows neither models nor files. Read `compare.py` for the measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcutter.parity.compare import Drift, LayerDrift

LOW_BITS, HALF_BITS = 7.0, 16.0  # fewer bits a weight, scales included, are judged as 4 and as 8 bits


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest differences that pass, `top1` the least agreement. `layer` bounds the mean over rows of a layer's drift."""

    name: str
    max_logit: float  # of logits, which the soft cap keeps within 30
    mean_kl: float  # nats a token
    top1: float
    nll: float  # nats a token
    layer: float


FLOAT32 = Limits("float32", max_logit=1e-3, mean_kl=1e-8, top1=0.99, nll=1e-4, layer=1e-4)
BFLOAT16 = Limits("bfloat16", max_logit=4.0, mean_kl=0.03, top1=0.85, nll=0.02, layer=0.25)
EIGHT_BIT = Limits("8-bit", max_logit=6.0, mean_kl=0.05, top1=0.7, nll=0.05, layer=0.35)
FOUR_BIT = Limits("4-bit", max_logit=12.0, mean_kl=0.5, top1=0.6, nll=0.5, layer=0.75)


@dataclass(frozen=True, slots=True)
class Stored:
    """How a side's matrices are stored: kinds as kernels spell them, and the bits of one weight with its scales."""

    kinds: tuple[str, ...]
    mean_bits: float
    least_bits: float  # of any matrix


@dataclass(frozen=True, slots=True)
class Check:
    """One measure against its limit."""

    measure: str
    found: float
    limit: float
    passed: bool


def choose_limits(dtypes: tuple[str, str], stored: tuple[Stored, Stored] | None) -> tuple[Limits, str]:
    """Return the limits that fit two sides, and why. `stored` is None where both compute with the very same weights."""
    weights = "the same weights" if stored is None else "weights of one kind"
    if stored is not None and stored[0].kinds != stored[1].kinds:
        kinds = [f"{', '.join(side.kinds)} ({side.mean_bits:.1f} bits a weight)" for side in stored]
        least = min(side.least_bits for side in stored)
        return (
            FOUR_BIT if least < LOW_BITS else EIGHT_BIT if least < HALF_BITS else BFLOAT16
        ), f"weights are {kinds[0]} here, {kinds[1]} there"
    if "bfloat16" in dtypes:
        return BFLOAT16, f"{weights}, computed in bfloat16"
    return FLOAT32, f"{weights}, computed in float32 on both sides"


def judge(drift: Drift, limits: Limits) -> list[Check]:
    """Hold every measure against its limit; what is not a number never passes."""
    ours, theirs = drift.nll
    layer = max(drift.layers, key=lambda layer: (layer.mean != layer.mean, layer.mean)).mean
    bounded = {
        "max_abs_logit_difference": (drift.max_logit, limits.max_logit),
        "mean_kl_nats": (drift.mean_kl, limits.mean_kl),
        "nll_difference_nats": (abs(ours - theirs), limits.nll),
        "layer_drift": (layer, limits.layer),
    }
    checks = [Check(measure, found, limit, found <= limit) for measure, (found, limit) in bounded.items()]
    return [*checks, Check("top1_agreement", drift.top1, limits.top1, drift.top1 >= limits.top1)]


def first_divergent(drift: Drift, limits: Limits) -> LayerDrift | None:
    """Return the first layer whose rows drift by more than the limit, in the mean."""
    return next((layer for layer in drift.layers if not layer.mean <= limits.layer), None)
