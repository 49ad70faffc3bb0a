"""What is asked: requests of one turn or several, with the numbers of tokens that they have and want.

Owns the two values that all other modules pass on. Refuses to know where they come from: read `generated.py` for text of exact
lengths, `files.py` for data sets, `load.py` for who sends them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the user: its text, or the ids of a raw prompt, and how many tokens the reply may have.

    `prompt_len` counts the tokens of the text alone, without a chat template and images; None where no tokenizer has counted.
    `images` are URLs, those of generated images `data:` ones. `output_len` None leaves the length to the server.
    """

    prompt: str | tuple[int, ...]
    output_len: int | None
    prompt_len: int | None = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What one user does: turns that follow each other, each of which waits for the reply before it.

    `history` are messages that stand before the first turn.
    """

    turns: tuple[Turn, ...]
    history: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """All requests in the order of their arrival, and one that is sent before anything is measured.

    The warm-up request of a generated workload shares no text with the others, so that it warms no prefix that is measured.
    """

    requests: tuple[BenchRequest, ...]
    warmup: BenchRequest

    @property
    def turns(self) -> int:
        """Return how many requests reach the server."""
        return sum(len(each.turns) for each in self.requests)
