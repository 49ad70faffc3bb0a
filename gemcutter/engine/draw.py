"""The choice of tokens for many rows at once, on the device that made the logits.

Owns `draw`, which gives what `sampling.sample` gives, row by row, without the host: the uniform numbers come with the rows,
since they depend on seed and position alone. Refuses what it can't do the same way: penalties and biases, draws that may take any
token of the vocabulary, and log-probabilities. Shape letters: B rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gemcutter.engine.request import Request
from gemcutter.engine.sampling import uniform

CANDIDATES = 128  # the largest top_k that is drawn here


@dataclass(frozen=True, slots=True)
class Draws:
    """How each row's token is chosen; float64 [B] but for `top_k`, int64. Temperature 0 is greedy."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    top_k: Tensor


FLOATS = tuple(field.name for field in fields(Draws) if field.name != "top_k")


def can_draw(request: Request, in_prompt: bool) -> bool:
    """Tell whether a request's next token can be chosen without its logits coming to the host."""
    sampling, wants_logits = request.sampling, in_prompt and request.top_logits > 0
    if wants_logits or sampling.alters_logits or sampling.logprobs is not None or not request.max_tokens:
        return False
    return sampling.temperature == 0 or 0 < sampling.top_k <= CANDIDATES


def numbers_of(request: Request, seed: int, position: int) -> tuple[float, float, float, float, int]:
    """Spell how the token at `position` is chosen, in the order of `Draws`; a greedy row looks at one candidate."""
    sampling = request.sampling
    if sampling.temperature == 0:
        return 0.0, 1.0, 0.0, 0.0, 1
    return sampling.temperature, sampling.top_p, sampling.min_p, uniform(seed, position), sampling.top_k


def draw(logits_BV: Tensor, draws: Draws) -> Tensor:
    """Choose a token [B] for every row of soft-capped logits."""
    best_BC, ids_BC = logits_BV.topk(min(CANDIDATES, logits_BV.shape[1]))
    rank_C = torch.arange(best_BC.shape[1], device=best_BC.device)
    temperature = torch.where(draws.temperature == 0, 1.0, draws.temperature)
    scaled = torch.where(rank_C < draws.top_k[:, None], best_BC.double() / temperature[:, None], -torch.inf)
    probs = scaled.softmax(-1)
    before = probs.cumsum(-1) - probs  # a token stays if those before it have not reached top_p yet
    stays = (before < draws.top_p[:, None]) | (draws.top_p[:, None] >= 1)
    probs = torch.where(stays & (probs >= draws.min_p[:, None] * probs[:, :1]), probs, 0.0)
    total = probs.cumsum(-1)
    drawn = (total <= draws.uniform[:, None] * total[:, -1:]).sum(-1)
    last = ((probs > 0).sum(-1) - 1).clamp(min=0)  # a row that pads a batch has no candidate
    found = ids_BC.gather(1, torch.minimum(drawn, last)[:, None])[:, 0]
    return torch.where(draws.temperature == 0, logits_BV.argmax(-1), found)  # ties fall alike whoever is drawn beside a row
