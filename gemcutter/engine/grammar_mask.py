"""Holds a reply to a grammar, as a logits processor.

Owns the place in the grammar at which a reply stands, where thoughts may interrupt it, and the mask there, which is made on
threads of its own while the model computes. Refuses to know what the grammar says and how it was compiled. Read `sampler.py` for
the hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemcutter.errors import RequestError

# What each byte of a bit mask adds to eight logits: 0 for a bit that is 1, -inf for others.
ADDED = np.array([-np.inf, 0.0], np.float32)[np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")]
POOL = ThreadPoolExecutor(2, thread_name_prefix="gemcutter-grammar")  # its threads start when they are needed


class Thoughts(Enum):
    """Whether a reply may think before its answer and between its calls."""

    NEVER = "never"
    EMPTY = "empty"  # a channel with its name alone, as some models write one where they do not think
    FREE = "free"
    OPEN = "open"  # the prompt ends in a thought; others may follow


@dataclass(frozen=True, slots=True)
class MarkerIds:
    """What stands around a grammar. `opening` and `closing` are a thought's, None where the vocabulary has none.

    `name` is what a channel begins with, `call_end` after what another thought may begin, `special` what thoughts may not hold.
    """

    opening: int | None = None
    closing: int | None = None
    name: tuple[int, ...] = ()
    call_end: int | None = None
    special: frozenset[int] = frozenset()


class Phase(Enum):
    """What the next token of a reply belongs to."""

    WAITING = "waiting"  # for the trigger
    THOUGHT = "thought"
    EMPTY = "empty"  # a thought that holds its name alone
    HELD = "held"  # by the grammar
    LOST = "lost"  # the reply holds a token that was forbidden


@dataclass(frozen=True, slots=True)
class Place:
    """Where a reply stands: `named` ids of a channel's name and `consumed` ids of the grammar lie behind it."""

    phase: Phase
    consumed: int = 0
    named: int = 0
    may_think: bool = False


