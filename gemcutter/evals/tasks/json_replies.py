"""JSON by a schema: objects that are to be made up, judged by whether the schema allows them.

The schemas are generated. Asked freely, a model must keep to one by itself; with a grammar, constrained decoding must hold it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gemcutter.evals.data import Data
from gemcutter.evals.generated import ADJECTIVES, NOUNS, integer, random_of, words
from gemcutter.evals.json_schema import problem
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply
from gemcutter.text.grammar import Constraint

COUNT = 20
DEEPEST = 2  # objects in objects
QUESTION = "Describe a {} {} as one JSON object that is valid against this JSON schema. Write the JSON only.\n\n{}"
NAMES = words("size weight price color age label parts owner year count kind place")
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
FREE, GRAMMAR = (
    Mode("free", "the schema in the prompt", "generate", "json-free-1", is_chat=True, max_tokens=512, can_think=True),
    Mode("grammar", "the same, and decoding held to it", "generate", "json-free-1", is_chat=True, max_tokens=512, can_think=True),
)


class JsonReplies:
    """The task."""

    name = "json"
    about = "JSON objects that a schema must allow (generated)"
    modes: Sequence[Mode] = (FREE, GRAMMAR)
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield as many items as are asked for. Raises RequestError."""
        for number in range(integer(asked, "count", COUNT, 1)):
            source = random_of("json", asked, number)
            schema = _object(source, 0)
            text = json.dumps(schema)
            question = QUESTION.format(source.choice(ADJECTIVES), source.choice(NOUNS), text)
            options = {"constraint": Constraint("json_schema", text)} if mode is GRAMMAR else {}
            yield Item(f"{number:05}", [{"role": "user", "content": question}], schema, options=options)

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Judge by validity; `json` says whether it is JSON at all. A fenced block counts for what is in it."""
        fenced = FENCED.search(reply.text)
        try:
            value = json.loads(fenced[1] if fenced else reply.text)
        except (ValueError, RecursionError):
            return Grade(None, {"valid": 0.0, "json": 0.0})
        why = problem(value, item.gold)
        return Grade("valid" if why is None else why, {"valid": float(why is None), "json": 1.0})


def _object(source: random.Random, depth: int) -> dict[str, Any]:
    names = source.sample(NAMES, source.randint(2, 4))
    return {
        "type": "object",
        "properties": {name: _value(source, depth + 1) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _value(source: random.Random, depth: int) -> dict[str, Any]:
    """Return the schema of a value. Everything is bounded, so that a constrained reply ends."""
    low = source.randrange(10)
    kinds: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "minLength": 1, "maxLength": 20},
        "integer": {"type": "integer", "minimum": low, "maximum": low + source.choice((5, 90, 1000))},
        "boolean": {"type": "boolean"},
        "enum": {"type": "string", "enum": source.sample(ADJECTIVES, 3)},
    }
    if depth <= DEEPEST:
        kinds["array"] = {"type": "array", "items": _value(source, DEEPEST + 1), "minItems": 1, "maxItems": 3}
        kinds["object"] = _object(source, depth)
    return kinds[source.choice(list(kinds))]
