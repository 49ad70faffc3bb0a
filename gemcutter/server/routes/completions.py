"""POST /v1/completions: raw prompts continued or scored, whole and streamed.

Owns the order of choices (n for each prompt, in the prompts' order) and of what is sent. Read `wire/completions.py` for the body,
`raw_task.py` for prompts and log-probabilities.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gemcutter.completion import Completion
from gemcutter.server import sse
from gemcutter.server.bridge import Reply
from gemcutter.server.chat_events import Envelope, counted, finish_reason
from gemcutter.server.chat_task import copies
from gemcutter.server.errors import as_api_error
from gemcutter.server.merge import merged
from gemcutter.server.raw_task import Offsets, RawRequest, arrays, logprobs, prepare_raw, reply_text
from gemcutter.server.service import Service, unless_gone
from gemcutter.server.wire.completions import CompletionRequest, read_prompts
from gemcutter.server.wire.fields import refuse


def router(service: Service) -> APIRouter:
    """Return the route over a service."""
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/completions", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue raw text or token ids, without a chat template."""
        adapter, count = service.check_model(body.model), body.n or 1
        prompts = read_prompts(body, service.options)
        service.check_room(request, count * len(prompts))
        if body.stream and body.echo:
            refuse("echo", "not supported in a stream; leave one of the two out")
        model, options = service.model, service.options
        raws = await service.work(lambda: [prepare_raw(model, body, prompt, options, adapter) for prompt in prompts])
        raws = [replace(raw, prepared=each) for raw in raws for each in copies(raw.prepared, count)]
        replies = service.open([raw.prepared for raw in raws])
        if body.stream:
            return sse.event_stream(stream(service, body, raws, replies), lambda: service.close(replies), options.ping_s)
        return JSONResponse(await unless_gone(request, whole(service, body, raws, replies)))

    return routes


async def whole(
    service: Service, body: CompletionRequest, raws: Sequence[RawRequest], replies: Sequence[Reply]
) -> dict[str, Any]:
    """Return the answer once all replies have ended."""
    found = await service.finish(replies)
    choices = []
    for index, (raw, each) in enumerate(zip(raws, found, strict=True)):
        wanted = body.logprobs is not None
        told = logprobs(raw, each, service.model.tokenizer, echo=bool(body.echo)) if wanted else None
        text = (raw.text if body.echo else "") + reply_text(each)
        choices.append({"index": index, "text": text, "logprobs": told, "finish_reason": _reason(each)})
    return Envelope(body.model, "text_completion").wrap(choices, usage=_usage(raws, found, body.n or 1))


async def stream(
    service: Service, body: CompletionRequest, raws: Sequence[RawRequest], replies: Sequence[Reply]
) -> AsyncIterator[bytes]:
    """Yield the frames of a stream; an error is a frame, too."""
    envelope, tokenizer = Envelope(body.model, "text_completion"), service.model.tokenizer
    completions, offsets = dict[int, Completion](), [Offsets(tokenizer) for _ in replies]

    def send(index: int, text: str, told: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": told, "finish_reason": reason}
        return sse.frame(envelope.wrap([choice], **({"usage": None} if body.wants_usage else {})))

    try:
        async for index, reading in merged(replies):
            told = None
            if body.logprobs is not None and reading.logprobs:
                told = arrays([each.token for each in reading.logprobs], reading.logprobs, tokenizer, offsets[index])
            text = "".join(chunk.text for chunk in reading.chunks)
            last = reading.chunks[-1].completion if reading.chunks else None
            if text or told is not None:
                yield send(index, text, told)
            if last is not None:
                completions[index] = last
                yield send(index, "", reason=_reason(last))
        if body.wants_usage:
            found = [completions[index] for index in range(len(replies))]
            yield sse.frame(envelope.wrap([], usage=_usage(raws, found, body.n or 1)))
    except Exception as error:
        yield sse.frame(as_api_error(error).body(anthropic=False))
    yield sse.DONE


def _reason(completion: Completion) -> str:
    reason = finish_reason(completion)
    return "stop" if reason == "tool_calls" else reason


def _usage(raws: Sequence[RawRequest], found: Sequence[Completion], count: int) -> dict[str, Any]:
    """Return the tokens of all prompts, each once, and of all replies."""
    prompts = sum(len(raw.prepared.request.prompt) - raw.hidden for raw in raws[::count])
    cached = sum(each.metrics.cached_tokens for each in found[::count])
    return counted(prompts, sum(len(each.tokens) for each in found), cached=cached)
