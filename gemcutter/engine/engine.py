"""The engine: requests in, `step()` after `step()`, events out.

Owns one decoder, one pool and the scheduler; batch generation, chat and a server differ only in how many requests they submit.
Ids and arrays only: no strings, no JSON, no files. Read `scheduler.py` for what runs, `runner.py` for what a step does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch

from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.cache.prefix_cache import PrefixCache
from gemcutter.engine.graphs import Choice, Flight, Graphs
from gemcutter.engine.memory import compact_weights, page_counts
from gemcutter.engine.request import Event, Finish, Request, Sequence
from gemcutter.engine.runner import Walk
from gemcutter.engine.scheduler import Scheduler, Work
from gemcutter.errors import CapacityError, RequestError
from gemcutter.model.text import Decoder


class Engine:
    """Runs requests over a decoder.

    `context` is the longest sequence in tokens, `max_rows` the rows of one step (the chunk of a long prompt), `max_sequences`
    how many run at once, `checkpoints` how many finished prompts and replies stay in the cache for reuse. `graphs` says whether
    decode steps run over static memory, as captured graphs on a GPU; by default wherever that is possible. `kv_dtype` is that of
    the cache, by default the decoder's.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        max_rows: int = 512,
        max_sequences: int = 1,
        checkpoints: int = 0,
        graphs: bool | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder = decoder
        self.context = min(context, decoder.plan.context)
        counts = page_counts(decoder.plan, self.context, max_rows, max_sequences, checkpoints)
        self.pool = PagedKVCache(decoder.plan, counts, kv_dtype or decoder.dtype, decoder.device, compact_weights(decoder))
        self.prefix = PrefixCache(checkpoints)
        self.scheduler = Scheduler(self.pool, max_rows, max_sequences, self.prefix)
        is_static = decoder.capture_refusal() is None if graphs is None else graphs
        self._graphs = Graphs(decoder, self.pool, self.context) if is_static else None
        self._ahead: Flight | None = None  # launched before the tokens of the step before it had landed
        self._sequences: dict[int, Sequence] = {}
        self._numbers = count()

    def submit(self, request: Request) -> int:
        """Queue a request and give its number. Raises RequestError if it can never run."""
        self.check(request)
        sequence = Sequence(next(self._numbers), request)
        self._sequences[sequence.number] = sequence
        self.scheduler.waiting.append(sequence)
        return sequence.number

    def check(self, request: Request) -> None:
        """Raise RequestError, with every problem, if a request can never run."""
        problems = list(self._problems(request))
        if problems:
            raise RequestError("the request can't be served", problems)

    def _problems(self, request: Request) -> Iterator[str]:
        vocab = self.decoder.plan.vocab
        if not request.prompt:
            yield "request.prompt: empty; a prompt needs at least one token (raw text gets <bos>)"
        outside = sorted({token for token in request.prompt if not 0 <= token < vocab})
        if outside:
            yield f"request.prompt: ids {outside[:5]} are outside the vocabulary of {vocab}"
        room = self.context - (1 if request.max_tokens else 0)
        if len(request.prompt) > room:
            yield f"request.prompt: {len(request.prompt)} tokens, the context holds {self.context}; raise --context or shorten it"
        wanted = {"max_tokens": request.max_tokens, "top_logits": request.top_logits, "prompt_logprobs": request.prompt_logprobs}
        for name, number in wanted.items():
            if number is not None and (not isinstance(number, int) or number < 0):
                yield f"request.{name}: expected 0 or more, found {number!r}"
        if request.adapter is not None and request.adapter not in self.decoder.adapters:
            loaded = ", ".join(self.decoder.adapters) or "none"
            yield f"request.adapter: {request.adapter!r} is not loaded; loaded are: {loaded}"
        sampling = request.sampling
        named = {"logit_bias": sampling.logit_bias, "suppress": sampling.suppress}
        for name, ids in named.items():
            if bad := [token for token in ids if not 0 <= token < vocab]:
                yield f"sampling.{name}: ids {bad[:5]} are outside the vocabulary of {vocab}"

    @property
    def has_work(self) -> bool:
        """Tell whether any request is unfinished."""
        return bool(self._sequences)

    def step(self) -> list[Event]:
        """Run one step; give the tokens and ends that it brought."""
        flight: Flight | Walk | None = self._ahead
        self._ahead = None
        try:
            flight = flight or self._launch(self.scheduler.schedule())
            if isinstance(flight, Flight) and not flight.is_committed:  # else an interrupt came before its tokens could land
                self._ahead = self._launch_after(flight)
            choices = flight.land()
        except BaseException:  # an interrupt leaves the tables as they were, or the tokens of committed rows for the next step
            self.scheduler.forget_rows()
            self._ahead = flight if isinstance(flight, Flight) and flight.is_committed else None
            raise
        events = []
        for work, choice in zip(flight.works, choices, strict=True):
            if work.sequence.table is not work.table:
                continue  # it ended while this row was on its way
            if not flight.is_committed:
                work.table.commit(work.rows)
            if choice is not None:
                events.append(self._advance(work.sequence, choice))
        return events

    def _launch(self, works: list[Work]) -> Flight | Walk:
        if self._graphs is not None and self._graphs.accepts(works):
            return self._graphs.launch(works)
        return Walk(self.decoder, self.pool, works)

    def _launch_after(self, flight: Flight) -> Flight | None:
        """Launch the next step before this one's tokens are known, if it will surely have the same rows unless one of them stops.

        The row of a sequence that stops was computed in vain; nobody reads what it wrote.
        """
        has_room = self.scheduler.waiting and len(self.scheduler.running) < self.scheduler.max_sequences
        if self._graphs is None or has_room or flight.choice is Choice.ON_HOST or flight.slate.each > 1:
            return None
        if any(work.sequence.table is not work.table or self._may_be_last(work.sequence) for work in flight.works):
            return None
        for work in flight.works:
            work.table.commit(1)
        flight.is_committed = True
        try:
            for work in flight.works:
                work.table.reserve(1)
        except CapacityError:  # the scheduler will find pages
            for work in flight.works:
                work.table.commit(0)
            return None
        return self._graphs.launch_after(flight, flight.works)

    def _may_be_last(self, sequence: Sequence) -> bool:
        """Tell whether the token that is on its way ends the prompt, whose pages are kept then, or the reply, whatever it is."""
        ends_reply = len(sequence.reply) + 1 >= sequence.request.max_tokens or len(sequence.tokens) + 1 >= self.context
        return sequence.in_prompt or ends_reply

    def _advance(self, sequence: Sequence, choice: Event) -> Event:
        """Append a chosen token, or end the sequence; keep checkpoints at the ends of prompt and reply."""
        request = sequence.request
        if sequence.in_prompt and sequence.table is not None:
            self.prefix.keep(request.prompt, sequence.table, request.adapter)
        finish = None
        if choice.token is None or len(sequence.reply) >= request.max_tokens:
            finish = Finish.LENGTH
        elif choice.token in request.stop_ids:
            finish = Finish.STOP
        else:
            sequence.tokens.append(choice.token)
            if len(sequence.reply) >= request.max_tokens or len(sequence.tokens) >= self.context:
                finish = Finish.LENGTH
        token = None if finish is Finish.STOP else choice.token
        if finish is not None:
            self._end(sequence)
        return Event(choice.request, token, choice.logprobs, finish, choice.prompt)

    def _end(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            sequence.table.commit(0)  # a row may be on its way
            self.prefix.keep(tuple(sequence.tokens[: sequence.table.length]), sequence.table, sequence.request.adapter)
        self.scheduler.leave(sequence)
        del self._sequences[sequence.number]

    def cancel(self, number: int) -> Event | None:
        """End a request now; what it computed stays as a checkpoint. Gives its last event, or None if it has ended already."""
        sequence = self._sequences.get(number)
        if sequence is None:
            return None
        self._end(sequence)
        return Event(number, finish=Finish.CANCELLED)
