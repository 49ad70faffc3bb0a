"""Conversations to prompts, through the chat template that a checkpoint brings.

Owns the search for the template and its options, and keeps what strangers wrote apart from the template's own markers.
`history.py` and `tool_schemas.py` make what it is given, `template_sandbox.py` is what it runs in.
Refuses to know turn markers or thinking cues: what a prompt looks like is the template's business alone. Media bytes and tool
grammar live elsewhere; here an image is a part of type `image` and a tool call is a name with an object of arguments.
Read `tokenizer.py` for the encoding of the rendered prompt, `splice.py` for replies that come back, `reply.py` for new ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from gemcutter.errors import CheckpointError, GemcutterError, RequestError
from gemcutter.sidecar.templates import DEFAULT, TOOL_USE, find_templates
from gemcutter.text.history import check_messages, in_order
from gemcutter.text.placeholders import Placeholders
from gemcutter.text.splice import ReplyStore
from gemcutter.text.template_sandbox import Sandbox, limited_turns
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tool_schemas import printable_tools

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]


# Options of every template, and their defaults; what else is asked for is an option by a name of the template's own.
FLAGS = {"add_generation_prompt": True, "enable_thinking": False, "continue_final_message": False, "lenient_options": False}


class ChatTemplate:
    """Render conversations for one checkpoint; safe to share between threads.

    `variables` are the names that the template may look up: an option that is not among them would have no effect.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, origin: str = "chat template", with_tools: ChatTemplate | None = None
    ) -> None:
        """Compile `source`; special tokens come from `tokenizer`, and errors name `origin`.

        `with_tools` is rendered instead where there are tools or calls. Raises CheckpointError, naming the line, when the
        source is not a valid template.
        """
        self.origin, self.source = origin, source
        self._tokenizer, self._with_tools = tokenizer, with_tools
        self._find_with_tools: Callable[[], ChatTemplate | None] | None = None
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

    def render(self, messages: Messages, *, tools: Messages | None = None, **options: Any) -> str:
        """Return the prompt for `messages` in OpenAI's layout; the BOS is in it if the template prints one.

        `tools` are OpenAI function declarations. The options are those of FLAGS and what else the template reads
        (`preserve_thinking`, ...). `continue_final_message` ends the prompt within the last message, which is the model's, as
        it is written there; with `lenient_options`, those that the template does not read are left out, with a line in the log.
        Raises RequestError, naming each `messages[i].field`, for malformed messages, for options that the template does not
        read, and for what it refuses itself.
        """
        return self._for_tools(messages, tools)._render(messages, tools, options, ())[0]

    def encode(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        trusted: bool = False,
        replies: ReplyStore | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the ids of the rendered prompt, with exactly one BOS whether the template prints it or not.

        What looks like a marker in messages, tools and options stays text, unless they are `trusted`. Where the prompt begins
        like a conversation of `replies`, it has the ids of that. The other options, and errors, are those of `render`.
        """
        tokenizer = self._tokenizer
        text, placeholders = self._for_tools(messages, tools)._render(
            messages, tools, options, () if trusted else tokenizer.markers
        )
        parts = [part if isinstance(part, int) else placeholders.show(part) for part in tokenizer.split_markers(text)]
        if parts[:1] != [tokenizer.bos_id]:
            parts.insert(0, tokenizer.bos_id)
        known, rest = ([], parts) if replies is None else replies.splice(parts)
        return known + tokenizer.encode_parts(rest)

    @property
    def has_tool_template(self) -> bool:
        """Whether conversations with tools are another template's."""
        return self._with_tools is not None

    def set_tool_template(self, find: Callable[[], ChatTemplate | None]) -> None:
        """Let conversations with tools be rendered by what `find` returns; it is called for the first of them."""
        self._find_with_tools = find

    def _for_tools(self, messages: Messages, tools: Messages | None) -> ChatTemplate:
        if not tools and not _holds_calls(messages):
            return self
        if self._with_tools is None and self._find_with_tools is not None:
            self._with_tools, self._find_with_tools = self._find_with_tools(), None
        return self._with_tools or self

    def _render(
        self, messages: Messages, tools: Messages | None, options: Mapping[str, Any], markers: Iterable[str]
    ) -> tuple[str, Placeholders]:
        """Return the prompt, with placeholders for the markers that are not the template's own."""
        extra = dict(options)
        flags = {name: extra.pop(name, default) for name, default in FLAGS.items()}
        given = self._accepted(
            {"tools": tools, "enable_thinking": flags["enable_thinking"]}, extra, bool(flags["lenient_options"])
        )
        checked = in_order(check_messages(messages, tools), joins_turns=lambda: self._joins_turns)
        declared = printable_tools(tools) if tools else tools
        placeholders = Placeholders(markers, checked, declared, given, self.source)
        shown = placeholders.hide(checked)
        final = _cut_final(shown, placeholders.end) if flags["continue_final_message"] else None
        text = self._run(
            {
                "messages": shown,
                "tools": placeholders.hide(declared),
                "add_generation_prompt": flags["add_generation_prompt"] and final is None,
                "enable_thinking": flags["enable_thinking"],
                **placeholders.hide(given),
            }
        )
        if final is None:
            return text, placeholders
        if text.count(placeholders.end) != 1:
            raise RequestError(f"{self.origin}: the chat template leaves out the last message, which can't be continued then")
        return text.partition(placeholders.end)[0] + final, placeholders

    def _run(self, values: Mapping[str, Any]) -> str:
        try:
            with limited_turns():
                return self._template.render({**self._tokenizer.special_tokens, **values})
        except Exception as error:  # a template is foreign code: it can fail in any way that Python can
            raise RequestError(f"{self.origin}: the chat template failed on this conversation: {_describe(error)}") from error

    @cached_property
    def _joins_turns(self) -> bool:
        """Whether two messages of the model after each other are one turn, as they are since July 2026."""
        first, second = "gem", "cutter"
        replies = [{"role": "assistant", "content": text} for text in (first, second)]
        values = {"messages": [{"role": "user", "content": "Hi"}, *replies], "tools": None}
        try:
            return first + second in self._run({**values, "add_generation_prompt": False, "enable_thinking": False})
        except RequestError:  # it insists that roles alternate
            return False

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

    def _accepted(self, own: Mapping[str, Any], extra: Mapping[str, Any], is_lenient: bool) -> dict[str, Any]:
        """Return the extra options that the template reads. Raises RequestError for others, unless that is to be lenient."""
        ignored = [name for name in [*(name for name, value in own.items() if value), *extra] if name not in self.variables]
        left_out = [name for name in ignored if is_lenient and name != "tools"]
        if refused := [name for name in ignored if name not in left_out]:
            raise RequestError(
                f"{self.origin}: the chat template would ignore some options",
                [f"{name}: this template does not read it; leave it out" for name in refused],
            )
        for name in left_out:
            log.info("%s: the chat template does not read %s, which is ignored", self.origin, name)
        return {name: value for name, value in extra.items() if name not in left_out}


def _cut_final(messages: list[dict[str, Any]], end: str) -> str:
    """Put `end` in the place of the last message's text, which is the model's, and return that. Raises RequestError."""
    last, place = messages[-1], f"messages[{len(messages) - 1}]"
    content = last.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if last.get("role") != "assistant" or last.get("tool_calls") or not isinstance(content, str):
        raise RequestError(
            f"{place}: only a text of the assistant can be continued; end with one, or leave out continue_final_message"
        )
    last["content"] = end
    return content


def _holds_calls(messages: object) -> bool:
    found = messages if isinstance(messages, list | tuple) else ()
    return any(isinstance(each, Mapping) and (each.get("tool_calls") or each.get("role") == "tool") for each in found)


def _describe(error: Exception) -> str:
    is_own_message = isinstance(error, jinja2.TemplateError)
    return str(error) if is_own_message else f"{type(error).__name__}: {error}"
