"""From a conversation that any API asked for to requests that the engine can run.

Owns the mapping of `ChatInput` to `GenerateOptions`, with the server's own defaults, and the errors that name a field of the
wire. Refuses to know HTTP. Read `wire/fields.py` for `ChatInput`, `service.py` for what runs the requests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gemcutter.api import Model, PreparedRequest
from gemcutter.engine.thinking_budget import ThinkingBudget
from gemcutter.server.errors import too_long
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.fields import ChatInput, check_limit, naming_constraint
from gemcutter.text.reply import CALL_OPEN, CHANNEL_CLOSE, CHANNEL_OPEN, RESPONSE_OPEN, TURN_OPEN

ENDING = (CALL_OPEN, TURN_OPEN, RESPONSE_OPEN)  # what no thought goes on after


def prepare_chat(
    model: Model, chat: ChatInput, options: ServerOptions, *, adapter: str | None = None, anthropic: bool = False
) -> PreparedRequest:
    """Encode a conversation and check everything that it asks for; meant for a worker thread. Raises RequestError or ApiError."""
    check_limit("tools", chat.tools, options.max_tools)
    check_limit(chat.stop_field, chat.stop, options.max_stop)
    wanted: dict[str, Any] = {**chat.sampling, **_template_options(chat, options)}
    if chat.stop:
        wanted["stop"] = list(chat.stop)
    if chat.tools:
        wanted |= {"tools": chat.tools, "tool_choice": chat.tool_choice, "parallel_tool_calls": chat.parallel_tool_calls}
    if adapter is not None:
        wanted["adapter"] = adapter
    if chat.constraint is not None:
        wanted["constraint"] = chat.constraint
    context = model.engine.context
    wanted["max_tokens"] = context if chat.max_tokens is None else chat.max_tokens
    if (budget := _thinking_budget(model, chat.thinking_budget)) is not None:
        wanted["logits_processors"] = (budget,)
    if (soft_tokens := chat.max_soft_tokens or options.max_soft_tokens) is not None:
        wanted["max_soft_tokens"] = soft_tokens
    with naming_constraint(chat.format_field):
        prepared = model.prepare(chat.messages, **wanted)
    prompt = len(prepared.request.prompt)
    if chat.max_tokens is not None and prompt + chat.max_tokens > context:
        raise too_long(prompt, chat.max_tokens, context, anthropic)
    return prepared


def _thinking_budget(model: Model, tokens: int | None) -> ThinkingBudget | None:
    """Return what ends thoughts after some tokens; None without a limit, and for models without thoughts."""
    id_of = model.tokenizer.id_of
    opening, closing = id_of(CHANNEL_OPEN), id_of(CHANNEL_CLOSE)
    if tokens is None or opening is None or closing is None:
        return None
    return ThinkingBudget(tokens, opening, closing, frozenset(id for text in ENDING if (id := id_of(text)) is not None))


def copies(prepared: PreparedRequest, count: int) -> list[PreparedRequest]:
    """Return a request so many times; a seed gives each its own replies."""
    request, seed = prepared.request, prepared.request.sampling.seed
    if seed is None or count == 1:
        return [prepared] * count
    seeds = [replace(request.sampling, seed=(seed + index) % (1 << 64)) for index in range(count)]
    return [replace(prepared, request=replace(request, sampling=sampling)) for sampling in seeds]


def _template_options(chat: ChatInput, options: ServerOptions) -> dict[str, Any]:
    """Return what the template is told: the request's template options, else its word on thinking, else the server's options.

    Clients send what some templates read and others don't: that is ignored.
    """
    given = {**dict(options.template_options), **chat.template_options}
    if chat.thinking is not None and "enable_thinking" not in chat.template_options:
        given["enable_thinking"] = chat.thinking
    found: dict[str, Any] = {"enable_thinking": bool(given.pop("enable_thinking", False)), "lenient_options": True}
    if given:
        found["template_options"] = given
    if chat.continues:
        found["continue_final_message"] = True
    return found
