"""Reading the parts of a request's body whose form depends on a `type`: items, blocks, tools.

Owns the error that names the field, and what the converters of the Responses and the Messages API share: lists, objects and
texts, tools as functions, assistant turns put together from parts that arrive one by one. Refuses to know HTTP and both APIs'
names. Read `responses.py` and `messages.py` for the converters, `server/errors.py` for how an error leaves.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gemcutter.errors import GemcutterError, RequestError, spell_value
from gemcutter.text.grammar import Constraint

WARNINGS = "x-gemcutter-warning"
RawText = str | tuple[int, ...]  # a text, or its token ids
OF_CONSTRAINT = "constraint"  # how the messages of errors of constraints begin, before a colon
SEALED = "gemcutter:"  # how reasoning that a client carries for us, unread, begins

log = logging.getLogger(__name__)


class FieldError(GemcutterError, ValueError):
    """A field of a request's body that can't be served as it is; `param` is its path, such as `input[2].content[0].type`.

    `status` is that of the answer over HTTP, `code` a word for programs.
    """

    def __init__(self, param: str, message: str, *, status: int = 400, code: str | None = None) -> None:
        self.param, self.status, self.code = param, status, code
        super().__init__(f"{param}: {message}" if param else message)


def refuse(param: str, message: str, *, status: int = 400) -> NoReturn:
    """Raise FieldError for a field."""
    raise FieldError(param, message, status=status)


def warned(path: str, warnings: Sequence[str]) -> dict[str, str]:
    """Return headers that say what of a request was ignored, and say so in the log."""
    for warning in warnings:
        log.warning("%s: %s", path, warning)
    return {WARNINGS: ascii("; ".join(warnings))[1:-1]} if warnings else {}


@dataclass(frozen=True, slots=True)
class ChatInput:
    """What any of the APIs asks for, in the layout of OpenAI's chat completions.

    `tools` are function declarations; `tool_choice` is "auto", "none", "required", {"name": N} or {"names": [...], "mode": M};
    `constraint` is what the answer must be. `sampling` holds what was given of `GenerateOptions`' sampling fields, `thinking` is
    None where the request leaves it to the server. `warnings` say what was ignored that a client might wait for.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    format_field: str = "response_format"  # where the API has it
    stop_field: str = "stop"
    continues: bool = False  # the last message is the beginning of the reply
    thinking_budget: int | None = None  # tokens
    max_soft_tokens: int | None = None  # that an image may become, unless its own part says so
    warnings: tuple[str, ...] = ()


def check_limit(where: str, given: Sequence[object], limit: int) -> None:
    """Raise FieldError for more than `limit`."""
    if len(given) > limit:
        refuse(where, f"at most {limit}, found {len(given)}")


@contextmanager
def naming_constraint(where: str) -> Iterator[None]:
    """Let errors of a constraint name the field that the request has it in."""
    try:
        yield
    except RequestError as error:
        name, _, rest = error.summary.partition(": ")
        if not name.startswith(OF_CONSTRAINT):
            raise
        raise FieldError(where, rest) from error


def schema_constraint(schema: object, where: str, *, strict: bool) -> Constraint:
    """Return what holds an answer to a JSON schema, an object or its text. Raises FieldError for what is neither."""
    if not isinstance(schema, str):
        schema = json.dumps(dict(as_object(schema, where)))
    return Constraint("json_schema", schema, strict)


def as_object(value: object, where: str) -> Mapping[str, Any]:
    """Return an object. Raises FieldError for anything else."""
    if not isinstance(value, Mapping):
        refuse(where, f"expected an object, found {spell_value(value)}")
    return value


def as_list(value: object, where: str) -> Sequence[Any]:
    """Return a list. Raises FieldError for anything else."""
    if not isinstance(value, list | tuple):
        refuse(where, f"expected a list, found {spell_value(value)}")
    return value


def as_text(value: object, where: str) -> str:
    """Return a text. Raises FieldError for anything else."""
    if not isinstance(value, str):
        refuse(where, f"expected a string, found {spell_value(value)}")
    return value


def as_name(value: object, where: str) -> str:
    """Return a text that is not empty. Raises FieldError for anything else."""
    if not isinstance(value, str) or not value:
        refuse(where, f"expected a name, found {spell_value(value)}")
    return value


