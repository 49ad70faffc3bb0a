"""Holds a reply to a grammar, as a logits processor.

Owns the place in the grammar at which a reply stands, and the mask there, which is made on threads of its own while the model
computes. Refuses to know what the grammar says and how it was compiled. Read `sampler.py` for the hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemcutter.errors import RequestError


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="gemcutter-grammar")


class GrammarMask:
    """Allows the tokens that a matcher allows; with `trigger` from the first such id of the reply on.

    `matcher` stands at the grammar's start and is copied, never moved. One mask serves one sequence: `for_sequence` gives others.
    It may be asked for any reply: tokens that were added are consumed, those that are gone (drafts) are rolled back.
    """

    def __init__(self, matcher: Any, name: str, trigger: int | None = None) -> None:
        self._first, self._name, self._trigger = matcher, name, trigger
        self._matcher: Any = None
        self._consumed: list[int] = []
        self._mask: Future[Tensor] | None = None

    def for_sequence(self) -> GrammarMask:
        """Return a mask for another sequence."""
        return GrammarMask(self._first, self._name, self._trigger)

    def observe(self, reply: Sequence[int]) -> None:
        """Start to make the mask after a reply; what is wrong shows when it is asked for."""
        if self._move_to(reply):
            self._start()

    def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        """Return logits in which the tokens that the grammar forbids are -inf.

        Raises RequestError, naming the grammar, where it can't go on.
        """
        if not self._move_to(reply):
            return logits_V
        banned_V = self._start().result().to(logits_V.device)
        size = min(len(banned_V), len(logits_V))
        logits_V[:size].masked_fill_(banned_V[:size], -torch.inf)
        logits_V[size:] = -torch.inf
        return logits_V

    def _start(self) -> Future[Tensor]:
        if self._mask is None:
            self._mask = _pool().submit(_banned, self._matcher, self._name)
        return self._mask

    def _move_to(self, reply: Sequence[int]) -> bool:
        """Bring the matcher to the end of a reply; return whether the grammar holds there.

        It does not before its trigger, nor after a draft that it forbids: what is sampled there is never taken.
        """
        wanted = list(reply)
        if self._trigger is not None:
            if self._trigger not in wanted:
                return False
            wanted = wanted[wanted.index(self._trigger) :]
        if self._matcher is not None and wanted == self._consumed:
            return True
        if self._mask is not None:
            self._mask.exception()  # the matcher is in use until then
            self._mask = None
        if self._matcher is None:
            self._matcher = self._first.deep_copy()
        common = _common(self._consumed, wanted)
        if common < len(self._consumed):
            self._matcher.rollback(len(self._consumed) - common)
            del self._consumed[common:]
        added = wanted[common:]
        taken = self._matcher.validate_tokens(added)
        if taken:
            self._matcher.consume_tokens(added[:taken])
            self._consumed += added[:taken]
        return bool(taken == len(added))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of what two lists begin with."""
    if right[: len(left)] == left:
        return len(left)
    return next(place for place, one in enumerate(left) if place >= len(right) or one != right[place])


def _banned(matcher: Any, name: str) -> Tensor:
    """Return which tokens a matcher forbids, as bools. Raises RequestError where it allows none."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        raise RequestError(f"{name}: the reply can't go on ({matcher.get_error().splitlines()[0]}); simplify the grammar")
    if not bits.any():
        raise RequestError(f"{name}: the grammar allows no token here; is there a text that it accepts?")
    return torch.from_numpy(np.unpackbits(bits, bitorder="little") == 0)
