"""Tool calls of a reply as clients get them, and the declarations that they are read by.

Owns `ToolCall` and the layouts in which tools may be declared. Refuses to know how a model spells calls: `call_reader.py` reads
one, `reply.py` finds those of a reply.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcutter.text.argument_types import ArgumentSchema


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


def argument_schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, ArgumentSchema]:
    """Return the parameters' schemas of declared functions by name; entries of other layouts are left out.

    A declaration has OpenAI's layout, or is the function alone.
    """
    functions = [tool.get("function", tool) for tool in tools or () if isinstance(tool, Mapping)]
    named = [each for each in functions if isinstance(each, Mapping) and isinstance(each.get("name"), str)]
    return {each["name"]: ArgumentSchema(each.get("parameters")) for each in named}
