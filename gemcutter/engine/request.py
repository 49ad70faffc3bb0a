"""What callers ask of the engine and what they get: token ids in, events out.

Owns `Request`, `RequestEvent` and the running state of one sequence; refuses to know text, templates and files. Read `engine.py`
next.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.engine.media import MediaSpan, key_ids
from gemcutter.engine.sampler import LogitsProcessor, Observer
from gemcutter.engine.sampling import TokenLogprobs
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.engine.speculate.tally import NO_DRAFTS, Tally
from gemcutter.engine.watchdog import TokenClasses, Watchdog


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # a stop id was sampled
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"  # its deadline passed; what it computed stays for reuse
    REPETITION = "repetition"  # its watchdog saw the reply go round in circles
    ERROR = "error"  # its own processing failed, or the step that it was in; the event carries the error


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what is wanted of it.

    `prompt_logprobs` asks for the log-probability of every prompt token but the first, with that many alternatives, or of those
    from position `prompt_logprobs_from` on; `hidden_states` for the final-normed state of every prompt row; `top_logits` for the
    best logits at the last prompt position, `next_logprobs` for the log-probabilities of these tokens there. Rows that the first
    two report on pass all layers; those before them may come from the prefix cache. `adapter` names one that was loaded beside
    the model.
    `logits_processors` edit the logits of every sampled token, in this order, before bias and penalties. No stop id is sampled
    before the reply has `min_tokens`. Of requests that wait, and that compete for pages, the one with the lower `priority` comes
    first. `deadline_s` seconds after it was queued a request ends, however far it is. `watchdog` says how a reply that repeats
    itself is recognised; it ends then. Prefixes are shared among requests of one `cache_salt` only. `media` are the rows of the
    prompt that are no tokens, in order.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 128
    stop_ids: frozenset[int] = frozenset()
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    hidden_states: bool = False
    top_logits: int = 0
    next_logprobs: tuple[int, ...] = ()
    adapter: str | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    min_tokens: int = 0
    priority: int = 0
    deadline_s: float | None = None
    watchdog: TokenClasses | None = None
    cache_salt: str | None = None
    media: tuple[MediaSpan, ...] = ()

    @property
    def reports_from(self) -> int | None:
        """Return the first of the prompt rows that must all reach the head or the caller; None where only the last must."""
        if self.hidden_states:
            return 0
        return None if self.prompt_logprobs is None else self.prompt_logprobs_from - 1


@dataclass(slots=True)
class PromptReport:
    """What was asked about the prompt itself."""

    cached_tokens: int = 0
    started_s: float = 0.0  # when its first row was computed, on the engine's clock
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    top_logits: tuple[tuple[int, float], ...] = ()
    next_logprobs: tuple[float, ...] = ()
    hidden_states: list[Tensor] = field(default_factory=list)  # chunks [rows, D], in order

    def rewind(self, rows: int) -> None:
        """Keep what was reported of the first `rows` rows that are reported on; the others are computed anew."""
        del self.logprobs[rows:]
        while sum(len(chunk) for chunk in self.hidden_states) > rows:
            self.hidden_states.pop()


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """One token of one request, or its end; the first event of a request carries the prompt's report.

    `finish` is None while the request goes on; `tally` counts the request's drafts so far. `error` says why a request ended with
    FinishReason.ERROR. `time_s` is when the event came, on the clock of `time.perf_counter`.
    """

    request: int
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None
    prompt: PromptReport | None = None
    error: Exception | None = field(default=None, compare=False)
    tally: Tally | None = field(default=None, compare=False)
    time_s: float = field(default=0.0, compare=False)


class SequenceState:
    """A running or waiting request: its reply so far, its block tables and its seed. Only the engine changes it."""

    def __init__(self, number: int, request: Request, has_blocks: bool = False) -> None:
        """Begin with nothing computed; `has_blocks` says that the rows of an image see each other."""
        self.number, self.request = number, request
        self.prompt_key = key_ids(request.prompt, request.media)  # by which prefixes are told apart
        self.blocks = tuple((span.start, span.stop) for span in request.media if span.is_block) if has_blocks else ()
        self.reply: list[int] = []  # a preempted sequence computes prompt and reply anew
        self.table: BlockTable | None = None
        self.report = PromptReport()
        self.seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        self.watchdog = None if request.watchdog is None else Watchdog(request.watchdog)
        self.tally = NO_DRAFTS
        self.state_D: Tensor | None = None  # the target's, of the row that gave the last token; where somebody drafts from it
        self.expires_s: float | None = None  # on the engine's clock
        self.processors = tuple(each.for_sequence() if isinstance(each, Observer) else each for each in request.logits_processors)
        self.was_admitted = False  # its prompt was looked up in the prefix cache
        self._counts: dict[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of prompt and reply."""
        return len(self.request.prompt) + len(self.reply)

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the tokens at positions `start` to `stop` - 1, at the cost of that many."""
        prompt = len(self.request.prompt)
        if start >= prompt:
            return tuple(self.reply[start - prompt : stop - prompt])
        return (*self.request.prompt[start:stop], *self.reply[: max(stop - prompt, 0)])

    def key_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Return what `ids` does, with media told apart by their contents."""
        prompt = len(self.prompt_key)
        if start >= prompt:
            return self.ids(start, stop)
        return (*self.prompt_key[start:stop], *self.reply[: max(stop - prompt, 0)])

    def append(self, token: int) -> None:
        """Add a sampled token to the reply."""
        self.reply.append(token)
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1

    def observe(self) -> None:
        """Let the processors that have a state take note of what the reply has become."""
        for processor in self.processors:
            if isinstance(processor, Observer):
                processor.observe(self.reply)

    @property
    def counts(self) -> dict[int, int]:
        """Return how often each token of prompt and reply stands in the reply; kept up to date once it was asked for."""
        if self._counts is None:
            self._counts = dict.fromkeys(self.request.prompt, 0)
            for token in self.reply:
                self._counts[token] = self._counts.get(token, 0) + 1
        return self._counts

    @property
    def computed(self) -> int:
        """Return the number of tokens whose keys and values are in the cache."""
        return self.table.length if self.table is not None else 0

    @property
    def scheduled(self) -> int:
        """Return the number of tokens whose keys and values are in the cache, or about to be: their rows are in some step."""
        return self.table.length + self.table.reserved if self.table is not None else 0

    @property
    def pending(self) -> int:
        """Return the number of rows still to schedule before the next token can be sampled; 0 while it is on its way."""
        return max(self.num_tokens - self.scheduled, 0)

    @property
    def in_prompt(self) -> bool:
        """Return whether no token has been sampled yet."""
        return not self.reply

    @property
    def decodes(self) -> bool:
        """Return whether the next row is that of the token sampled last; else prompt rows, or those of a preemption, are due."""
        return not self.in_prompt and self.pending == 1
