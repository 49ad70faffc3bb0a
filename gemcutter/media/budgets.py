"""How many soft tokens an image may become, and the check of a number that somebody asks for.

Owns the five budgets that the models were trained on. Refuses to know images; standard library only, so that a command line can
be checked at once. Read `image.py` for what a budget does to an image.
"""

from __future__ import annotations

from gemcutter.errors import RequestError, spell_value

BUDGETS = (70, 140, 280, 560, 1120)  # soft tokens that an image may become at most


def check_budget(budget: object) -> int:
    """Return a number of soft tokens that an image may become at most. Raises RequestError for any but the five."""
    if not isinstance(budget, int) or isinstance(budget, bool) or budget not in BUDGETS:
        known = ", ".join(map(str, BUDGETS))
        raise RequestError(f"max_soft_tokens: expected one of {known}, found {spell_value(budget)}")
    return budget
