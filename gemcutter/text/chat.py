"""Conversations to prompts, through the chat template that a checkpoint brings.

Owns the search for the template, the sandbox it runs in (a template is foreign code), and the check of the messages it is given.
Refuses to know turn markers or thinking cues: what a prompt looks like is the template's business alone. Media bytes and tool
grammar live elsewhere; here an image is a part of type `image` and a tool call is a name with an object of arguments.
Read `tokenizer.py` for the encoding of the rendered prompt, `stream.py` for what comes back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemcutter.errors import CheckpointError, RequestError
from gemcutter.text.tokenizer import Tokenizer, read_json

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
# Types of content parts; only text carries something that a template prints, the others become a placeholder.
PART_TYPES = ("text", "image", "image_url", "audio", "input_audio", "video")
# An assistant's message that has one of these needs no content.
INSTEAD_OF_CONTENT = ("tool_calls", "tool_responses", "reasoning", "reasoning_content")


class ChatTemplate:
    """Render conversations for one checkpoint; safe to share between threads.

    `variables` are the names that the template may look up: an option that is not among them would have no effect.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, origin: str = "chat template") -> None:
        """Compile `source`; special tokens come from `tokenizer`, and errors name `origin`.

        Raises CheckpointError, naming the line, when the source is not a valid template.
        """
        self.origin = origin
        self._tokenizer = tokenizer
        environment = _environment()
        try:
            syntax_tree = environment.parse(source)
            self.variables: frozenset[str] = frozenset(jinja2.meta.find_undeclared_variables(syntax_tree))
            self._template = environment.from_string(syntax_tree)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}:{error.lineno}: the chat template is not valid Jinja: {error.message}") from error
        except Exception as error:  # absurd nesting fails in Python's own parser or recursion limit
            raise CheckpointError(f"{origin}: the chat template can't be compiled: {_describe(error)}") from error

    @classmethod
    def find(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Return the template of a checkpoint's folder, or None when it has none, as base models.

        Looks for chat_template.jinja, then chat_template.json, then `chat_template` in tokenizer_config.json, where the entry
        called `default` of a list wins. Raises CheckpointError, naming the file, for a damaged file or template.
        """
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(_read_text(path), tokenizer, origin=str(path))
        for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
            source = _pick(read_json(path).get("chat_template"), path) if path.is_file() else None
            if source is not None:
                return cls(source, tokenizer, origin=f"{path}[chat_template]")
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """Return the prompt for `messages` in OpenAI's layout; the BOS is in it if the template prints one.

        `tools` are OpenAI function declarations; `extra` goes to the template as it is (`preserve_thinking`, ...).
        Raises RequestError, naming each `messages[i].field`, for malformed messages, for options that the template does not read,
        and for what it refuses itself.
        """
        self._refuse_ignored({"tools": tools, "enable_thinking": enable_thinking}, extra)
        variables: dict[str, Any] = {
            **self._tokenizer.special_tokens,
            "messages": check_messages(messages, tools),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": enable_thinking,
            **extra,
        }
        try:
            return self._template.render(variables)
        except Exception as error:  # a template is foreign code: it can fail in any way that Python can
            raise RequestError(f"{self.origin}: the chat template failed on this conversation: {_describe(error)}") from error

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> list[int]:
        """Return the ids of the rendered prompt, with exactly one BOS whether the template prints it or not.

        Options and errors are those of `render`.
        """
        prompt = self.render(
            messages, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking, tools=tools, **extra
        )
        return self._tokenizer.encode(prompt, bos=True)

    def _refuse_ignored(self, options: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        given = [name for name, value in options.items() if value] + list(extra)
        ignored = [name for name in given if name not in self.variables]
        if ignored:
            raise RequestError(
                f"{self.origin}: the chat template would ignore some options",
                [f"{name}: this template does not read it; leave it out" for name in ignored],
            )


def check_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return copies of `messages` that every generation of template understands; the originals stay untouched.

    Arguments of tool calls given as JSON text become objects, and an absent content of the model becomes an empty one.
    Raises RequestError with all that is wrong in messages and tools.
    """
    problems: list[str] = []
    if not isinstance(messages, list | tuple) or not messages:
        problems.append(f"messages: expected a non-empty list of objects, found {_name(messages)}")
        messages = ()
    checked = [_check_message(f"messages[{i}]", message, problems) for i, message in enumerate(messages)]
    _check_tools(tools, problems)
    if problems:
        raise RequestError("the conversation can't be rendered", problems)
    return checked


def _check_message(where: str, message: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        problems.append(f"{where}: expected an object with role and content, found {_name(message)}")
        return {}
    checked = dict(message)
    role = checked.get("role")
    if role not in ROLES:
        problems.append(f"{where}.role: expected one of {', '.join(ROLES)}, found {_name(role)}")
    if role in ("assistant", "model") and checked.get("content") is None and any(map(checked.get, INSTEAD_OF_CONTENT)):
        checked["content"] = ""
    _check_content(f"{where}.content", checked.get("content"), problems)
    for field in ("reasoning", "reasoning_content"):
        if not isinstance(checked.get(field), str | None):
            problems.append(f"{where}.{field}: expected a string, found {_name(checked[field])}")
    if checked.get("tool_calls") is not None:
        checked["tool_calls"] = _check_tool_calls(f"{where}.tool_calls", checked["tool_calls"], problems)
    return checked


def _check_content(where: str, content: Any, problems: list[str]) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        problems.append(f"{where}: expected a string or a list of parts, found {_name(content)}")
        return
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PART_TYPES:
            problems.append(f"{where}[{i}].type: expected one of {', '.join(PART_TYPES)}, found {_name(kind)}")
        elif kind == "text" and not isinstance(part.get("text"), str):
            problems.append(f"{where}[{i}].text: expected a string, found {_name(part.get('text'))}")


def _check_tool_calls(where: str, calls: Any, problems: list[str]) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        problems.append(f"{where}: expected a list of calls, found {_name(calls)}")
        return []
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problems.append(f"{where}[{i}].function: expected an object with a name and arguments, found {_name(function)}")
            continue
        arguments = _parse_arguments(f"{where}[{i}].function.arguments", function.get("arguments"), problems)
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _parse_arguments(where: str, arguments: Any, problems: list[str]) -> Any:
    """Return the arguments as an object; None and an empty text, which some clients send, are an empty one."""
    parsed = arguments
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: expected the JSON text of an object, found {_name(arguments)} ({error})")
            return {}
    if parsed is None:
        return {}
    if not isinstance(parsed, Mapping):
        problems.append(f"{where}: expected an object or its JSON text, found {_name(arguments)}")
    return parsed


def _check_tools(tools: Any, problems: list[str]) -> None:
    if tools is None:
        return
    if not isinstance(tools, list | tuple):
        problems.append(f"tools: expected a list of function declarations, found {_name(tools)}")
        return
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problems.append(f"tools[{i}].function: expected an object with a name, found {_name(function)}")


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the sandbox that chat templates are written for: the settings and names that transformers gives them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_spell_null
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _spell_null(value: Any) -> Any:
    """Print None as `null`: templates before July 2026 print arguments as they are, and the model never saw Python's spelling."""
    return "null" if value is None else value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace Jinja's own filter, which escapes `<`, `>` and `&` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _pick(entry: Any, path: Path) -> str | None:
    """Return the source from a `chat_template` value: a string, or the default of a list of {name, template}."""
    if isinstance(entry, list):
        named = [item for item in entry if isinstance(item, dict) and isinstance(item.get("template"), str)]
        chosen = next((item for item in named if item.get("name") == "default"), named[0] if named else None)
        entry = entry if chosen is None else chosen["template"]
    if isinstance(entry, str | None):
        return entry
    raise CheckpointError(f"{path}: chat_template is {_name(entry)}, expected a string or a list of {{name, template}} objects")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}): download the file again") from error


def _describe(error: Exception) -> str:
    is_own_message = isinstance(error, jinja2.TemplateError)
    return str(error) if is_own_message else f"{type(error).__name__}: {error}"


def _name(value: Any) -> str:
    """Return a short description of a wrong value for an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "...")
    return repr(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
