"""POST /v1/chat/completions, whole and streamed.

Owns the order of what is sent. Refuses to know how replies are made. Read `wire/chat.py` for the body, `chat_events.py` for the
objects, `service.py` for the replies.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gemcutter.completion import Completion
from gemcutter.server import sse
from gemcutter.server.bridge import Reply
from gemcutter.server.chat_events import ChatEvents, Envelope, counted, finish_reason, logprobs, message, usage
from gemcutter.server.chat_task import copies
from gemcutter.server.errors import as_api_error
from gemcutter.server.merge import merged
from gemcutter.server.preparation import media_tokens, prepare
from gemcutter.server.service import Service, unless_gone
from gemcutter.server.wire.chat import ChatRequest, to_chat


def router(service: Service) -> APIRouter:
    """Return the route over a service."""
    routes = APIRouter(tags=["chat"])

    @routes.post("/v1/chat/completions", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        adapter = service.check_model(body.model)
        chat = to_chat(body, service.options)
        prepared = await prepare(service, request, chat, count=body.n or 1, adapter=adapter)
        replies = service.open(copies(prepared, body.n or 1))
        if body.stream:
            return sse.event_stream(stream(service, body, replies), lambda: service.close(replies), service.options.ping_s)
        return JSONResponse(await unless_gone(request, whole(service, body, replies)))

    return routes


async def whole(service: Service, body: ChatRequest, replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the answer once all replies have ended."""
    completions = await service.finish(replies)
    choices = []
    for index, each in enumerate(completions):
        found = logprobs(each.logprobs, service.model.tokenizer) if body.logprobs else None
        spoken = message(each, service.options)
        choices.append({"index": index, "message": spoken, "logprobs": found, "finish_reason": finish_reason(each)})
    return Envelope(body.model, "chat.completion").wrap(choices, usage=usage(completions, media_tokens(replies[0].prepared)))


async def stream(service: Service, body: ChatRequest, replies: Sequence[Reply]) -> AsyncIterator[bytes]:
    """Yield the frames of a stream; an error is a frame, too, because the headers are gone."""
    envelope, tokenizer = Envelope(body.model, "chat.completion.chunk"), service.model.tokenizer
    events = [ChatEvents(index, service.options) for index in range(len(replies))]
    counts, completions = [0] * len(replies), dict[int, Completion]()
    prompt, media = len(replies[0].prepared.request.prompt), media_tokens(replies[0].prepared)

    def send(choice: dict[str, Any]) -> bytes:
        running = counted(prompt, sum(counts), media=media) if body.wants_running_usage else None
        return sse.frame(envelope.wrap([choice], **({"usage": running} if body.wants_usage or running else {})))

    try:
        for each in events:
            yield send(each.role())
        async for index, reading in merged(replies):
            counts[index] += reading.tokens
            pending = logprobs(reading.logprobs, tokenizer) if body.logprobs and reading.logprobs else None
            for chunk in reading.chunks:
                choice = events[index].push(chunk)
                if choice is not None:
                    choice["logprobs"], pending = pending, None
                    yield send(choice)
                if chunk.completion is not None:
                    completions[index] = chunk.completion
                    choice = events[index].finish(chunk.completion)
                    choice["logprobs"], pending = pending, None
                    yield send(choice)
        if body.wants_usage:
            ended = [completions[index] for index in range(len(replies))]
            yield sse.frame(envelope.wrap([], usage=usage(ended, media)))
    except Exception as error:
        yield sse.frame(as_api_error(error).body(anthropic=False))
    yield sse.DONE
