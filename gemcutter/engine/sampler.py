"""From rows of logits to tokens: one law, `Sampler`, for every request and device.

Owns what a row brings to the choice of its token (`SamplingRow`), the hook for logits processors, biases and penalties as tensors
that any device applies alike, and the sampler that works on the host. Refuses to know requests, steps and text. Read
`sampling.py` for the arithmetic of one row, `sampler_device.py` for the sampler beside a GPU. Shape letters: R rows,
V vocabulary, P edits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gemcutter.engine.sampling import TokenLogprobs, distribution, is_finite, not_finite, sample_token, token_logprobs, uniform
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.threads import one_thread
from gemcutter.errors import RequestError


class LogitsProcessor(Protocol):
    """Edits the logits of one row before its token is sampled: a grammar's mask, a ban of tokens.

    Processors of a request run one after the other, before suppressed ids, bias, penalties and temperature; log-probabilities
    that a caller asked for do not show them. An error that one raises ends its own request alone.
    """

    def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        """Return the logits [V] to sample from, edited in place or new, on the device on which they came.

        `reply` holds the ids before the token in question, drafts among them included; neither list may be changed or kept.
        """


@runtime_checkable
class Observer(Protocol):
    """A logits processor with a state, one for each sequence, that is told what was sampled before it is asked again."""

    def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        """Return the logits to sample from, as `LogitsProcessor` does."""

    def for_sequence(self) -> Observer:
        """Return a processor for a sequence that begins; that of a request is never asked itself."""

    def observe(self, reply: Sequence[int]) -> None:
        """Take note of a reply that has grown, so that work can begin while the model computes; the list may not be kept.

        What was told stays: later replies begin with it.
        """


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """All that decides which token one row of logits gives.

    `position` is that of the new token. `counts` says of every id in prompt and reply how often the reply holds it; it is read
    where there are penalties only.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt: Sequence[int] = ()
    reply: Sequence[int] = ()
    counts: Mapping[int, int] = field(default_factory=dict)
    processors: tuple[LogitsProcessor, ...] = ()
    want_probs: bool = False
    banned: frozenset[int] = frozenset()  # ids that this row may not give, whatever biases say, if there are others

    @property
    def is_edited(self) -> bool:
        """Return whether the logits are changed before a token is chosen."""
        return bool(self.processors or self.banned) or self.params.alters_logits

    @property
    def random(self) -> float:
        """Return the row's number of [0, 1)."""
        return uniform(self.seed, self.position)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token, its log-probabilities if they were asked for, and on request the probability [V] of every token."""

    token: int
    logprobs: TokenLogprobs | None = None
    probs_V: Tensor | None = None


class Sampler(Protocol):
    """Samples a token for every row, alone or in any batch the same."""

    def sample(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | Exception]:
        """Return each row's token, or the error that its own options, processors among them, met. The logits stay as they are."""


class HostSampler:
    """Samples on the CPU, row by row; logits of another device are copied there."""

    def sample(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | Exception]:
        """Return each row's token, or its error."""
        here_RV = logits_RV if logits_RV.is_cpu else logits_RV.cpu()
        with one_thread():
            edited_RV, errors = edit(here_RV, rows)
            return [
                errors[index] if index in errors else _sample_row(here_RV[index], edited_RV[index], row)
                for index, row in enumerate(rows)
            ]


def _sample_row(logits_V: Tensor, edited_V: Tensor, row: SamplingRow) -> SampledToken | Exception:
    try:
        if row.params.temperature == 0:
            numbers_V = edited_V.numpy()
            token = int(numbers_V.argmax())  # ten times as fast as torch's on one thread
            logit = float(numbers_V[token])
        else:
            token = sample_token(edited_V, row.params, row.random)
            logit = float(edited_V[token])
        return finish_row(logits_V, edited_V, row, token, logit)
    except Exception as error:
        return error


