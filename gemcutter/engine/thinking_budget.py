"""A limit on the tokens that a model may think before it answers, as a logits processor.

Owns the count of thought tokens in a reply and the mask that ends a thought. Refuses to know how thoughts are spelled: the ids of
the markers are given. Read `sampler.py` for the hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """Ends thoughts, all those of a reply together, after `tokens`: then the closing marker is forced, no new one is opened.

    `opening` and `closing` are the ids of a thought's markers; `ending` are others that end a thought, such as a tool call's, or
    in a prompt say that none is open. It has no state: requests, preempted sequences and drafts may share one.
    """

    tokens: int
    opening: int
    closing: int
    ending: frozenset[int] = frozenset()

    def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        """Return logits that allow the closing marker alone while a thought is too long, and no opening one after the limit."""
        spent, is_open = self.spent(prompt, reply)
        if spent < self.tokens:
            return logits_V
        if not is_open:
            logits_V[self.opening] = -torch.inf
            return logits_V
        logits_V.fill_(-torch.inf)
        logits_V[self.closing] = 0.0  # whatever it was: the only one that is left must be finite
        return logits_V

    def spent(self, prompt: Sequence[int], reply: Sequence[int]) -> tuple[int, bool]:
        """Return how many tokens of the reply are in thoughts, and whether its end is in one."""
        spent, place, is_open = 0, 0, self._starts_open(prompt)
        while place < len(reply):
            if is_open:
                end = min(_find(reply, id, place) for id in (self.closing, self.opening, *self.ending))
                spent += end - place
                is_open = end == len(reply) or reply[end] == self.opening  # a second opening marker goes on with the thought
            else:
                end = _find(reply, self.opening, place)
                is_open = end < len(reply)
            place = end + 1
        return spent, is_open

    def _starts_open(self, prompt: Sequence[int]) -> bool:
        """Return whether the prompt ends in a thought."""
        for id in reversed(prompt):
            if id == self.opening:
                return True
            if id == self.closing or id in self.ending:
                return False
        return False


def _find(ids: Sequence[int], id: int, start: int) -> int:
    """Return the next place of an id, the length where there is none; it is searched for at C's speed, as replies get long."""
    try:
        return ids.index(id, start)
    except ValueError:
        return len(ids)