class GrammarMask:
    """Allows the tokens that a matcher allows; with `trigger` from the first such id of the reply on.

    `matcher` stands at the grammar's start and is copied, never moved; `first` has a bit for every id, 1 where it may come there.
    One mask serves one sequence: `for_sequence` gives others. It may be asked for any reply: tokens that were added are consumed,
    those that are gone (drafts) are rolled back. A mask that `gives_way` lets go of a reply which the grammar can't hold; others
    end it with an error.
    """

    def __init__(
        self,
        matcher: Any,
        first: bytes,
        name: str,
        *,
        markers: MarkerIds | None = None,
        thoughts: Thoughts = Thoughts.NEVER,
        trigger: int | None = None,
        gives_way: bool = False,
    ) -> None:
        self._start_of, self._first, self._name, self._trigger = matcher, first, name, trigger
        self._gives_way = gives_way
        self._markers = markers = MarkerIds() if markers is None else markers
        self._thoughts = thoughts if markers.opening is not None and markers.closing is not None else Thoughts.NEVER
        is_open = self._thoughts is Thoughts.OPEN
        start = Phase.WAITING if trigger is not None else Phase.THOUGHT if is_open else Phase.HELD
        # These three are the business of the job that runs, else of the thread that asks; there is at most one job.
        self._matcher: Any = None
        self._mask_V = np.empty(len(first) * 8, np.float32)  # what is in it counts until the next job
        self._places = [Place(start, may_think=self._thoughts is not Thoughts.NEVER)]
        self._seen: list[int] = []  # the reply that the last job was made for; its first `_told` ids stay
        self._told = 0
        self._job: Future[Tensor | None] | None = None

    def for_sequence(self) -> GrammarMask:
        """Return a mask for another sequence."""
        return GrammarMask(
            self._start_of,
            self._first,
            self._name,
            markers=self._markers,
            thoughts=self._thoughts,
            trigger=self._trigger,
            gives_way=self._gives_way,
        )

    def observe(self, reply: Sequence[int]) -> None:
        """Start to make the mask after a reply; what is wrong shows when it is asked for."""
        self._start(reply)
        self._told = len(reply)

    def __call__(self, prompt: Sequence[int], reply: Sequence[int], logits_V: Tensor) -> Tensor:
        """Return logits in which the tokens that the grammar forbids are -inf.

        Raises RequestError, naming the grammar, where it can't go on.
        """
        mask_V = self._start(reply).result()
        if self._places[self._told].phase is Phase.LOST and not self._gives_way:
            raise RequestError(f"{self._name}: another logits processor, or a bias, made the reply leave it; leave that out")
        if mask_V is None:
            return logits_V
        size = min(len(mask_V), len(logits_V))
        mask_V = mask_V[:size].to(logits_V.device)
        if self._gives_way and not bool(torch.isfinite(logits_V[:size] + mask_V).any()):
            return logits_V
        logits_V[:size] += mask_V
        logits_V[size:] = -torch.inf
        return logits_V

    def _start(self, reply: Sequence[int]) -> Future[Tensor | None]:
        """Return the job whose result is the mask after a reply."""
        told = self._told = self._told if self._told <= len(reply) else 0
        kept = told + _common(self._seen[told:], reply[told:])
        if self._job is not None and kept == len(self._seen) == len(reply):
            return self._job
        if self._job is not None:
            self._job.exception()  # the matcher is in use until then
        added = list(reply[kept:])
        self._seen[kept:] = added
        place = self._places[kept]
        if place.phase is Phase.WAITING and self._trigger not in added and self._places[-1].consumed == 0:
            self._job = Future()  # nothing is held yet, and no thread is woken
            self._job.set_result(self._move(kept, added))
        else:
            self._job = POOL.submit(self._move, kept, added)
        return self._job

    # ---- on a thread of the pool, where a grammar holds ----

    def _move(self, kept: int, added: Sequence[int]) -> Tensor | None:
        """Go back to the first `kept` ids, on by those that were added, and return the mask there, None where all may come."""
        gone = self._places[-1].consumed - self._places[kept].consumed
        del self._places[kept + 1 :]
        if gone:
            self._matcher.rollback(gone)
        for id in added:
            self._places.append(self._next(self._places[-1], id))
        return self._mask(self._places[-1])

    def _next(self, place: Place, id: int) -> Place:
        """Return the place after one more id; the matcher moves along."""
        markers = self._markers
        if place.phase is Phase.LOST or (place.phase is Phase.WAITING and id != self._trigger):
            return place
        if place.phase in (Phase.THOUGHT, Phase.EMPTY):
            if id == markers.closing:
                return replace(place, phase=Phase.HELD, may_think=False)
            if place.phase is Phase.EMPTY:
                is_name = markers.name[place.named : place.named + 1] == (id,)
                return replace(place, named=place.named + 1) if is_name else replace(place, phase=Phase.LOST)
            return replace(place, phase=Phase.LOST) if id in markers.special else place
        if place.may_think and id == markers.opening:
            is_empty = self._thoughts is Thoughts.EMPTY
            return replace(place, phase=Phase.EMPTY if is_empty else Phase.THOUGHT, named=0)
        if not self._consume(id):
            return replace(place, phase=Phase.LOST)
        may_think = self._thoughts is not Thoughts.NEVER and id == markers.call_end
        return Place(Phase.HELD, place.consumed + 1, 0, may_think)

    def _consume(self, id: int) -> bool:
        if self._matcher is None:
            self._matcher = self._start_of.deep_copy()
        is_taken = self._matcher.validate_tokens([id]) == 1 and bool(self._matcher.consume_token(id))
        if self._matcher.is_error() and not self._gives_way:
            raise self._error()
        return is_taken

    def _error(self) -> RequestError:
        problem = self._matcher.get_error().splitlines()[0]
        return RequestError(f"{self._name}: the reply can't go on ({problem}); simplify the grammar")

    def _mask(self, place: Place) -> Tensor | None:
        """Return what is added to logits at a place: 0, or -inf where an id may not come. Raises RequestError where none may."""
        markers, mask_V = self._markers, self._mask_V
        if place.phase in (Phase.WAITING, Phase.LOST):  # what is sampled after a draft that is forbidden is never taken
            return None
        if place.phase is Phase.HELD:
            try:
                self._fill_by_matcher(mask_V)
            except RequestError:
                if self._gives_way:
                    return None
                raise
            _allow(mask_V, markers.opening if place.may_think else None)
        elif place.phase is Phase.EMPTY:
            mask_V.fill(-np.inf)
            _allow(mask_V, *markers.name[place.named : place.named + 1], markers.closing)
        else:
            mask_V.fill(0.0)
            mask_V[list(markers.special)] = -np.inf
            _allow(mask_V, markers.closing)
        return torch.from_numpy(mask_V)

    def _fill_by_matcher(self, mask_V: NDArray[np.float32]) -> None:
        matcher = self._matcher  # None before the first id
        bits = np.frombuffer(self._first if matcher is None else matcher.compute_bitmask(), np.uint8)
        if matcher is not None and matcher.is_error():
            raise self._error()
        if not bits.any():
            raise RequestError(f"{self._name}: the grammar allows no token here; is there a text that it accepts?")
        fill_mask(bits, mask_V)


def _allow(mask_V: NDArray[np.float32], *ids: int | None) -> None:
    mask_V[[id for id in ids if id is not None]] = 0.0


def fill_mask(bits_B: NDArray[np.uint8], mask_V: NDArray[np.float32]) -> None:
    """Set `mask_V` to 0 for every bit that is 1, of each byte the lowest one first, and to -inf for the others.

    The memory is used again, since getting new pages from the system takes longer than all else; a sum is the fastest mask.
    """
    np.take(ADDED, bits_B, axis=0, out=mask_V.reshape(-1, 8), mode="clip")


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of what two lists begin with."""
    if right[: len(left)] == left:
        return len(left)
    return next(place for place, one in enumerate(left) if place >= len(right) or one != right[place])
