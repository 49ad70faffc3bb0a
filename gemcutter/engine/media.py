"""Rows of a prompt that are no tokens: where they stand, what enters the layers, and how far they see.

Owns `MediaSpan`, the ids by which prefixes with media are told apart, and which chunks would cut a block. Refuses to know images
and sounds: who encodes them gives rows and a digest. Read `step.py` for how spans become rows of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

DIGITS = 30  # of a digest that go into an id: 120 bits


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Positions `start` to `start` + K - 1 of a prompt, which enter the layers as embeds_KD instead of their ids.

    `digest`, hexadecimal, tells contents apart: equal digests are equal rows. The rows of a block see each other in windowed
    layers where the model's do; those of a sound are no block.
    """

    start: int
    digest: str
    embeds_KD: Tensor = field(compare=False, repr=False)
    is_block: bool = True

    @property
    def rows(self) -> int:
        """Count the positions."""
        return self.embeds_KD.shape[0]

    @property
    def stop(self) -> int:
        """Return the position after the last."""
        return self.start + self.rows


def key_ids(prompt: tuple[int, ...], spans: Sequence[MediaSpan]) -> tuple[int, ...]:
    """Return a prompt's ids with those of media rows replaced by negative ones of their contents: equal ids, equal rows."""
    if not spans:
        return prompt
    found = list(prompt)
    for span in spans:
        found[span.start : span.stop] = [-1 - int(span.digest[:DIGITS], 16)] * span.rows
    return tuple(found)


def whole_blocks(blocks: Sequence[tuple[int, int]], start: int, rows: int) -> int:
    """Return how many rows from `start` on to compute so that no block is cut.

    Fewer than `rows` where they would end within a block; more where the block has begun by `start`.
    """
    for first, stop in blocks:
        if first < start + rows < stop:
            return first - start if first > start else stop - start
    return rows


def problems_of(spans: object, prompt: int, hidden: int, most_rows: int | None) -> Iterator[str]:
    """Yield what is wrong with the spans of a prompt of so many tokens; `most_rows` bounds a block, where rows see ahead."""
    if not isinstance(spans, tuple) or not all(isinstance(span, MediaSpan) for span in spans):
        yield "request.media: expected a tuple of MediaSpan"
        return
    end = 0
    for index, span in enumerate(spans):
        where, shape = f"request.media[{index}]", tuple(span.embeds_KD.shape)
        if len(shape) != 2 or not shape[0] or shape[1] != hidden:
            yield f"{where}: expected rows of {hidden} numbers, found {list(shape)}"
        elif not end <= span.start <= span.stop <= prompt:
            yield f"{where}: positions {span.start} to {span.stop - 1} of {prompt}; spans ascend within the prompt, each apart"
        elif most_rows is not None and span.is_block and span.rows > most_rows:
            yield f"{where}: {span.rows} rows, a step holds {most_rows}; lower max_soft_tokens, or raise max_batched_tokens"
        end = max(end, span.stop)
