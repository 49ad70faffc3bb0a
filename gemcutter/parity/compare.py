"""How far two traces of the same tokens lie apart.

Owns the measures and the memory they take: logits exist for a few rows at a time, so a vocabulary of 262,144 costs megabytes, not
gigabytes. `ours` is measured against `theirs`, the reference. Refuses to judge; read `limits.py` for that. Shape letters: N rows,
R rows at a time, V vocabulary, K kept rows, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemcutter.checkpoint.load.load_params import Progress
from gemcutter.parity.trace import Trace

HEAD_ROWS = 32  # rows of one call of a head: 32 MiB at 262,144 logits
WIDE_ROWS = 4  # rows whose logits are widened to float64 at a time


@dataclass(frozen=True, slots=True)
class LayerDrift:
    """How far a layer's output rows lie apart: ‖ours - theirs‖ / ‖theirs‖ of each row, the worst and the mean of them."""

    layer: int
    worst: float
    position: int  # of the worst row
    mean: float


@dataclass(slots=True)
class Drift:
    """What the comparison of two traces found. Likelihoods are in nats; `kl` lists KL(theirs || ours) of every position."""

    max_logit: float = 0.0
    max_logit_position: int = 0
    agreeing: int = 0  # positions where both prefer the same token
    kl: list[float] = field(default_factory=list)
    loss_ours: list[float] = field(default_factory=list)  # of every token but the first
    loss_theirs: list[float] = field(default_factory=list)
    layers: list[LayerDrift] = field(default_factory=list)

    @property
    def mean_kl(self) -> float:
        """Return the mean of KL(theirs || ours), in nats a token."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def worst_position(self) -> int:
        """Return the position whose distributions differ most."""
        return max(range(len(self.kl)), key=lambda position: (math.isnan(self.kl[position]), self.kl[position]))

    @property
    def top1(self) -> float:
        """Return the share of positions where both sides prefer the same token."""
        return self.agreeing / len(self.kl)

    @property
    def nll(self) -> tuple[float, float]:
        """Return the mean negative log-likelihood of ours and theirs."""
        return math.fsum(self.loss_ours) / len(self.loss_ours), math.fsum(self.loss_theirs) / len(self.loss_theirs)


@torch.inference_mode()
def compare(ours: Trace, theirs: Trace, ids: Sequence[int], kept_K: Tensor, progress: Progress) -> Drift:
    """Measure how far two traces of `ids` lie apart; `progress` is told the rows done and all rows."""
    pairs = enumerate(zip(ours.layers, theirs.layers, strict=True))
    drift = Drift(
        layers=[_layer(at, mine, other, kept_K) for at, (mine, other) in pairs if mine is not None and other is not None]
    )
    targets = torch.tensor([*ids[1:], 0])  # the last row's is not known
    for start in range(0, len(ids), HEAD_ROWS):
        stop = min(start + HEAD_ROWS, len(ids))
        logits = torch.stack((ours.logits(start, stop), theirs.logits(start, stop)))
        for offset in range(0, stop - start, WIDE_ROWS):
            rows = slice(offset, offset + WIDE_ROWS)
            _add(drift, logits[:, rows].double(), targets[start:stop][rows])
        progress(stop, len(ids))
    drift.loss_ours.pop()
    drift.loss_theirs.pop()
    return drift


def _add(drift: Drift, logits_2RV: Tensor, targets_R: Tensor) -> None:
    """Add a few rows, ours and theirs, to the measures."""
    ours, theirs = logits_2RV.log_softmax(-1)
    apart_R = (logits_2RV[0] - logits_2RV[1]).abs().amax(-1)
    for row, apart in enumerate(apart_R.tolist()):
        if not apart <= drift.max_logit and not math.isnan(drift.max_logit):
            drift.max_logit, drift.max_logit_position = apart, len(drift.kl) + row
    is_choice = ~(ours.isnan() | theirs.isnan()).any(-1)  # among values that are no number there is no best one
    drift.agreeing += int(((ours.argmax(-1) == theirs.argmax(-1)) & is_choice).sum())
    drift.kl += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
    drift.loss_ours += (-ours.gather(1, targets_R[:, None])[:, 0]).tolist()
    drift.loss_theirs += (-theirs.gather(1, targets_R[:, None])[:, 0]).tolist()


def _layer(index: int, ours_KD: Tensor, theirs_KD: Tensor, kept_K: Tensor) -> LayerDrift:
    norm_K = theirs_KD.double().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    apart_K = (ours_KD.double() - theirs_KD.double()).norm(dim=1) / norm_K
    worst = int(apart_K.argmax())  # a NaN counts as the largest
    return LayerDrift(index, float(apart_K[worst]), int(kept_K[worst]), float(apart_K.mean()))