def finish_row(logits_V: Tensor, edited_V: Tensor, row: SamplingRow, token: int, logit: float) -> SampledToken:
    """Return a row's token with what was asked beside it.

    `logit` is the edited one of the token. Raises NumericError if the model's logits are not finite, and RequestError if those
    that the row's own edits leave are not.
    """
    if not math.isfinite(logit):
        raise not_finite() if not row.is_edited or not is_finite(logits_V) else RequestError(NOTHING_LEFT)
    best = row.params.logprobs
    logprobs = None if best is None else token_logprobs(logits_V, token, best)
    return SampledToken(token, logprobs, distribution(edited_V, row.params) if row.want_probs else None)


NOTHING_LEFT = "no token is left to sample: logits processors, bias and suppression leave -inf everywhere, or no finite number"

# ---- edits ----


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes to P single logits: row_P and id_P say which, each once; bias is added, then the penalties are applied."""

    row_P: Tensor  # int64
    id_P: Tensor
    bias_P: Tensor  # float32; -inf suppresses
    repetition_P: Tensor  # float32; 1 leaves a logit as it is
    penalty_P: Tensor  # float32, subtracted

    def apply(self, logits_RV: Tensor) -> None:
        """Change the logits in place, on their own device."""
        row, token, bias, repetition, penalty = (
            each.to(logits_RV.device, non_blocking=True)
            for each in (self.row_P, self.id_P, self.bias_P, self.repetition_P, self.penalty_P)
        )
        logits = logits_RV[row, token] + bias
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits_RV[row, token] = torch.where(repetition == 1, logits, scaled) - penalty


def edit(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, dict[int, Exception]]:
    """Return edited logits, and the errors of rows whose own processors or options failed; no row changes another's."""
    if not any(row.is_edited for row in rows):
        return logits_RV, {}
    edited_RV, errors = logits_RV.clone(), dict[int, Exception]()
    edits = list[tuple[int, int, float, float, float]]()
    for index, row in enumerate(rows):
        try:
            _process(edited_RV[index], row)
            edits += [(index, *each) for each in _edits_of(row, _banned(edited_RV[index], row))]
        except Exception as error:
            errors[index] = error
    if edits:
        row_P, id_P, *numbers = zip(*edits, strict=True)
        floats = (torch.tensor(each, dtype=torch.float32) for each in numbers)
        LogitEdits(torch.tensor(row_P), torch.tensor(id_P), *floats).apply(edited_RV)
    return edited_RV, errors


def _process(logits_V: Tensor, row: SamplingRow) -> None:
    """Run a row's processors; what they return becomes the row."""
    for processor in row.processors:
        found = processor(row.prompt, row.reply, logits_V)
        if not isinstance(found, Tensor) or found.shape != logits_V.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RequestError(f"a logits processor returned {shape}, expected logits of shape {tuple(logits_V.shape)}")
        if found is not logits_V:
            logits_V.copy_(found)


def _banned(logits_V: Tensor, row: SamplingRow) -> frozenset[int]:
    """Return the ids that a row may not give: none where its processors leave nothing else, as a grammar does at its end."""
    if not (row.banned and row.processors):
        return row.banned
    left_V = torch.isfinite(logits_V)
    left_V[list(row.banned)] = False
    return row.banned if bool(left_V.any()) else frozenset()


def _edits_of(row: SamplingRow, banned: frozenset[int]) -> Iterator[tuple[int, float, float, float]]:
    """Yield id, bias, repetition penalty and summed penalties of every logit that a row's parameters and bans change."""
    params = row.params
    if not (params.alters_logits or banned):
        return
    bias: dict[int, float] = {**params.logit_bias, **dict.fromkeys((*params.suppress, *banned), -torch.inf)}
    counts = row.counts if params.has_penalties else {}
    for token, count in counts.items():
        penalty = params.presence_penalty + params.frequency_penalty * count if count else 0.0
        yield token, float(bias.pop(token, 0.0)), float(params.repetition_penalty), float(penalty)
    for token, value in bias.items():
        yield token, float(value), 1.0, 0.0
