"""What travels between the ingress and a replica: a request as its bytes, and its answer as a head and bytes.

Owns `Call`, whose `prompt` is what Ray's prefix router reads of a request, and how that text is made of a body in any of the
APIs. Refuses to check bodies, which is the replica's business: whatever can't be read has no text and goes to any replica.
Imports no Ray. Read `ingress.py` for who makes calls, `replica.py` for who answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEFORE = ("tools", "system", "instructions")  # of a body, what prompts have in front of the conversation
CONVERSATION = ("messages", "input", "prompt")  # by API: one of them holds it
MOST_CHARACTERS = 200_000  # of a prompt that are looked at; the router keeps them in a tree
LONG = 2000  # characters of an ASCII word, such as an image in base64, of which a digest says as much

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request; `prompt` is the text that its beginning is known by, `adapter` the adapter that it asks for."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    prompt: str = ""
    session: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Head:
    """The status and headers of an answer, whose bytes follow."""

    status: int
    headers: Headers

    @property
    def is_stream(self) -> bool:
        """Return whether the bytes are events, which the client gets as they come."""
        return any(name.lower() == b"content-type" and b"text/event-stream" in value for name, value in self.headers)


def read_body(body: bytes) -> Mapping[str, Any]:
    """Return a JSON object, an empty one for anything else."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def prompt_of(body: Mapping[str, Any]) -> str:
    """Return a request's text in the order in which a prompt has it, an empty one where there is none."""
    found = "\n".join(_words([body.get(name) for name in (*BEFORE, *CONVERSATION)]))
    return found[:MOST_CHARACTERS]


def session_of(body: Mapping[str, Any]) -> str:
    """Return what stays the same through a conversation: a digest of how it begins, an empty text where there is none."""
    told = [body.get(name) for name in BEFORE]
    told += [_opening(body.get(name)) for name in CONVERSATION]
    text = "\n".join(_words(told))
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest() if text else ""


def _opening(value: object) -> object:
    """Return the messages up to the user's first one; a prompt that is no conversation as it is."""
    if not isinstance(value, list):
        return value
    asked = (place for place, each in enumerate(value) if isinstance(each, Mapping) and each.get("role") == "user")
    return value[: next(asked, len(value)) + 1]


def _words(value: object) -> Iterator[str]:
    """Yield the texts of a value in order, with the names that they stand under, whatever its shape."""
    if isinstance(value, str):
        is_data = len(value) > LONG and value.isascii() and len(value[:LONG].split()) == 1
        yield value if not is_data else hashlib.blake2b(value.encode(errors="replace"), digest_size=16).hexdigest()
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield str(name)
            yield from _words(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _words(part)
    elif value is not None:
        yield str(value)
