"""What callers ask of the engine and what they get: ids in, events out.

Owns `Request`, `Event` and the running state of one sequence; refuses to know text, templates and files. Read `engine.py` next.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from gemcutter.cache.block_table import BlockTable
from gemcutter.engine.sampling import Sampling, TokenLogprobs


class Finish(Enum):
    """Why a request ended."""

    STOP = "stop"  # a stop id was chosen
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what is wanted of it.

    `prompt_logprobs` asks for the log-probability of every prompt token but the first, with that many alternatives;
    `hidden_states` for the final-normed state of every prompt row; `top_logits` for the best logits at the last prompt
    position. The first two make all prompt rows pass all layers. `adapter` names one that was loaded beside the model.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 128
    stop_ids: frozenset[int] = frozenset()
    prompt_logprobs: int | None = None
    hidden_states: bool = False
    top_logits: int = 0
    adapter: str | None = None

    @property
    def wants_all_rows(self) -> bool:
        """Tell whether every prompt row must reach the head or the caller."""
        return self.prompt_logprobs is not None or self.hidden_states


@dataclass(slots=True)
class PromptReport:
    """What was asked about the prompt itself."""

    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    top_logits: tuple[tuple[int, float], ...] = ()
    hidden_states: list[Tensor] = field(default_factory=list)  # chunks [rows, D], in order

    def rewind(self, rows: int) -> None:
        """Keep what was reported of the first `rows` prompt rows; the others are computed anew."""
        del self.logprobs[rows:]
        while sum(len(chunk) for chunk in self.hidden_states) > rows:
            self.hidden_states.pop()


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one request, or its end; the first event of a request carries the prompt's report."""

    request: int
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None
    prompt: PromptReport | None = None


class Sequence:
    """A request on its way: its tokens so far and its block tables."""

    def __init__(self, number: int, request: Request) -> None:
        self.number, self.request = number, request
        self.tokens = list(request.prompt)  # prompt and reply; a preempted sequence computes all of them anew
        self.table: BlockTable | None = None
        self.report = PromptReport()
        self.seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed

    @property
    def computed(self) -> int:
        """Count the tokens whose keys and values are in the cache."""
        return self.table.length if self.table is not None else 0

    @property
    def pending(self) -> int:
        """Count the rows still to compute before the next token can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def reply(self) -> list[int]:
        """List the tokens chosen so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def in_prompt(self) -> bool:
        """Tell whether no token has been chosen yet."""
        return len(self.tokens) == len(self.request.prompt)
