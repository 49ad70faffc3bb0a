"""Every error that a user of gemcutter can meet.

Each error carries `.problems`: all that was found wrong, collected before anything was allocated or written.
A message says what is wrong, where (file:tensor, config key or request field), what was expected and found, and the remedy.
This module knows nothing of models; it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_OF_A_KIND = 10  # problems that a message lists


class GemcutterError(Exception):
    """Report one failure with all its problems.

    `summary` is one line; `problems` are the single findings, shown one a line below it, and of each kind a few.
    """

    def __init__(self, summary: str, problems: Iterable[str] = ()) -> None:
        self.summary = summary
        self.problems: tuple[str, ...] = tuple(problems) or (summary,)
        super().__init__(summary)

    def __str__(self) -> str:
        if self.problems == (self.summary,):
            return self.summary
        return "\n".join([self.summary, *(f"  {problem}" for problem in drawn_together(self.problems))])


def drawn_together(problems: Sequence[str]) -> list[str]:
    """Return problems in order, those of one kind (their first word) beyond MOST_OF_A_KIND as one line with their number."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.partition(" ")[0], []).append(problem)
    found = list[str]()
    for kind, texts in kinds.items():
        more = len(texts) - MOST_OF_A_KIND
        found += texts[:MOST_OF_A_KIND]
        if more > 0:
            found.append(f"{kind:10} and {more:,} more, such as {texts[-1].removeprefix(kind).strip()}")
    return found


class ConfigError(GemcutterError):
    """A config.json that is unknown, contradictory or incomplete."""


class CheckpointError(GemcutterError):
    """A checkpoint that can't be read or does not match its plan."""


class RequestError(GemcutterError, ValueError):
    """A request that can't be served as asked: bad ids, too long a prompt, an impossible option. A ValueError, too."""


class CapacityError(GemcutterError):
    """Not enough memory or pages for what was asked."""


class NumericError(GemcutterError):
    """Logits that are NaN or infinite: nothing can be sampled from them or scored."""


class KernelError(GemcutterError):
    """No kernel accepts a site, or a kernel was asked for where it can't run."""


class RankError(GemcutterError):
    """A rank of a model on several processes that died, hangs or can't be reached: the whole group ends with it."""


def spell_value(value: object, limit: int = 80) -> str:
    """Return a wrong value as an error shows it: its repr, cut where it is long; its type where it has none."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or an object of somebody else's
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."
