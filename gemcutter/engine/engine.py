"""The engine: requests in, `step()` after `step()`, events out.

Owns one decoder, one pool and the scheduler; batch generation, chat and a server differ only in how many requests they submit.
Ids and arrays only: no strings, no JSON, no files. One thread at a time: `loop.py` gives an engine a thread of its own. Read
`scheduler.py` for what runs, `runner.py` for what a step does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from traceback import clear_frames
from typing import Any

import torch

from gemcutter.cache.kv_cache import scale_bytes
from gemcutter.cache.prefix_cache import PrefixCache
from gemcutter.engine.cuda_graphs import CapturedSteps
from gemcutter.engine.media import problems_of
from gemcutter.engine.memory import compact_weights, make_pool, page_counts, prefix_pages
from gemcutter.engine.request import FinishReason, Request, RequestEvent, SequenceState
from gemcutter.engine.runner import ChunkResult, ModelRunner, PendingStep
from gemcutter.engine.sampler import SampledToken
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.scheduler import ScheduledChunk, Scheduler
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.speculate.tally import NO_DRAFTS
from gemcutter.engine.stats import EngineStats
from gemcutter.engine.step_sizer import StepSizer
from gemcutter.engine.watchdog import TokenClasses
from gemcutter.errors import RequestError, spell_value
from gemcutter.model.text import AdaptedBody, Decoder
from gemcutter.ops.turns import Turns


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    """A step under way: when choosing its rows began, and when they were known; None where it was launched ahead of its turn."""

    pending: PendingStep
    started_s: float = 0.0
    launched_s: float | None = None


class Engine:
    """Runs requests over a decoder.

    `context` is the longest sequence in tokens, `max_batched_tokens` the rows of one step (the chunk of a long prompt),
    `max_num_seqs` how many sequences run at once, `prefix_cache_bytes` the memory for what stays in the cache for reuse (None:
    what serves so many sequences, see `prefix_pages`). `graphs` says whether decode steps run over static memory, as captured
    graphs on a GPU; by default wherever that is possible. `kv_dtype` is that of the cache, by default the decoder's. `speculator`
    drafts tokens to be verified several a step.
    `max_stall_ms` bounds how long a step may last, by giving it fewer prompt rows, as far as measured steps can tell; without it
    only their number is bounded. What is computed does not depend on it. `largest_block` is how many rows an image may have whose
    rows see each other: a step is as large if need be.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        max_batched_tokens: int = 512,
        max_num_seqs: int = 1,
        prefix_cache_bytes: int | None = 0,
        graphs: bool | None = None,
        kv_dtype: torch.dtype | None = None,
        speculator: Speculator | None = None,
        max_stall_ms: float | None = None,
        largest_block: int = 0,
        turns: Turns | None = None,
    ) -> None:
        self.decoder, self.turns = decoder, turns or Turns()  # on the cores: whoever calls `step` takes one
        self.context = min(context, decoder.plan.context)
        dtype, compact = kv_dtype or decoder.dtype, compact_weights(decoder)
        self._most_rows = max(max_batched_tokens, largest_block)
        prefixes = prefix_pages(
            decoder.plan,
            self.context,
            max_num_seqs,
            prefix_cache_bytes,
            dtype.itemsize,
            compact,
            scale_bytes=scale_bytes(dtype),
        )
        counts = page_counts(decoder.plan, self.context, self._most_rows, max_num_seqs, prefixes)
        self.pool = make_pool(decoder, counts, dtype)
        self.prefix = PrefixCache(self.pool, prefixes)
        sizer = None if max_stall_ms is None else StepSizer(max_stall_ms / 1000)
        limits = (self.context, max_batched_tokens, max_num_seqs)
        self.scheduler = Scheduler(self.pool, *limits, self.prefix, speculator, sizer, decoder.most_begun)
        is_static = decoder.capture_refusal() is None if graphs is None else graphs
        keeps_states = speculator is not None and speculator.keeps_states
        captured = CapturedSteps(decoder, self.pool, self.context, keeps_states=keeps_states) if is_static else None
        self.runner = ModelRunner(decoder, self.pool, captured, keeps_states=keeps_states)
        self.speculator = speculator
        self._launched = deque[_LaunchedStep]()  # the oldest first; before their results are asked for
        self._sequences: dict[int, SequenceState] = {}
        self._timed: dict[int, SequenceState] = {}  # those that have a deadline
        self._numbers = count()
        self.clock = time.perf_counter
        self._stats = EngineStats()

    def new_number(self) -> int:
        """Return a number for a request that is still to be submitted; any thread may ask."""
        return next(self._numbers)

    def submit(self, request: Request, number: int | None = None) -> int:
        """Queue a request and return its number. Raises RequestError if it can never run."""
        self.check(request)
        return self.enqueue(request, self.new_number() if number is None else number)

    def enqueue(self, request: Request, number: int) -> int:
        """Queue a request that `check` accepts, and return its number.

        Raises RequestError if its adapter has been unloaded since it was checked.
        """
        if problems := list(self._adapter_problems(request)):
            raise RequestError("the request can't be served", problems)
        sequence = SequenceState(number, request, self.decoder.plan.bidirectional)
        if request.deadline_s is not None:
            sequence.expires_s = self.clock() + request.deadline_s
            self._timed[number] = sequence
        self._sequences[number] = sequence
        self.scheduler.enqueue(sequence)
        self._count()
        return number

    def stats(self) -> EngineStats:
        """Return what the engine held and did as of the last step, submission or cancellation; any thread may ask."""
        return self._stats

    def _count(self, step: Sequence[ScheduledChunk] | None = None) -> None:
        """Take stock; `step` is one that was computed just now."""
        before, scheduler = self._stats, self.scheduler
        prompts = [sequence for sequence in scheduler.running if not sequence.decodes]
        books = self.pool.allocators.values()
        self._stats = EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=max(1 - book.free / len(book.ref_counts) for book in books),
            queued_prompt_tokens=scheduler.waiting_tokens + sum(sequence.pending for sequence in prompts),
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            tally=NO_DRAFTS if self.speculator is None else self.speculator.tally,
            steps=before.steps + bool(step),
            step_tokens=before.step_tokens if step is None else sum(chunk.rows for chunk in step),
        )

    def check(self, request: Request) -> None:
        """Raise RequestError, with every problem, if a request can never run; any thread may ask."""
        problems = [*self._prompt_problems(request), *self._problems(request)]
        if problems:
            raise RequestError("the request can't be served", problems)

    def _prompt_problems(self, request: Request) -> Iterator[str]:
        prompt: Any = request.prompt  # callers are checked, not trusted
        vocab = self.decoder.plan.vocab
        if not isinstance(prompt, tuple) or set(map(type, prompt)) - {int}:
            yield "request.prompt: expected a tuple of token ids"
            return
        if not prompt:
            yield "request.prompt: empty; a prompt needs at least one token (raw text gets <bos>)"
        elif min(prompt) < 0 or max(prompt) >= vocab:
            outside = sorted({token for token in prompt if not 0 <= token < vocab})
            yield f"request.prompt: ids {outside[:5]} are outside the vocabulary of {vocab}"
        room = self.context - (1 if request.max_tokens else 0)
        if len(prompt) > room:
            much = f"{len(prompt)} tokens, the context holds {self.context}"
            yield f"request.prompt: {much}; raise the context or shorten the prompt"

    def _problems(self, request: Request) -> Iterator[str]:
        sampling: Any = request.sampling
        vocab = self.decoder.plan.vocab
        wanted = {"max_tokens": request.max_tokens, "top_logits": request.top_logits, "prompt_logprobs": request.prompt_logprobs}
        for name, number in wanted.items():
            if not (_is_count(number) or (number is None and name == "prompt_logprobs")):
                yield f"request.{name}: expected 0 or more, found {spell_value(number)}"
        yield from self._report_problems(request)
        yield from self._limit_problems(request)
        plan = self.decoder.plan
        yield from problems_of(request.media, len(request.prompt), plan.hidden, self._most_rows if plan.bidirectional else None)
        flag: Any = request.hidden_states
        if not isinstance(flag, bool):
            yield f"request.hidden_states: expected True or False, found {spell_value(flag)}; it gives the last layer's, normed"
        stop_ids: Any = request.stop_ids
        if not isinstance(stop_ids, set | frozenset) or not all(map(_is_count, stop_ids)):
            yield f"request.stop_ids: expected a set of token ids, found {spell_value(stop_ids)}"
        processors: Any = request.logits_processors
        if not isinstance(processors, tuple) or not all(map(callable, processors)):
            yield f"request.logits_processors: expected a tuple of callables, found {spell_value(processors)}"
        salt: Any = request.cache_salt
        if not (salt is None or (isinstance(salt, str) and salt)):
            yield f"request.cache_salt: expected a text or None, found {spell_value(salt)}"
        yield from self._adapter_problems(request)
        if not isinstance(sampling, SamplingParams):
            yield f"request.sampling: expected SamplingParams, found {spell_value(sampling)}"
            return
        named = {"logit_bias": sampling.logit_bias, "suppress": sampling.suppress}
        for name, ids in named.items():
            if bad := [token for token in ids if not 0 <= token < vocab]:
                yield f"sampling.{name}: ids {bad[:5]} are outside the vocabulary of {vocab}"

    def _report_problems(self, request: Request) -> Iterator[str]:
        """Yield what is wrong with the positions and tokens whose log-probabilities are asked for."""
        first: Any = request.prompt_logprobs_from
        if not _is_count(first) or not 1 <= first <= max(len(request.prompt), 1):
            least = "expected the position of a prompt token after the first, or the prompt's length"
            yield f"request.prompt_logprobs_from: {least}, found {spell_value(first)}"
        asked: Any = request.next_logprobs
        if not isinstance(asked, tuple) or not all(map(_is_count, asked)):
            yield f"request.next_logprobs: expected a tuple of token ids, found {spell_value(asked)}"
        elif outside := [token for token in asked if token >= self.decoder.plan.vocab]:
            yield f"request.next_logprobs: ids {outside[:5]} are outside the vocabulary of {self.decoder.plan.vocab}"

    def _limit_problems(self, request: Request) -> Iterator[str]:
        least: Any = request.min_tokens
        priority: Any = request.priority
        deadline_s: Any = request.deadline_s
        watchdog: Any = request.watchdog
        if not _is_count(least):
            yield f"request.min_tokens: expected 0 or more, found {spell_value(least)}"
        elif _is_count(request.max_tokens) and least > request.max_tokens:
            yield f"request.min_tokens: {least} is more than max_tokens, {request.max_tokens}; lower it, or raise max_tokens"
        if not isinstance(priority, int) or isinstance(priority, bool):
            yield f"request.priority: expected a whole number, of which lower ones come first, found {spell_value(priority)}"
        if deadline_s is not None and not _is_duration(deadline_s):
            yield f"request.deadline_s: expected None or seconds above 0, found {spell_value(deadline_s)}"
        if watchdog is not None and not isinstance(watchdog, TokenClasses):
            yield f"request.watchdog: expected None or TokenClasses, found {spell_value(watchdog)}"

    def _adapter_problems(self, request: Request) -> Iterator[str]:
        loaded, name = self.decoder.adapters, request.adapter
        asked: object = name
        if name is not None and not isinstance(asked, str):
            yield f"request.adapter: expected the name of one adapter for the whole request, found {spell_value(asked)}"
        elif name is not None and name not in loaded:
            yield f"request.adapter: {name!r} is not loaded; loaded are: {', '.join(loaded) or 'none'}"

    def exchange_adapters(self, body: AdaptedBody) -> bool:
        """Let steps run with another set of adapters from now on, and forget the prefixes of those that leave.

        Returns False, and does nothing, where the set was exchanged since `body` was bound: bind it anew. Raises RequestError
        while a request uses one that would leave.
        """
        before = self.decoder.adapted
        if body.version != before.version + 1:
            return False
        leaving = [name for name in before.adapters if name not in body.adapters]
        for name in leaving:
            users = sum(sequence.request.adapter == name for sequence in self._sequences.values())
            if users:
                users_are = "1 request that runs or waits" if users == 1 else f"{users} requests that run or wait"
                raise RequestError(f"adapter {name!r} is used by {users_are}; await or cancel them, then unload it")
        self.decoder.adapted = body
        for name in leaving:
            self.prefix.drop(name)
        return True

    @property
    def has_work(self) -> bool:
        """Return whether any request is unfinished."""
        return bool(self._sequences)

    def step(self) -> list[RequestEvent]:
        """Run one step; return the tokens and ends that it brought.

        Rows count as computed once their results are here, and not before: whatever is raised until then takes their
        reservations back, and the rows run again in a later step. If the pass through the model raises an Exception, the requests
        in that step end with it; a request whose own sampling or report fails ends alone.
        """
        expired = self._expire()
        chunks: Sequence[ScheduledChunk] = ()
        try:
            while len(self._launched) < self.decoder.most_begun:
                chunks, started_s = (), self.clock()  # nobody is to blame if choosing fails
                chunks = self.scheduler.schedule()
                if not chunks and self._launched:
                    break
                launched_s = self.clock()
                _note_start(chunks, launched_s)
                self._launched.append(_LaunchedStep(self.runner.launch(chunks), started_s, launched_s))
            launched = self._launched[0]
            pending, chunks = launched.pending, launched.pending.chunks
            if self.runner.can_run_ahead(pending) and (after := self.scheduler.schedule_after(chunks)):
                self._launched.append(_LaunchedStep(self.runner.launch_after(pending, after)))
            results, now = pending.result().chunks, self.clock()
            self.decoder.check_ranks()
        except Exception as error:
            self._withdraw()
            return [*expired, *self._fail([chunk.sequence for chunk in chunks] or self._next_up(), error)]
        except BaseException:
            self._withdraw()
            raise
        self._launched.popleft()
        if launched.launched_s is not None:
            self._measured(chunks, now - launched.started_s, now - launched.launched_s)
        events = expired
        for chunk, result in zip(chunks, results, strict=True):
            if chunk.sequence.table is chunk.table:  # else it ended while this row was computed
                events += self._advance(chunk, result, now)
        self._count(chunks)
        return events

    def _measured(self, chunks: Sequence[ScheduledChunk], seconds: float, model_s: float) -> None:
        """Take note of what a step took, and of the part that came after its rows were known."""
        rows = sum(chunk.rows for chunk in chunks)
        decode_rows = sum(chunk.rows for chunk in chunks if chunk.decodes)
        if self.scheduler.sizer is not None:
            self.scheduler.sizer.observe(decode_rows, rows - decode_rows, seconds)
        if self.speculator is not None and rows == decode_rows > 0:
            self.speculator.timed(rows, sum(chunk.sequence.num_tokens for chunk in chunks), model_s)

    def _expire(self) -> list[RequestEvent]:
        """End the requests whose deadline has passed, those that still wait too."""
        now = self.clock()
        late = [one for one in self._timed.values() if one.expires_s is not None and one.expires_s <= now]
        return [self._end(sequence, FinishReason.TIMEOUT, now) for sequence in late]

    def _withdraw(self) -> None:
        """Take back all rows whose results are not here."""
        self._launched.clear()
        self.runner.withdraw()
        self.scheduler.forget_rows()

    def _next_up(self) -> list[SequenceState]:
        """Return the sequences that a step would have run, where choosing them failed."""
        return [*self.scheduler.running] or [*self.scheduler.waiting][:1]

    def _fail(self, sequences: Sequence[SequenceState], error: Exception) -> list[RequestEvent]:
        now = self.clock()
        return [
            self._end(sequence, FinishReason.ERROR, now, error) for sequence in sequences if sequence.number in self._sequences
        ]

    def fail_all(self, error: Exception) -> list[RequestEvent]:
        """End every request with an error."""
        self._withdraw()
        return self._fail(list(self._sequences.values()), error)

    def _advance(self, chunk: ScheduledChunk, result: ChunkResult, now: float) -> list[RequestEvent]:
        """Commit a chunk's rows and append the tokens that it brought: one, or more where drafts were right."""
        sequence, table = chunk.sequence, chunk.table
        request, report = sequence.request, sequence.report
        if result.error is not None:
            return [self._end(sequence, FinishReason.ERROR, now, result.error)]
        taken, finish = self._accepted(chunk, result.tokens)
        if chunk.drafts and self.speculator is not None:
            pairs = zip(taken, chunk.drafts, strict=False)
            right = sum(1 for _ in takewhile(lambda pair: pair[0].token == pair[1], pairs))
            self.speculator.verified(sequence, len(chunk.drafts), min(len(chunk.drafts), len(taken)), right)
        if taken and result.sampled_RD is not None:
            sequence.state_D = result.sampled_RD[len(taken) - 1]
        if chunk.in_prompt:  # before windows that later rows don't see are let go
            self.prefix.keep(
                sequence.prompt_key,
                table,
                request.adapter,
                request.cache_salt,
                since=chunk.start,
                computed=chunk.start + chunk.rows,
                is_end=chunk.is_last,
            )
        # The row after which a token that is taken was sampled holds: its own id was taken before it, or is no draft.
        ahead = table.reserved - chunk.rows  # of steps that are launched already
        table.commit(chunk.rows - max(chunk.num_sampled - max(len(taken), 1), 0), ahead)
        if chunk.reports:
            report.rewind(max(chunk.start - (request.reports_from or 0), 0))
            report.logprobs += result.logprobs
            report.hidden_states += [] if result.states_MD is None else [result.states_MD]
        if not chunk.is_last:
            return []
        if chunk.in_prompt:
            report.top_logits, report.next_logprobs = result.top_logits, result.next_logprobs
        events = list[RequestEvent]()
        given = report if chunk.in_prompt else None
        for index, sampled in enumerate(taken):
            is_end = finish is not None and index == len(taken) - 1
            token = None if is_end and finish is FinishReason.STOP else sampled.token
            if token is not None:
                sequence.append(token)
            ended, tally = finish if is_end else None, sequence.tally
            events.append(RequestEvent(sequence.number, token, sampled.logprobs, ended, given, tally=tally, time_s=now))
            given = None
        if not request.max_tokens:
            finish = FinishReason.LENGTH
            events.append(RequestEvent(sequence.number, finish=finish, prompt=given, time_s=now))
        if finish is not None:
            self._forget(sequence)
        elif taken:
            events += self._observe(sequence, now)
        return events

    def _observe(self, sequence: SequenceState, now: float) -> list[RequestEvent]:
        """Let processors begin to work on the next token while the model computes; what one raises ends its own request."""
        try:
            sequence.observe()
        except Exception as error:
            return [self._end(sequence, FinishReason.ERROR, now, error)]
        return []

    def _accepted(
        self, chunk: ScheduledChunk, sampled: Sequence[SampledToken]
    ) -> tuple[Sequence[SampledToken], FinishReason | None]:
        """Return the tokens to take, all whose drafts before them were right, and why the last of them ends the request."""
        sequence, request = chunk.sequence, chunk.sequence.request
        room = min(request.max_tokens, self.context - len(request.prompt)) - len(sequence.reply)
        for index, found in enumerate(sampled):
            if found.token in request.stop_ids:
                return sampled[: index + 1], FinishReason.STOP
            if sequence.watchdog is not None and sequence.watchdog.is_lost(found.token):
                return sampled[: index + 1], FinishReason.REPETITION
            if index + 1 >= room:
                return sampled[: index + 1], FinishReason.LENGTH
            if index >= len(chunk.drafts) or found.token != chunk.drafts[index]:
                return sampled[: index + 1], None
        return sampled, None

    def _end(self, sequence: SequenceState, finish: FinishReason, now: float, error: Exception | None = None) -> RequestEvent:
        """End a request between its tokens."""
        if error is not None:
            clear_frames(error.__traceback__)  # which hold the step's tensors as long as somebody holds the error
        self._forget(sequence)
        self._count()
        return RequestEvent(sequence.number, finish=finish, error=error, tally=sequence.tally, time_s=now)

    def _forget(self, sequence: SequenceState) -> None:
        """Take a sequence out; what it computed stays in the prefix cache."""
        if sequence.table is not None:
            sequence.table.commit(0)  # a row may be launched already
            ids = sequence.key_ids(0, min(sequence.table.length, sequence.num_tokens))
            self.prefix.keep(ids, sequence.table, sequence.request.adapter, sequence.request.cache_salt)
        self.scheduler.leave(sequence)
        if self.speculator is not None:
            self.speculator.forget(sequence)
        del self._sequences[sequence.number]
        self._timed.pop(sequence.number, None)

    def cancel(self, number: int) -> RequestEvent | None:
        """End a request between two steps; what it computed stays for reuse. Returns its last event, None if it has ended."""
        sequence = self._sequences.get(number)
        if sequence is None:
            return None
        return self._end(sequence, FinishReason.CANCELLED, self.clock())


def _note_start(chunks: Sequence[ScheduledChunk], now: float) -> None:
    """Note of prompts that begin when they did."""
    for chunk in chunks:
        if chunk.in_prompt and not chunk.sequence.report.started_s:
            chunk.sequence.report.started_s = now


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
