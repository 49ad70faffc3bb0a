"""One step on the decoder, and what is made of its states: tokens, log-probabilities, reports.

Owns the order head, report, sample; runs the head a few rows at a time, so that a prompt's log-probabilities never need all its
logits at once. Refuses to know queues and pages.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.engine.request import Event, Sequence
from gemcutter.engine.sampling import TokenLogprobs, best_of, sample, token_logprobs
from gemcutter.engine.scheduler import Work
from gemcutter.engine.step import build_step
from gemcutter.engine.threads import one_thread
from gemcutter.model.text import Decoder

HEAD_ROWS = 32  # rows whose logits exist at one time: 32 MiB at 262,144 float32 logits a row


@dataclass(frozen=True, slots=True)
class Walk:
    """A step of any kind, which runs when its tokens are asked for."""

    decoder: Decoder
    pool: PagedKVCache
    works: Rows[Work]
    is_committed: bool = False

    def land(self) -> list[Event | None]:
        """Run the step, and give each work's choice."""
        return run_step(self.decoder, self.pool, self.works) if self.works else []


def run_step(decoder: Decoder, pool: PagedKVCache, works: Rows[Work]) -> list[Event | None]:
    """Run the works' rows; for each work give the chosen token, or None while its prompt is unfinished."""
    states_MD = decoder.forward(build_step(decoder, works), pool)
    ends, start = [], 0
    for work in works:
        kept = len(work.kept_rows)
        rows_RD = states_MD[start : start + kept]
        start += kept
        if work.sequence.in_prompt and work.sequence.request.wants_all_rows:
            _report_rows(decoder, work, rows_RD)
        ends.append(rows_RD[-1:] if work.is_last_chunk else rows_RD[:0])
    return _choose(decoder, works, ends)


def _report_rows(decoder: Decoder, work: Work, rows_RD: Tensor) -> None:
    """Add the log-probabilities and states of a chunk of prompt rows to the request's report."""
    request, report = work.sequence.request, work.sequence.report
    report.rewind(work.table.length)
    if request.hidden_states:
        report.hidden_states.append(rows_RD)
    if request.prompt_logprobs is None:
        return
    targets = work.sequence.tokens[work.table.length + 1 : work.table.length + work.rows + 1]  # the last row's is not known yet
    for start in range(0, len(targets), HEAD_ROWS):
        logprobs = decoder.logits(rows_RD[start : start + HEAD_ROWS][: len(targets) - start]).log_softmax(-1)
        for row, token in zip(logprobs, targets[start:], strict=False):
            report.logprobs.append(TokenLogprobs(token, float(row[token]), best_of(row, request.prompt_logprobs)))


def _choose(decoder: Decoder, works: Rows[Work], ends: list[Tensor]) -> list[Event | None]:
    """Choose the next token of every work whose last row was computed, HEAD_ROWS at a time."""
    choices: list[Event | None] = [None] * len(works)
    ready = [index for index, work in enumerate(works) if work.is_last_chunk]
    for start in range(0, len(ready), HEAD_ROWS):
        group = ready[start : start + HEAD_ROWS]
        sequences = [works[index].sequence for index in group]
        if not any(needs_logits(sequence) for sequence in sequences):
            for index, sequence in zip(group, sequences, strict=True):
                choices[index] = Event(sequence.number, prompt=sequence.report)
            continue
        logits_RV = decoder.logits(torch.cat([ends[index] for index in group])).cpu()
        with one_thread():
            for index, sequence, logits_V in zip(group, sequences, logits_RV, strict=True):
                choices[index] = choose_one(sequence, logits_V)
    return choices


def needs_logits(sequence: Sequence) -> bool:
    """Tell whether a sequence wants more of its last row than that it was computed."""
    return sequence.request.max_tokens > 0 or sequence.request.top_logits > 0


def choose_one(sequence: Sequence, logits_V: Tensor) -> Event:
    """Choose a sequence's next token from its logits on the host, and report what was asked about them."""
    request, first = sequence.request, sequence.in_prompt
    if first and request.top_logits:
        sequence.report.top_logits = best_of(logits_V, request.top_logits)
    report = sequence.report if first else None
    if not request.max_tokens:
        return Event(sequence.number, prompt=report)
    token = sample(logits_V, request.sampling, request.prompt, sequence.reply, sequence.seed)
    best = request.sampling.logprobs
    return Event(sequence.number, token, None if best is None else token_logprobs(logits_V, token, best), prompt=report)
