"""What a reference within a JSON schema names: one reading for prompts, for grammars and for the arguments of calls.

Owns local pointers alone; others are never fetched. Refuses to know what a schema means. Read `tool_schemas.py`,
`grammar_values.py` and `argument_types.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_DIGITS = 5  # of a place in a list


def find_part(root: object, pointer: str) -> Any:
    """Return the part of a schema that a local reference (`#/$defs/Name`) names; None for others, and where there is none."""
    if not pointer.startswith("#"):
        return None
    found: Any = root
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and len(name) <= MOST_DIGITS and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            return None
    return found
