"""POST /v1/responses, and GET and DELETE of a response that is kept, as clients of OpenAI's API call them.

Owns the way of a request from its body to the last event, and what is put into the store. Refuses to know items and prompts. Read
`wire/responses.py` for the body, `responses_events.py` for the response, `responses_store.py` for what is kept.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gemcutter.server import sse
from gemcutter.server.bridge import Reply
from gemcutter.server.errors import as_api_error
from gemcutter.server.preparation import media_tokens, prepare
from gemcutter.server.responses_events import ResponseEvents
from gemcutter.server.responses_store import Item, ResponsesStore, StoredResponse
from gemcutter.server.service import Service, unless_gone
from gemcutter.server.wire.fields import FieldError, refuse, warned
from gemcutter.server.wire.responses import ResponsesRequest, items_of, to_chat

Keep = Callable[[], Awaitable[None]]


def router(service: Service) -> APIRouter:
    """Return the routes over a service; without bytes for a store nothing can be continued by `previous_response_id`."""
    routes = APIRouter(tags=["responses"])
    store = ResponsesStore(service.options.store_bytes) if service.options.store_bytes else None

    @routes.post("/v1/responses", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer what was put in."""
        adapter = None if body.model is None else service.check_model(body.model)
        earlier = _earlier(body.previous_response_id, store)
        chat = to_chat(body, earlier)
        prepared = await prepare(service, request, chat, adapter=adapter)
        is_stored = store is not None and body.store is not False
        media = media_tokens(prepared)
        events = ResponseEvents(body, body.model or service.options.name, is_stored=is_stored, media=media)

        async def keep() -> None:
            if store is not None and is_stored and events.response["status"] in ("completed", "incomplete"):
                await service.work(lambda: store.put(events.response, earlier, items_of(body)))  # images make it large

        replies, headers = service.open([prepared]), warned(request.url.path, chat.warnings)
        if body.stream:
            answer = sse.event_stream(stream(replies[0], events, keep), lambda: service.close(replies), service.options.ping_s)
            answer.headers.update(headers)
            return answer
        return JSONResponse(await unless_gone(request, whole(service, replies[0], events, keep)), headers=headers)

    @routes.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str) -> Item:
        """Return a response that is kept."""
        return _stored(response_id, store, "response_id", 404).response

    @routes.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> dict[str, Any]:
        """Forget a response."""
        _stored(response_id, store, "response_id", 404)
        assert store is not None  # else nothing is stored
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return routes


async def whole(service: Service, reply: Reply, events: ResponseEvents, keep: Keep) -> dict[str, Any]:
    """Return the response once the reply has ended."""
    try:
        async for reading in reply:
            for chunk in reading.chunks:
                if chunk.completion is None:
                    events.push(chunk)
    finally:
        service.close([reply])
    assert reply.completion is not None
    events.finish(reply.completion)
    await keep()
    return events.response


async def stream(reply: Reply, events: ResponseEvents, keep: Keep) -> AsyncIterator[bytes]:
    """Yield a response's events; an error after the first is a failed response."""
    for name, data in events.start():
        yield sse.frame(data, name)
    try:
        async for reading in reply:
            for chunk in reading.chunks:
                if chunk.completion is None:
                    found = events.push(chunk)
                else:
                    found = events.finish(chunk.completion)
                    await keep()
                for name, data in found:
                    yield sse.frame(data, name)
    except Exception as error:
        told = as_api_error(error)
        for name, data in events.fail("server_error" if told.status >= 500 else "invalid_prompt", told.message):
            yield sse.frame(data, name)


def _earlier(id: str | None, store: ResponsesStore | None) -> Sequence[Item]:
    """Return the items that a request continues. Raises FieldError where there are none: no answer may seem to know them."""
    return () if id is None else _stored(id, store, "previous_response_id", 400).items


def _stored(id: str, store: ResponsesStore | None, param: str, status: int) -> StoredResponse:
    if store is None:
        refuse(param, "responses are not kept by this server; send the whole conversation as `input`", status=status)
    found = store.get(id)
    if found is None:
        text = f"no response {id!r} is kept (any more); send the whole conversation as `input`"
        raise FieldError(param, text, status=status, code="previous_response_not_found")
    return found
