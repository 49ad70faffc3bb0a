"""What drafts are worth: the same replies decoded without them and with them, in turns, and compared token for token.

Owns who drafts in a measurement (`DraftSetup`) and what is counted of it. Replies with drafts are those without, so that speeds
can be compared; where kernels let a row depend on its neighbours, a reply that differs is told. Refuses to know how tokens are
guessed. Read `harness.py` for the runs, `replay.py` for drafts that are right as often as somebody has published.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from gemcutter.benchmark.harness import BenchCase, BenchEngine, Decoded
from gemcutter.benchmark.replay import Replay, check_acceptance, make_assistant
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.engine.speculate.tally import Tally
from gemcutter.errors import RequestError
from gemcutter.load_options import LoadOptions
from gemcutter.model.text import Decoder

PLAIN, DRAFTED = "plain", "drafted"
REPLAY, MEASURED = "replay", "measured"  # kinds of drafts
WARM_UP_TOKENS = 32  # of replies that teach what steps and drafts take, before any is timed

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class DraftSetup:
    """Who drafts while replies are decoded, and to which prompts.

    `make` makes a speculator that has learnt nothing, `about` describes it in the report, `nbytes` are those of a draft model.
    `prompts` are real text, where there is a tokenizer to make ids of it; without any, random ones are drawn.
    """

    make: Callable[[], Speculator]
    about: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[tuple[int, ...], ...] = ()
    nbytes: int = 0

    @property
    def longest(self) -> int:
        """Count the rows of the longest prompt; those that are drawn have one."""
        return max(map(len, self.prompts), default=1)

    def draw(self, stand: BenchEngine, batch: int, run: int) -> Prompts:
        """Return the prompts of a run: other texts each time, until all were used."""
        if not self.prompts:
            return stand.draw(1, batch)
        return [self.prompts[(run * batch + place) % len(self.prompts)] for place in range(batch)]


def set_up_replay(
    preset: str, quant: str, target: Decoder, how: LoadOptions, acceptance: Sequence[float], draft_tokens: int | None
) -> DraftSetup:
    """Return what plays a pattern on a preset, `draft_tokens` at a time, or as many as pay.

    Raises RequestError for shares that no drafts can have, ConfigError for a preset without layers for an assistant to read.
    """
    shares = check_acceptance(acceptance)
    drafter = make_assistant(preset, quant, target, how)
    return DraftSetup(
        lambda: Speculator(assistant=Replay(drafter, shares), draft_tokens=draft_tokens),
        {"kind": REPLAY, "acceptance": list(shares), "draft_tokens": draft_tokens},
        nbytes=sum(param.nbytes for param in drafter.decoder.params.values()),
    )


def play(
    stand: BenchEngine, prompts: Prompts, max_tokens: int, speculators: Mapping[str, Speculator]
) -> tuple[Decoded, dict[str, Decoded]]:
    """Decode the replies to some prompts without drafts, then with each of the speculators; return all, the latter by name.

    Raises RequestError if a replay changed a reply, and so was none.
    """
    plain = stand.decode(prompts, max_tokens)
    found = dict[str, Decoded]()
    for name, speculator in speculators.items():
        replay = speculator.assistant if isinstance(speculator.assistant, Replay) else None
        if replay is not None:
            replay.replies |= zip(prompts, plain.replies, strict=True)
        found[name] = stand.decode(prompts, max_tokens, speculator)
        if replay is not None and found[name].replies != plain.replies:
            raise RequestError(
                f"replay: with drafts ({name}) one of {len(prompts)} replies became another, and drafts were right less often "
                "than the pattern says: rows of these kernels depend on their neighbours; use --kernels reference"
            )
    return plain, found


@dataclass(frozen=True, slots=True)
class DraftRuns:
    """What was decoded of one test, each run without drafts and with, and what became of the drafts."""

    plain: tuple[Decoded, ...]
    drafted: tuple[Decoded, ...]
    tally: Tally

    def as_object(self) -> dict[str, Any]:
        """Return the counts of all runs, and the speed beside that without drafts."""
        ratios = [mine.speed / other.speed for mine, other in zip(self.drafted, self.plain, strict=True)]
        steps, tokens = sum(each.steps for each in self.drafted), sum(each.tokens for each in self.drafted)
        return {
            "plain_tok_s": statistics.median(each.speed for each in self.plain),
            "to_plain": statistics.median(ratios),
            "steps": steps,
            "tokens_per_step": tokens / steps,
            "bursts": self.tally.bursts,
            "drafted": self.tally.drafted,
            "accepted": self.tally.accepted,
            "accepted_at": list(self.tally.accepted_at),
            "same_replies": all(mine.replies == other.replies for mine, other in zip(self.drafted, self.plain, strict=True)),
        }


def measure(stand: BenchEngine, test: BenchCase, setup: DraftSetup, repeats: int) -> DraftRuns:
    """Run a test of replies, `repeats` times without drafts and with, by a speculator that has learnt what they take here."""
    speculator = setup.make()
    play(stand, setup.draw(stand, test.batch, 0), min(WARM_UP_TOKENS, test.tokens) + 1, {DRAFTED: speculator})
    before = speculator.tally
    runs = list[tuple[Decoded, Decoded]]()
    for run in range(repeats):
        plain, found = play(stand, setup.draw(stand, test.batch, run), test.tokens + 1, {DRAFTED: speculator})
        runs.append((plain, found[DRAFTED]))
    plain_runs, drafted_runs = zip(*runs, strict=True)
    return DraftRuns(plain_runs, drafted_runs, _since(speculator.tally, before))


def _since(now: Tally, before: Tally) -> Tally:
    """Return what was counted between two tallies."""
    at = (mine - other for mine, other in zip_longest(now.accepted_at, before.accepted_at, fillvalue=0))
    return Tally(now.bursts - before.bursts, now.drafted - before.drafted, now.accepted - before.accepted, tuple(at))