def read_texts(found: object, where: str, limit: int) -> list[RawText]:
    """Return texts and lists of token ids, of which a field may hold one or a list. Raises FieldError, naming the place."""
    texts: list[object] = found if isinstance(found, list) and found and not _is_ids(found) else [found]
    if len(texts) > limit:
        refuse(where, f"at most {limit} texts, found {len(texts)}")
    return [_read_text(each, where if len(texts) == 1 else f"{where}[{index}]") for index, each in enumerate(texts)]


def _read_text(found: object, where: str) -> RawText:
    if isinstance(found, str):
        return found
    if not (isinstance(found, list) and found and _is_ids(found)):
        refuse(where, f"expected a text or a list of token ids, found {spell_value(found)}")
    return tuple(found)


def _is_ids(found: Sequence[object]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in found)


def choice_word(choice: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """Return a `tool_choice` that is one word, as both of OpenAI's APIs have it. Raises FieldError."""
    if choice not in ("auto", "none", "required"):
        refuse("tool_choice", f"expected auto, none, required or an object, found {spell_value(choice)}")
    if choice == "required" and not tools:
        refuse("tool_choice", "'required' without a function in tools")
    return choice


def joined(parts: Sequence[Mapping[str, Any]], separator: str) -> str | list[Mapping[str, Any]]:
    """Return parts that are all text as one text, others as they are."""
    if all(part["type"] == "text" for part in parts):
        return separator.join(part["text"] for part in parts)
    return list(parts)


def function(name: str, description: object, parameters: object, strict: object, where: str) -> dict[str, Any]:
    """Return a function declaration in the chat API's layout; a field that is None is left out. Raises FieldError."""
    declared: dict[str, Any] = {"name": name}
    if description is not None:
        declared["description"] = as_text(description, f"{where}.description")
    declared["parameters"] = dict(as_object({} if parameters is None else parameters, f"{where}.parameters"))
    if strict is not None:
        if not isinstance(strict, bool):
            refuse(f"{where}.strict", f"expected true or false, found {spell_value(strict)}")
        declared["strict"] = strict
    return {"type": "function", "function": declared}


def check_declared(name: str, tools: Sequence[Mapping[str, Any]], where: str) -> str:
    """Return the name of a tool that a choice demands. Raises FieldError if no such function was declared."""
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        refuse(where, f"no function {name!r} is declared; there are: {', '.join(names) or 'none'}")
    return name


def seal(text: str) -> str:
    """Return reasoning as an opaque text, which clients send back without showing it."""
    return base64.b64encode(f"{SEALED}{text}".encode()).decode()


def unseal(sealed: object) -> str:
    """Return the reasoning of `seal`; nothing for what another server sealed."""
    try:
        text = base64.b64decode(sealed, validate=True).decode() if isinstance(sealed, str) else ""
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""
    return text.removeprefix(SEALED) if text.startswith(SEALED) else ""


class Turns:
    """Messages put together from parts: reasoning, text and calls of one answer become one assistant message.

    A part that stood before the calls, or before the text, in the order in which models write begins a new message, so that
    nothing changes places.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._answer: dict[str, Any] | None = None  # the last message, if parts may still join it

    def add(self, message: dict[str, Any]) -> None:
        """Add a whole message."""
        self.messages.append(message)
        self._answer = None

    def reason(self, text: str) -> None:
        """Add reasoning to the answer."""
        answer = self._current(closed_by=("content", "tool_calls"))
        answer["reasoning_content"] = "\n".join(filter(None, [answer.get("reasoning_content"), text]))

    def say(self, text: str) -> None:
        """Add text to the answer."""
        answer = self._current(closed_by=("tool_calls",))
        answer["content"] = answer.get("content", "") + text

    def call(self, id: str, name: str, arguments: object) -> None:
        """Add a call to the answer; `arguments` is JSON text or an object."""
        calls = self._current().setdefault("tool_calls", [])
        calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def end(self) -> None:
        """Let the next part begin an answer of its own."""
        self._answer = None

    def _current(self, closed_by: Sequence[str] = ()) -> dict[str, Any]:
        if self._answer is None or any(name in self._answer for name in closed_by):
            self.add({"role": "assistant"})
            self._answer = self.messages[-1]
        return self._answer

    def finish(self) -> list[dict[str, Any]]:
        """Return the messages; an answer without text has the content None."""
        for message in self.messages:
            if message["role"] == "assistant":
                message.setdefault("content", None)
        return self.messages
