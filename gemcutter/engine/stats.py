"""What the engine holds and has done, as one immutable value.

Owns `EngineStats` alone, so that metrics can be read from any thread while the engine works. Read `engine.py` for who fills it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcutter.engine.speculate.tally import NO_DRAFTS, Tally


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot: what is true now, then what was counted since the engine was made.

    `running` and `waiting` are requests; `kv_usage` is the share of pages that are held, cached prefixes among them, of the page
    group that is fullest. `queued_prompt_tokens` are rows to be computed before all requests decode. Of the tokens of prompts
    that were admitted (`prefix_queries`), `prefix_hits` were found in the cache. `step_tokens` are the rows of the last step,
    `tally` counts drafts.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    queued_prompt_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    steps: int = 0
    step_tokens: int = 0
    tally: Tally = NO_DRAFTS
