"""One tool call of a reply.

Owns what a call is to a client: a name, and arguments as the text of a JSON object. Refuses to know tokens and channels:
`reply.py` finds the calls of a reply.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that is complete: `arguments` is the text of a JSON object, exactly as it was streamed."""

    name: str
    arguments: str

    @property
    def parsed(self) -> dict[str, Any]:
        """Return the arguments as an object."""
        found: dict[str, Any] = json.loads(self.arguments)
        return found
