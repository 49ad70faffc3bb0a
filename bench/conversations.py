"""Conversations for the benchmark of replicas, and for their tests: many of a few turns, each after a beginning of its own.

Owns what is said and how it is counted: tokens of prompts, and those of them that a replica had in its cache. Read
`bench/ray_replicas.py` for the numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

THINGS = ("lantern", "river", "mountain", "harbour", "violin", "garden", "window", "letter", "bridge", "clock")
WISHES = ("Tell me about the {}.", "What is the {} made of?", "Who has seen the {}?")


@dataclass
class Counts:
    """Tokens of the prompts that follow a first one, and those of them that were cached."""

    prompt: int = 0
    cached: int = 0

    @property
    def share(self) -> float:
        """Return the share that was cached."""
        return self.cached / max(self.prompt, 1)


def opening(number: int) -> str:
    """Return what one conversation begins with, unlike all others from its first words on."""
    thing = THINGS[number % len(THINGS)]
    return f"{number * 7919 % 10007} {thing}s: " + WISHES[0].format(thing) + f" This is number {number}."


def hold(url: str, number: int, turns: int, counts: Counts, lock: threading.Lock) -> None:
    """Hold one conversation, and count the turns after its first."""
    messages = [{"role": "user", "content": opening(number)}]
    for turn in range(turns):
        body = {"model": "demo", "messages": messages, "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        if turn:
            with lock:
                counts.prompt += found["usage"]["prompt_tokens"]
                counts.cached += found["usage"]["prompt_tokens_details"]["cached_tokens"]
        wish = WISHES[(turn + 1) % len(WISHES)].format(THINGS[(number + turn) % len(THINGS)])
        messages = [*messages, found["choices"][0]["message"], {"role": "user", "content": wish}]


def hold_all(url: str, numbers: Sequence[int], turns: int, at_once: int) -> Counts:
    """Hold conversations, so many at once, and return what was counted."""
    counts, lock = Counts(), threading.Lock()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda number: hold(url, number, turns, counts, lock), numbers))
    return counts
