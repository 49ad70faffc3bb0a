"""POST /v1/audio/transcriptions and /v1/audio/translations, as clients of OpenAI's API call them.

Owns the forms and the order of what is sent. Refuses to know prompts and sounds. Read `wire/transcription.py` for the fields,
`transcription_task.py` for the text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse

from gemcutter.media.long_sound import read_windows
from gemcutter.server import sse
from gemcutter.server.errors import as_api_error
from gemcutter.server.preparation import missing_tower
from gemcutter.server.service import Service, unless_gone
from gemcutter.server.transcription_task import Transcription
from gemcutter.server.wire.fields import refuse
from gemcutter.server.wire.transcription import SpeechInput, read_form

TO = "English"  # what OpenAI's translations are in

Sound = Annotated[UploadFile, File(description="WAV, FLAC, Ogg or MP3, of any length that the operator allows")]
Model = Annotated[str, Form()]
Language = Annotated[str | None, Form(description="a code of ISO 639-1, or the English name, of what is spoken")]
Prompt = Annotated[str | None, Form(description="names and terms, spelled as they are wanted")]
Format = Annotated[str | None, Form(description="json, text or verbose_json")]
Temperature = Annotated[float | None, Form()]
Streamed = Annotated[bool | None, Form()]


def router(service: Service) -> APIRouter:
    """Return the routes over a service."""
    routes = APIRouter(tags=["audio"])

    async def answer(request: Request, file: UploadFile, asked: SpeechInput) -> Response:
        """Return the text of a sound, whole or as it comes."""
        adapter = service.check_model(asked.model)
        if "audio" not in service.model.kinds:
            refuse("file", missing_tower(service.model, "audio"))
        data = await file.read()
        service.check_room(request, 1, len(data))
        with service.admission.preparing():
            most_s = service.options.max_speech_s
            windows = await unless_gone(request, service.work_on_media(lambda: read_windows(data, "file", most_s)))
            task = Transcription(service, asked, windows, adapter)
            await unless_gone(request, task.prepare())
        service.metrics.read_media(["audio"])
        if asked.is_streamed:
            return sse.event_stream(stream(task), task.close, service.options.ping_s)
        await unless_gone(request, whole(task))
        if asked.format == "text":
            return PlainTextResponse(task.text)
        told = {"text": task.text, "usage": task.usage()}
        return JSONResponse(task.verbose() if asked.format == "verbose_json" else told)

    @routes.post("/v1/audio/transcriptions", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
    async def transcriptions(
        request: Request,
        file: Sound,
        model: Model,
        language: Language = None,
        prompt: Prompt = None,
        response_format: Format = None,
        temperature: Temperature = None,
        stream: Streamed = None,
        timestamp_granularities: Annotated[list[str] | None, Form(alias="timestamp_granularities[]")] = None,
    ) -> Response:
        """Write down what is said."""
        asked = read_form(
            model,
            language=language,
            prompt=prompt,
            response_format=response_format,
            temperature=temperature,
            stream=stream,
            granularities=timestamp_granularities or (),
        )
        return await answer(request, file, asked)

    @routes.post("/v1/audio/translations", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
    async def translations(
        request: Request,
        file: Sound,
        model: Model,
        language: Language = None,
        to_language: Annotated[str | None, Form(description="what to translate into; English by default")] = None,
        prompt: Prompt = None,
        response_format: Format = None,
        temperature: Temperature = None,
        stream: Streamed = None,
    ) -> Response:
        """Write down in another language what is said."""
        asked = read_form(
            model,
            language=language,
            target=to_language or TO,
            prompt=prompt,
            response_format=response_format,
            temperature=temperature,
            stream=stream,
        )
        return await answer(request, file, asked)

    return routes


async def whole(task: Transcription) -> None:
    """Run a transcription to its end."""
    async for _ in task.pieces():
        pass


async def stream(task: Transcription) -> AsyncIterator[bytes]:
    """Yield the frames of a stream; an error is a frame, too, because the headers are gone."""
    try:
        async for piece in task.pieces():
            yield sse.frame({"type": "transcript.text.delta", "delta": piece})
        yield sse.frame({"type": "transcript.text.done", "text": task.text, "usage": task.usage()})
    except Exception as error:
        yield sse.frame(as_api_error(error).body(anthropic=False))
    yield sse.DONE
