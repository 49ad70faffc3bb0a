"""POST /v1/messages and /v1/messages/count_tokens, as clients of Anthropic's API call them.

Owns the way of a request from its body to the last event. Refuses to know blocks and prompts. Read `wire/messages.py` for the
body, `messages_events.py` for the reply, `service.py` for what lies between.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gemcutter.api import PreparedRequest
from gemcutter.server import sse
from gemcutter.server.bridge import Reply
from gemcutter.server.errors import as_api_error
from gemcutter.server.messages_events import PING, MessageEvents
from gemcutter.server.preparation import prepare
from gemcutter.server.service import Service, unless_gone
from gemcutter.server.wire.fields import refuse, warned
from gemcutter.server.wire.messages import MessagesRequest, to_chat


def router(service: Service) -> APIRouter:
    """Return the routes over a service."""
    routes = APIRouter(tags=["messages"])

    async def read(body: MessagesRequest, request: Request) -> tuple[PreparedRequest, dict[str, str]]:
        """Return what the engine is to do, and headers with what was ignored."""
        adapter = service.check_model(body.model)
        chat = to_chat(body)
        prepared = await prepare(service, request, chat, adapter=adapter, anthropic=True)
        return prepared, warned(request.url.path, chat.warnings)

    @routes.post("/v1/messages", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation."""
        if body.max_tokens is None:
            refuse("max_tokens", "required: a number of tokens")
        prepared, headers = await read(body, request)
        events = MessageEvents(body.model, len(prepared.request.prompt), shows_thinking=body.shows_thinking)
        replies = service.open([prepared])
        if body.stream:
            frames, ping = stream(replies[0], events), sse.frame(PING[1], PING[0])
            answer = sse.event_stream(frames, lambda: service.close(replies), service.options.ping_s, ping)
            answer.headers.update(headers)
            return answer
        return JSONResponse(await unless_gone(request, whole(service, replies[0], events)), headers=headers)

    @routes.post("/v1/messages/count_tokens", response_model=None)
    async def count_tokens(body: MessagesRequest, request: Request) -> Response:
        """Count the tokens of a prompt."""
        prepared, headers = await read(body, request)
        return JSONResponse({"input_tokens": len(prepared.request.prompt)}, headers=headers)

    return routes


async def whole(service: Service, reply: Reply, events: MessageEvents) -> dict[str, Any]:
    """Return the message once the reply has ended."""
    try:
        async for reading in reply:
            for chunk in reading.chunks:
                events.push(chunk)
    finally:
        service.close([reply])
    assert reply.completion is not None
    events.finish(reply.completion)
    return events.message


async def stream(reply: Reply, events: MessageEvents) -> AsyncIterator[bytes]:
    """Yield a reply's events; an error after the first ends the stream as an event."""
    for name, data in events.start():
        yield sse.frame(data, name)
    try:
        async for reading in reply:
            for chunk in reading.chunks:
                found = events.push(chunk) if chunk.completion is None else events.finish(chunk.completion)
                for name, data in found:
                    yield sse.frame(data, name)
    except Exception as error:
        yield sse.frame(as_api_error(error).body(anthropic=True), "error")
