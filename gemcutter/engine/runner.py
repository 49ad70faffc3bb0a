"""Runs steps on the decoder: scheduled chunks in, tokens and reports out, the same for eager and captured steps.

Owns the order head, report, sample, and the answer to whether the next step may be launched before this one's tokens are known.
Runs the head a few rows at a time, so that a prompt's log-probabilities never need all its logits at once. Refuses to know queues
and the accounting of pages. Read `cuda_graphs.py` for captured steps, `sampler.py` for the choice of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.nonfinite import locate
from gemcutter.engine.request import Request
from gemcutter.engine.sampler import HostSampler, SampledToken, Sampler, SamplingRow
from gemcutter.engine.sampler_device import DeviceSampler
from gemcutter.engine.sampling import TokenLogprobs, best_of, logprobs_of, not_finite
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.engine.step import build_step
from gemcutter.errors import NumericError
from gemcutter.model.pipeline import BegunStep
from gemcutter.model.text import Decoder
from gemcutter.ops.step import Step

HEAD_ROWS = 32  # rows whose logits exist at one time: 32 MiB at 262,144 float32 logits a row


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a step made of one chunk.

    `tokens` has one entry for each sampled row, as has `sampled_RD`, the rows' final states, where the runner keeps them.
    `logprobs`, `states_MD`, `top_logits` and `next_logprobs` belong to the prompt's report.
    `error` is what the chunk's own processing met: its tokens are not to be used then.
    """

    tokens: tuple[SampledToken, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    states_MD: Tensor | None = None
    top_logits: tuple[tuple[int, float], ...] = ()
    next_logprobs: tuple[float, ...] = ()
    error: Exception | None = None
    sampled_RD: Tensor | None = None


NOTHING = ChunkResult()


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of a step's chunks, in their order."""

    chunks: tuple[ChunkResult, ...]


class PendingStep(Protocol):
    """A step that was launched."""

    @property
    def chunks(self) -> Sequence[ScheduledChunk]:
        """Return what the step computes."""

    @property
    def is_on_device(self) -> bool:
        """Return whether the step's tokens come to be on the device, where the next step can read them."""

    def result(self) -> StepResult:
        """Wait for the step and return what it made. Raises what the pass through the model raised."""


class StepLauncher(Protocol):
    """Another way to run some steps than eagerly."""

    def accepts(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Return whether a step can run this way."""

    def launch(self, chunks: Sequence[ScheduledChunk]) -> PendingStep:
        """Launch a step that `accepts` takes."""

    def launch_after(self, pending: PendingStep, chunks: Sequence[ScheduledChunk]) -> PendingStep:
        """Launch the step after a pending one: the same sequences, one position on."""

    def withdraw(self) -> None:
        """Wait until no launched step runs any more; their results are not wanted."""


@dataclass(frozen=True, slots=True)
class EagerStep:
    """A step of any kind, which was begun; here alone it runs when its result is asked for."""

    chunks: Sequence[ScheduledChunk]
    finish: Callable[[], StepResult]
    is_on_device: bool = False

    def result(self) -> StepResult:
        """Complete the step."""
        return self.finish()


class ModelRunner:
    """Runs the steps of one engine; `captured` runs those that it accepts. `keeps_states` keeps the states of sampled rows."""

    def __init__(
        self, decoder: Decoder, pool: PagedKVCache, captured: StepLauncher | None = None, *, keeps_states: bool = False
    ) -> None:
        self.decoder, self.pool, self.captured, self.keeps_states = decoder, pool, captured, keeps_states
        self.sampler = sampler_for(decoder)

    def launch(self, chunks: Sequence[ScheduledChunk]) -> PendingStep:
        """Launch a step; its rows are reserved, and count as computed only once their result is there."""
        if self.captured is not None and self.captured.accepts(chunks):
            return self.captured.launch(chunks)
        if not chunks:
            return EagerStep(chunks, lambda: StepResult(()))
        step = build_step(self.decoder, chunks)
        begun = self.decoder.begin(step, self.pool)
        return EagerStep(chunks, lambda: self._finish(chunks, step, begun))

    def can_run_ahead(self, pending: PendingStep) -> bool:
        """Return whether the step after a pending one can be launched before its tokens are known."""
        return self.captured is not None and pending.is_on_device and all(chunk.rows == 1 for chunk in pending.chunks)

    def launch_after(self, pending: PendingStep, chunks: Sequence[ScheduledChunk]) -> PendingStep:
        """Launch the step after a pending one for which `can_run_ahead` holds; its ids are still on the device."""
        assert self.captured is not None
        return self.captured.launch_after(pending, chunks)

    def withdraw(self) -> None:
        """Wait until no launched step runs any more: their rows are taken back."""
        self.decoder.finish_all()
        if self.captured is not None:
            self.captured.withdraw()

    def _finish(self, chunks: Sequence[ScheduledChunk], step: Step, begun: BegunStep) -> StepResult:
        """Complete a step that was begun: report on prompt rows, sample where tokens are wanted."""
        states_MD = self.decoder.finish(begun)
        results, sampled_rows = list[ChunkResult](), list[range]()
        start = 0
        for chunk in chunks:
            stop = start + len(chunk.logit_rows)
            results.append(self._report(chunk, states_MD[start:stop]) if chunk.reports else NOTHING)
            sampled_rows.append(range(stop - rows_for_logits(chunk), stop))
            start = stop
        for group in _groups(sampled_rows):
            self._sample(chunks, results, states_MD, sampled_rows, group)
        if any(isinstance(result.error, NumericError) for result in results):
            self._locate(step, results)
        return StepResult(tuple(results))

    def _locate(self, step: Step, results: list[ChunkResult]) -> None:
        """Let errors of logits that are not finite say where it began."""
        error = locate(self.decoder, step, self.pool)
        for index, result in enumerate(results):
            if isinstance(result.error, NumericError):
                results[index] = ChunkResult(error=error)

    def _report(self, chunk: ScheduledChunk, rows_MD: Tensor) -> ChunkResult:
        """Return the log-probabilities and states of a chunk of prompt rows."""
        request, logprobs = chunk.sequence.request, list[TokenLogprobs]()
        best = request.prompt_logprobs or 0
        try:
            for start in range(0, len(chunk.targets), HEAD_ROWS):
                targets = chunk.targets[start : start + HEAD_ROWS]
                logprobs += logprobs_of(self.decoder.logits(rows_MD[start : start + len(targets)]), targets, best)
        except Exception as error:
            return ChunkResult(error=error)
        return ChunkResult(logprobs=tuple(logprobs), states_MD=rows_MD if request.hidden_states else None)

    def _sample(
        self,
        chunks: Sequence[ScheduledChunk],
        results: list[ChunkResult],
        states_MD: Tensor,
        rows: Sequence[range],
        group: Sequence[int],
    ) -> None:
        """Add tokens and best logits to the results of a group of chunks, given by their indices."""
        size = sum(len(rows[index]) for index in group)
        states_RD = (
            states_MD
            if size == states_MD.shape[0]
            else torch.cat([states_MD[rows[index].start : rows[index].stop] for index in group])
        )
        found = sample_chunks(self.sampler, [chunks[index] for index in group], self.decoder.logits(states_RD))
        for index, result in zip(group, found, strict=True):
            report = results[index]
            error = report.error or result.error
            kept = states_MD[rows[index].start : rows[index].stop].clone() if self.keeps_states else None
            results[index] = replace(result, logprobs=report.logprobs, states_MD=report.states_MD, error=error, sampled_RD=kept)


def sampler_for(decoder: Decoder) -> Sampler:
    """Return the sampler that works where a decoder's logits are."""
    return DeviceSampler() if decoder.device.type == "cuda" else HostSampler()


def _groups(sampled_rows: Sequence[range]) -> Iterator[list[int]]:
    """Yield the indices of chunks that have sampled rows, HEAD_ROWS rows or one chunk at a time."""
    group, size = list[int](), 0
    for index, rows in enumerate(sampled_rows):
        if group and size + len(rows) > HEAD_ROWS:
            yield group
            group, size = [], 0
        if rows:
            group.append(index)
            size += len(rows)
    if group:
        yield group


def rows_for_logits(chunk: ScheduledChunk) -> int:
    """Return how many of a chunk's last rows go through the head."""
    return max(chunk.num_sampled, int(chunk.is_last and asks_of_last_row(chunk)))


def asks_of_last_row(chunk: ScheduledChunk) -> bool:
    """Return whether logits or log-probabilities at the last prompt position are wanted."""
    request = chunk.sequence.request
    return chunk.in_prompt and bool(request.top_logits or request.next_logprobs)


def sampling_row(chunk: ScheduledChunk, place: int) -> SamplingRow:
    """Return what decides the token after the sampled row `place` of a chunk: drafts before it count as the reply's."""
    sequence, drafts = chunk.sequence, chunk.drafts[:place]
    request, reply = sequence.request, sequence.reply
    counts = sequence.counts if request.sampling.has_penalties else {}
    if drafts:
        reply = [*reply, *drafts]
        if counts:
            counts = dict(counts)
            for token in drafts:
                counts[token] = counts.get(token, 0) + 1
    position = chunk.start + chunk.rows - chunk.num_sampled + place + 1
    banned = request.stop_ids if len(reply) < request.min_tokens else frozenset()
    return SamplingRow(
        request.sampling,
        sequence.seed,
        position,
        request.prompt,
        reply,
        counts,
        sequence.processors,
        chunk.want_probs,
        banned,
    )


def sample_chunks(sampler: Sampler, chunks: Sequence[ScheduledChunk], logits_RV: Tensor) -> list[ChunkResult]:
    """Return the tokens and best logits of chunks whose last rows gave these logits, one after the other."""
    rows, places, starts, start = list[int](), list[SamplingRow](), list[int](), 0
    for chunk in chunks:
        starts.append(start)
        for place in range(chunk.num_sampled):
            rows.append(start + place)
            places.append(sampling_row(chunk, place))
        start += rows_for_logits(chunk)
    chosen_RV = logits_RV if len(rows) == logits_RV.shape[0] else logits_RV[rows]
    outcomes = iter(sampler.sample(chosen_RV, places) if places else ())
    results = list[ChunkResult]()
    for chunk, start in zip(chunks, starts, strict=True):
        found = list(islice(outcomes, chunk.num_sampled))
        tokens = tuple(each for each in found if isinstance(each, SampledToken))
        error = next((each for each in found if isinstance(each, Exception)), None)
        result = ChunkResult(tokens if error is None else (), error=error)
        try:
            results.append(_report_last_row(chunk, logits_RV, start, result))
        except NumericError as found_later:
            results.append(replace(result, error=error or found_later))
    return results


def _report_last_row(chunk: ScheduledChunk, logits_RV: Tensor, row: int, result: ChunkResult) -> ChunkResult:
    """Return a result with what is asked of the last prompt position, whose logits are in `row`. Raises NumericError."""
    if not asks_of_last_row(chunk):
        return result
    request: Request = chunk.sequence.request
    best, next_logprobs = best_of(logits_RV[row], max(request.top_logits, 1)), tuple[float, ...]()
    if not math.isfinite(best[0][1]):
        raise not_finite()
    if request.next_logprobs:
        next_logprobs = tuple(logits_RV[row].log_softmax(-1)[list(request.next_logprobs)].tolist())
    return replace(result, top_logits=best[: request.top_logits], next_logprobs=next_logprobs)
