"""What a server counts itself: drafts and hits of its prefix cache, before a run and after.

Owns the reading of Prometheus's text format, vLLM's names in it, and sglang's `/server_info`. Refuses to fail: what a server does
not tell is None. Read `report.py` for the fields that it becomes.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>[^}]*)\})?\s+(?P<value>\S+)", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')
DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
COUNTED = (QUERIES, DRAFTS, DRAFT_TOKENS, ACCEPTED)
MOST_LOOKS, BETWEEN_LOOKS_S = 20, 0.1
ACCEPT_LENGTH = "avg_spec_accept_length"


class Asker(Protocol):
    """Asks a server for a path; `Client` is one."""

    async def get(self, path: str) -> str | None:
        """Return the body; None for anything but 200."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Counters by name, each summed over its labels; `accepted_at` by the place of a draft."""

    totals: Mapping[str, float]
    accepted_at: Mapping[int, float]
    server_info: Mapping[str, Any] | None = None


def read_counts(metrics: str | None, server_info: str | None = None) -> Counts:
    """Read the bodies of `/metrics` and `/server_info`, either of which may be missing."""
    totals, accepted_at = dict[str, float](), dict[int, float]()
    for found in LINE.finditer(metrics or ""):
        value = float(found["value"])
        totals[found["name"]] = totals.get(found["name"], 0.0) + value
        place = POSITION.search(found["labels"] or "")
        if found["name"] == ACCEPTED_AT and place:
            accepted_at[int(place[1])] = accepted_at.get(int(place[1]), 0.0) + value
    return Counts(totals, accepted_at, _read_info(server_info))


def _read_info(body: str | None) -> Mapping[str, Any] | None:
    try:
        found = json.loads(body or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


async def ask_counts(asker: Asker) -> Counts:
    """Ask a server for what it counts, until it counts no more: a reply is counted some moments after its last line."""
    found = read_counts(await asker.get("/metrics"))
    for _ in range(MOST_LOOKS):
        await asyncio.sleep(BETWEEN_LOOKS_S)
        before, found = found, read_counts(await asker.get("/metrics"))
        if all(before.totals.get(name) == found.totals.get(name) for name in COUNTED):
            break
    return replace(found, server_info=_read_info(await asker.get("/server_info")))


@dataclass(frozen=True, slots=True)
class Drafts:
    """Speculation during a run: drafts (one a step and sequence), their tokens, those that were accepted, and by place."""

    drafts: int
    tokens: int
    accepted: int
    shares: tuple[float, ...]

    @property
    def length(self) -> float:
        """Return the tokens of a step: those accepted, and the one that every step brings."""
        return 1 + self.accepted / self.drafts


def drafts_between(before: Counts, after: Counts) -> Drafts | None:
    """Return the drafts between two snapshots; None where there were none, or the server counts none."""
    drafts, tokens, accepted = (_grown(before, after, name) for name in (DRAFTS, DRAFT_TOKENS, ACCEPTED))
    if not drafts or not tokens:
        return None
    places = sorted(after.accepted_at)
    shares = tuple((after.accepted_at[place] - before.accepted_at.get(place, 0.0)) / drafts for place in places)
    return Drafts(int(drafts), int(tokens), int(accepted), shares)


def accept_length(before: Counts, after: Counts) -> float | None:
    """Return the mean tokens of a step with drafts: sglang's own word for it, else computed from vLLM's counters."""
    states = (after.server_info or {}).get("internal_states")
    if isinstance(states, list) and states and isinstance(states[0], dict):
        told = states[0].get(ACCEPT_LENGTH)
        if isinstance(told, int | float):
            return float(told)
    found = drafts_between(before, after)
    return None if found is None else found.length


def cache_between(before: Counts, after: Counts) -> tuple[int, int] | None:
    """Return prompt tokens that were looked up in the prefix cache, and those found; None where the server counts none."""
    if QUERIES not in after.totals:
        return None
    return int(_grown(before, after, QUERIES)), int(_grown(before, after, HITS))


def _grown(before: Counts, after: Counts, name: str) -> float:
    return after.totals.get(name, 0.0) - before.totals.get(name, 0.0)
