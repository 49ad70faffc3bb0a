"""Drives an Engine through a script of requests that join and leave, and lays the oracle's answers beside its own.

Owns `Job`, `Answer` and `drive`; refuses to know which engine options are under test. Log-probabilities are asked over the whole
vocabulary, so that an answer holds every number the engine computed. Read `test_engine_parity.py` next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemcutter.engine.engine import Engine
from gemcutter.engine.request import FinishReason, PromptReport, Request, RequestEvent
from gemcutter.engine.sampling import TokenLogprobs
from gemcutter.engine.sampling_params import SamplingParams
from tests.topologies import VOCAB, oracle, relative_error


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, when it joins (in steps of the engine), and what it asks for."""

    prompt: tuple[int, ...]
    joins: int = 0
    cancel_at: int | None = None  # tokens after which it is cancelled; 0: one step after joining
    max_tokens: int = 6
    wants_logprobs: bool = False
    wants_states: bool = False
    adapter: str | None = None

    def request(self) -> Request:
        """Write the request."""
        return Request(
            self.prompt,
            SamplingParams(logprobs=VOCAB),
            self.max_tokens,
            prompt_logprobs=VOCAB if self.wants_logprobs else None,
            hidden_states=self.wants_states,
            top_logits=VOCAB,
            adapter=self.adapter,
        )


@dataclass(slots=True)
class Answer:
    """Everything that came back for a job."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    report: PromptReport | None = None
    finish: FinishReason | None = None


def drive(engine: Engine, jobs: Sequence[Job]) -> list[Answer]:
    """Submit each job when it is due, step until all is done, and give the answers in the jobs' order."""
    answers, numbers = [Answer() for _ in jobs], dict[int, int]()
    steps = 0
    while engine.has_work or len(numbers) < len(jobs):
        for index, job in enumerate(jobs):
            if job.joins == steps:
                numbers[engine.submit(job.request())] = index
        for event in engine.step():
            _note(answers[numbers[event.request]], event)
        for number, index in numbers.items():
            answer, cancel_at = answers[index], jobs[index].cancel_at
            if cancel_at is not None and len(answer.tokens) >= cancel_at and answer.finish is None:
                event = engine.cancel(number)
                assert event is not None
                _note(answer, event)
        steps += 1
    return answers


def _note(answer: Answer, event: RequestEvent) -> None:
    assert answer.finish is None, "an event after the end"
    answer.finish = event.finish
    if event.token is not None:
        answer.tokens.append(event.token)
    if event.logprobs is not None:
        answer.logprobs.append(event.logprobs)
    if event.prompt is not None:
        assert answer.report is None, "two reports of one prompt"
        answer.report = event.prompt


def dense(pairs: Sequence[tuple[int, float]]) -> Tensor:
    """Spread (id, value) pairs over the vocabulary, [V]."""
    assert len(pairs) == VOCAB
    out = torch.full((VOCAB,), torch.nan)
    out[[token for token, _ in pairs]] = torch.tensor([value for _, value in pairs])
    return out


def errors(model: PreTrainedModel, job: Job, answer: Answer) -> dict[str, float]:
    """Return the relative error of every number in an answer, against the oracle's run over prompt and reply alone.

    Tokens must be the oracle's own greedy choices.
    """
    last = len(job.prompt) - 1
    trace = oracle(model, job.prompt + tuple(answer.tokens))
    logprobs = trace.logits.log_softmax(-1)
    assert answer.tokens == trace.logits[last:-1].argmax(-1).tolist()
    found = {}
    if answer.report is not None:
        found["top_logits"] = relative_error(dense(answer.report.top_logits), trace.logits[last])
        found |= _report_errors(job, answer.report, logprobs[:last], trace.states[: last + 1])
    if answer.logprobs:
        rows = torch.stack([dense(entry.top) for entry in answer.logprobs])
        found["logprobs"] = relative_error(rows, logprobs[last : last + len(rows)])
    return found


def _report_errors(job: Job, report: PromptReport, logprobs_NV: Tensor, states_ND: Tensor) -> dict[str, float]:
    found = {}
    if job.wants_logprobs and len(job.prompt) > 1:
        assert [entry.token for entry in report.logprobs] == list(job.prompt[1:])
        rows = torch.stack([dense(entry.top) for entry in report.logprobs])
        assert [entry.logprob for entry in report.logprobs] == rows[range(len(rows)), list(job.prompt[1:])].tolist()
        found["prompt_logprobs"] = relative_error(rows, logprobs_NV)
    if job.wants_states:
        found["hidden_states"] = relative_error(torch.cat(report.hidden_states), states_ND)
    return found
