"""Token sampling on the device that made the logits, many rows at once.

Owns `SamplingTensors` and `sample_batch`, which a captured graph can replay, and `DeviceSampler`, the sampler beside a GPU: it
edits rows there, samples together those that `sample_batch` takes, and all others one by one. The random numbers come
with the rows, since they depend on seed and position alone. Shape letters: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gemcutter.engine.sampler import SampledToken, SamplingRow, edit, finish_row
from gemcutter.engine.sampling import sample_token
from gemcutter.engine.sampling_params import SamplingParams

CANDIDATES = 128  # the largest top_k that is sampled in a batch


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """How each row's token is sampled; float64 [R] but for `top_k`, int64. Temperature 0 is greedy."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    top_k: Tensor

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], device: torch.device) -> SamplingTensors:
        """Build the tensors of some rows."""
        *floats, top_k = zip(*map(numbers_of, rows), strict=True)
        named = {
            name: torch.tensor(column, dtype=torch.float64, device=device) for name, column in zip(FLOATS, floats, strict=True)
        }
        return cls(**named, top_k=torch.tensor(top_k, device=device))


FLOATS = tuple(field.name for field in fields(SamplingTensors) if field.name != "top_k")


def is_batchable(params: SamplingParams) -> bool:
    """Return whether `sample_batch` samples a row of edited logits: greedily, or among its first CANDIDATES."""
    return params.temperature == 0 or 0 < params.top_k <= CANDIDATES


def numbers_of(row: SamplingRow) -> tuple[float, float, float, float, int]:
    """Return how a row's token is sampled, in the order of `SamplingTensors`; a greedy row looks at one candidate."""
    params = row.params
    if params.temperature == 0:
        return 0.0, 1.0, 0.0, 0.0, 1
    return params.temperature, params.top_p, params.min_p, row.random, params.top_k


def sample_batch(logits_RV: Tensor, tensors: SamplingTensors) -> tuple[Tensor, Tensor]:
    """Return a token [R] for every row of edited logits, and the largest logit [R] of each, NaN where there is one."""
    best_RC, ids_RC = logits_RV.topk(min(CANDIDATES, logits_RV.shape[1]))
    rank_C = torch.arange(best_RC.shape[1], device=best_RC.device)
    temperature = torch.where(tensors.temperature == 0, 1.0, tensors.temperature)
    scaled = torch.where(rank_C < tensors.top_k[:, None], best_RC.double() / temperature[:, None], -torch.inf)
    probs = scaled.softmax(-1)
    before = probs.cumsum(-1) - probs  # a token stays if those before it have not reached top_p yet
    stays = (before < tensors.top_p[:, None]) | (tensors.top_p[:, None] >= 1)
    probs = torch.where(stays & (probs >= tensors.min_p[:, None] * probs[:, :1]), probs, 0.0)
    total = probs.cumsum(-1)
    chosen = (total <= tensors.uniform[:, None] * total[:, -1:]).sum(-1)
    last = ((probs > 0).sum(-1) - 1).clamp(min=0)  # a row that pads a batch has no candidate
    found = ids_RC.gather(1, torch.minimum(chosen, last)[:, None])[:, 0]
    tokens = torch.where(tensors.temperature == 0, logits_RV.argmax(-1), found)  # ties break alike whatever the batch holds
    return tokens, best_RC[:, 0]


class DeviceSampler:
    """Samples where the logits are; of each step only the tokens, and what was asked beside them, come to the host."""

    def sample(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | Exception]:
        """Return each row's token, or its error."""
        edited_RV, errors = edit(logits_RV, rows)
        together = [index for index, row in enumerate(rows) if index not in errors and is_batchable(row.params)]
        found = dict[int, tuple[int, float]]()  # each row's token and its largest edited logit
        if together:
            chosen_RV = edited_RV if len(together) == len(rows) else edited_RV[together]
            tokens_R, best_R = sample_batch(chosen_RV, SamplingTensors.of([rows[index] for index in together], logits_RV.device))
            found = dict(zip(together, zip(tokens_R.tolist(), best_R.tolist(), strict=True), strict=True))
        return [
            errors[index] if index in errors else _finish(logits_RV[index], edited_RV[index], row, found.get(index))
            for index, row in enumerate(rows)
        ]


def _finish(logits_V: Tensor, edited_V: Tensor, row: SamplingRow, found: tuple[int, float] | None) -> SampledToken | Exception:
    try:
        if found is None:
            token = sample_token(edited_V, row.params, row.random)
            found = token, float(edited_V[token])
        return finish_row(logits_V, edited_V, row, *found)
    except Exception as error:
        return error
