"""Conversations to prompts, through the chat template that a checkpoint brings.

Owns the search for the template and the check of the messages it is given. `template_sandbox.py` is what it runs in.
Refuses to know turn markers or thinking cues: what a prompt looks like is the template's business alone. Media bytes and tool
grammar live elsewhere; here an image is a part of type `image` and a tool call is a name with an object of arguments.
Read `tokenizer.py` for the encoding of the rendered prompt, `reply.py` for what comes back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from gemcutter.errors import CheckpointError, GemcutterError, RequestError
from gemcutter.sidecar.templates import DEFAULT, TOOL_USE, find_templates
from gemcutter.text.template_sandbox import Sandbox, limited_turns
from gemcutter.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
# Types of content parts; only text carries something that a template prints, the others become a placeholder.
PART_TYPES = ("text", "image", "image_url", "audio", "input_audio", "video")
# An assistant's message that has one of these needs no content.
INSTEAD_OF_CONTENT = ("tool_calls", "tool_responses", "reasoning", "reasoning_content")


class ChatTemplate:
    """Render conversations for one checkpoint; safe to share between threads.

    `variables` are the names that the template may look up: an option that is not among them would have no effect.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, origin: str = "chat template", with_tools: ChatTemplate | None = None
    ) -> None:
        """Compile `source`; special tokens come from `tokenizer`, and errors name `origin`.

        `with_tools` is rendered instead where tools are given. Raises CheckpointError, naming the line, when the source is not a
        valid template.
        """
        self.origin, self.source = origin, source
        self._tokenizer, self._with_tools = tokenizer, with_tools
        try:
            self._template, tree = Sandbox().compile_limited(source)
            self.variables: frozenset[str] = frozenset(jinja2.meta.find_undeclared_variables(tree))
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}:{error.lineno}: the chat template is not valid Jinja: {error.message}") from error
        except Exception as error:  # absurd nesting fails in Python's own parser or recursion limit
            raise CheckpointError(f"{origin}: the chat template can't be compiled: {_describe(error)}") from error

    @classmethod
    def find(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Return the template of a checkpoint's folder, or None when it has none, as base models.

        Where there are several, conversations with tools get the one that is called `tool_use`. Raises CheckpointError, naming
        the file, for a damaged file or template.
        """
        return cls.of_named(find_templates(folder), tokenizer)

    @classmethod
    def of_named(cls, named: Mapping[str, tuple[str, str]], tokenizer: Tokenizer) -> ChatTemplate | None:
        """Return the template of `find_templates`, None where there is none. Raises CheckpointError if one can't be compiled."""
        if DEFAULT not in named:
            return None
        compiled = {name: cls(source, tokenizer, origin=origin) for name, (source, origin) in named.items()}
        compiled[DEFAULT]._with_tools = compiled.get(TOOL_USE)
        return compiled[DEFAULT]

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
        if tools and self._with_tools is not None:
            chosen = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking, "tools": tools}
            return self._with_tools.render(messages, **chosen, **extra)  # type: ignore[arg-type]
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
            with limited_turns():
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

    def problem(self) -> str | None:
        """Return why a conversation of one message can't be rendered, None where it can."""
        try:
            self.render([{"role": "user", "content": "Hi"}])
        except RequestError as error:
            return error.summary
        return None

    def end_of_turn(self) -> int | None:
        """Return the id that this template puts after a reply, None where it puts no marker there."""
        reply = "gemcutter"
        try:
            text = self.render(
                [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}], add_generation_prompt=False
            )
            ids = self._tokenizer.encode(text.rpartition(reply)[2].lstrip(), bos=False)
        except GemcutterError:
            return None  # it refuses such a conversation
        return ids[0] if ids and ids[0] in self._tokenizer.special_ids else None

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
