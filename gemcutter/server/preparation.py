"""From a conversation to a request that is ready to run, off the event loop: images are found, read, encoded and put in place.

Owns the order of that: room first, then the limits, then work on threads, of which those for images are others than those for
text, so that nobody's text waits for somebody's images. Refuses to know wire formats. Read `chat_task.py` for options,
`media_sources.py` for what is found at addresses, `service.py` for the threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastapi import Request

from gemcutter.api import Model, PreparedRequest
from gemcutter.errors import RequestError
from gemcutter.server.chat_task import prepare_chat
from gemcutter.server.media_sources import check_sources, read_data_url
from gemcutter.server.service import Service, unless_gone
from gemcutter.server.wire.fields import ChatInput, refuse
from gemcutter.server.wire.media import MediaSource, sources_of, with_contents


async def prepare(
    service: Service, request: Request, chat: ChatInput, *, count: int = 1, adapter: str | None = None, anthropic: bool = False
) -> PreparedRequest:
    """Return a conversation as a request that may be opened `count` times; nothing is done for it once its client has left.

    Raises ApiError where there is no room, FieldError or RequestError for what can't be served, ClientGone.
    """
    model, options = service.model, service.options
    places = dict(sources_of(chat.messages))
    service.check_room(request, count, sum(len(source.url) for source in places.values()))
    if not places:
        return await service.work(lambda: prepare_chat(model, chat, options, adapter=adapter, anthropic=anthropic))
    sources = list(places.values())
    if model.images is None:
        refuse(sources[0].where, missing_tower(model))
    check_sources(sources, options)

    def read() -> PreparedRequest:
        contents = {source: read_data_url(source) for source in sources}
        shown = replace(chat, messages=with_contents(chat.messages, contents))
        try:
            return prepare_chat(model, shown, options, adapter=adapter, anthropic=anthropic)
        except RequestError as error:
            raise in_its_fields(error, places) from error

    with service.admission.preparing():
        return await unless_gone(request, service.work_on_media(read))


def missing_tower(model: Model) -> str:
    """Return why a model's images can't be read, with the remedy."""
    if model.checkpoint.config.tower_keys.get("vision") is None:
        return "images can't be read: this model has no vision tower; ask one that has"
    return "images can't be read: this server runs without its vision tower; its operator can start it with --media image"


def media_tokens(prepared: PreparedRequest) -> dict[str, int]:
    """Return how many tokens of a prompt are rows of images, as usage names them; nothing where there are none."""
    count = sum(span.rows for span in prepared.request.media)
    return {"image_tokens": count} if count else {}


def in_its_fields(error: RequestError, places: Mapping[str, MediaSource]) -> RequestError:
    """Return an error that names the fields of the body in which images came, instead of their places in the conversation."""
    named = [_named(problem, places) for problem in error.problems]
    if error.problems == (error.summary,):
        return RequestError(named[0])
    return RequestError(error.summary, named)


def _named(problem: str, places: Mapping[str, MediaSource]) -> str:
    place, colon, rest = problem.partition(": ")
    return f"{places[place].where}{colon}{rest}" if place in places else problem
