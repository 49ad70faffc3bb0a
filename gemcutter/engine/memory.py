"""How many pages a pool needs.

Owns the arithmetic between tokens, sequences and pages; the byte counts come from the plan. Refuses to know devices.
"""

from __future__ import annotations

from gemcutter.cache.pool import PageCount
from gemcutter.errors import RequestError
from gemcutter.plan import ModelPlan

PAGE_TOKENS = 64


def page_counts(
    plan: ModelPlan, context: int, rows: int, sequences: int = 1, checkpoints: int = 0, page_tokens: int = PAGE_TOKENS
) -> dict[int | None, PageCount]:
    """Size every group for `sequences` sequences of up to `context` tokens each, stepped `rows` rows at a time.

    A windowed group keeps the window and the rows in flight, whose ends share pages with neighbours; a checkpoint keeps a
    window of its own.
    """
    counts: dict[int | None, PageCount] = {}
    for group in plan.groups():
        whole = -(-context // page_tokens)
        if group.window is None:
            counts[None] = PageCount(whole * sequences + checkpoints, page_tokens)  # a checkpoint's last page is copied on write
            continue
        window = min(whole, -(-(group.window - 1) // page_tokens) + 1)
        in_flight = min(whole, -(-(group.window - 1 + rows) // page_tokens) + 1)
        counts[group.window] = PageCount(in_flight * sequences + window * checkpoints, page_tokens)
    return counts


def check_limits(context: int, max_rows: int, max_sequences: int, checkpoints: int) -> None:
    """Raise RequestError, with every problem, unless the limits leave room for a request."""
    least = {"context": (context, 1), "max_rows": (max_rows, 1), "max_sequences": (max_sequences, 1)}
    limits = {**least, "checkpoints": (checkpoints, 0)}
    problems = [f"{name}: expected {low} or more, found {value!r}" for name, (value, low) in limits.items() if value < low]
    if problems:
        raise RequestError("the limits leave no room", problems)
