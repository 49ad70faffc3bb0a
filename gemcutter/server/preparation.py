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
from gemcutter.media_parts import KINDS, TOWERS
from gemcutter.server.chat_task import prepare_chat
from gemcutter.server.media_sources import REMOTE, check_urls, read_here
from gemcutter.server.service import Service, unless_gone
from gemcutter.server.wire.fields import ChatInput, refuse
from gemcutter.server.wire.media import MediaUrl, urls_of, with_contents


async def prepare(
    service: Service, request: Request, chat: ChatInput, *, count: int = 1, adapter: str | None = None, anthropic: bool = False
) -> PreparedRequest:
    """Return a conversation as a request that may be opened `count` times; nothing is done for it once its client has left.

    Raises ApiError where there is no room, FieldError or RequestError for what can't be served, ClientGone.
    """
    model, options = service.model, service.options
    places = dict(urls_of(chat.messages))
    urls = list(places.values())
    service.check_room(request, count, sum(len(each.url) for each in urls))
    if not urls:
        return await service.work(lambda: prepare_chat(model, chat, options, adapter=adapter, anthropic=anthropic))
    for url in urls:
        if url.kind not in model.kinds:
            refuse(url.where, missing_tower(model, url.kind))
    check_urls(urls, options)

    def read(fetched: Mapping[MediaUrl, bytes]) -> PreparedRequest:
        contents = {url: fetched[url] if url in fetched else read_here(url, options) for url in urls}
        shown = replace(chat, messages=with_contents(chat.messages, contents))
        try:
            return prepare_chat(model, shown, options, adapter=adapter, anthropic=anthropic)
        except RequestError as error:
            raise in_its_fields(error, places) from error

    async def find() -> PreparedRequest:
        fetched = await service.fetch([url for url in urls if url.scheme in REMOTE])
        return await service.work_on_media(lambda: read(fetched))

    with service.admission.preparing():
        prepared = await unless_gone(request, find())
    service.metrics.read_media(url.kind for url in urls)
    return prepared


def missing_tower(model: Model, kind: str) -> str:
    """Return why a model can't read media of a kind, with the remedy."""
    called, tower = KINDS[kind][1], TOWERS[kind]
    if kind == "video" and "image" in model.kinds:
        return f"{called} can't be read: the tokenizer of this model has no marker for them; send frames as images"
    if model.checkpoint.config.tower_keys.get(tower.partition(" ")[0]) is None:
        return f"{called} can't be read: this model has no {tower}; ask one that has"
    return f"{called} can't be read: this server runs without its {tower}; its operator can start it with --media {kind}"


def media_tokens(prepared: PreparedRequest) -> dict[str, int]:
    """Return how many tokens of a prompt are rows of images, or frames, and of sounds, as usage names them."""
    counts = {"image_tokens": 0, "audio_tokens": 0}
    for span in prepared.request.media:
        counts["image_tokens" if span.is_block else "audio_tokens"] += span.rows
    return {name: count for name, count in counts.items() if count}


def in_its_fields(error: RequestError, places: Mapping[str, MediaUrl]) -> RequestError:
    """Return an error that names the fields of the body in which images came, instead of their places in the conversation."""
    named = [_named(problem, places) for problem in error.problems]
    if error.problems == (error.summary,):
        return RequestError(named[0])
    return RequestError(error.summary, named)


def _named(problem: str, places: Mapping[str, MediaUrl]) -> str:
    place, colon, rest = problem.partition(": ")
    return f"{places[place].where}{colon}{rest}" if place in places else problem
