"""From a sound of any length to a text: each window a request of its own, a few of them at a time, their texts in order.

Owns what is kept of an answer (of a translation, what stands behind its mark), how the texts of windows are joined, and what is
told of them in the end. Refuses to know forms and HTTP. Read `wire/transcription.py` for what is asked, `media/long_sound.py` for
windows, `routes/audio.py` for who sends the text.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemcutter.api import PreparedRequest
from gemcutter.completion import Completion
from gemcutter.media.decode_sound import RATE
from gemcutter.media.long_sound import Window
from gemcutter.server.chat_task import prepare_chat
from gemcutter.server.service import Service
from gemcutter.server.wire.transcription import SpeechInput

AT_ONCE = 4  # windows of one sound that are heard side by side
MOST_TOKENS = 1024  # of an answer to one window: four times what people say in 30 s


class Heard:
    """Turns the pieces of an answer into text that may be sent, white space at both ends left out."""

    def __init__(self, mark: str | None) -> None:
        self._mark, self._all, self._held, self.text = mark, "", "", ""

    def push(self, piece: str) -> str:
        """Return what a piece adds to the text; nothing before the mark, where there is to be one."""
        if self._mark is not None:
            self._all += piece
            place = self._all.find(self._mark)
            if place < 0:
                return ""
            piece, self._mark = self._all[place + len(self._mark) :], None
        return self._add(piece)

    def finish(self) -> str:
        """Return what is left: the whole answer, where the mark never came."""
        if self._mark is None:
            return ""
        self._mark = None
        return self._add(self._all)

    def _add(self, piece: str) -> str:
        """Return the new text up to its last word; white space waits for a word behind it."""
        found = self._held + piece if self.text else piece.lstrip()
        kept = found.rstrip()
        self._held = found[len(kept) :] if self.text or kept else ""
        self.text += kept
        return kept


@dataclass(slots=True)
class Segment:
    """The text of one window, and the reply that it came from, if there was anything to hear."""

    window: Window
    text: str = ""
    completion: Completion | None = None
    audio_tokens: int = 0
    pieces: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)  # of the text, None at its end


class Transcription:
    """One sound on its way to a text; iterate over `pieces` once."""

    def __init__(self, service: Service, asked: SpeechInput, windows: Sequence[Window], adapter: str | None = None) -> None:
        self.segments = [Segment(window) for window in windows]
        self._service, self._asked, self._adapter = service, asked, adapter
        self._first: PreparedRequest | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def prepare(self) -> None:
        """Encode the first window, so that what can't be served is told before anything is sent. Raises RequestError."""
        if not self.segments[0].window.is_silent:
            self._first = await self._prepared(self.segments[0].window)

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it comes, that of a window after that of the one before. Raises what requests raise."""
        self._tasks = [asyncio.create_task(self._hear(segment)) for segment in self.segments]
        is_begun = False
        try:
            for segment, task in zip(self.segments, self._tasks, strict=True):
                is_first = True
                while (piece := await segment.pieces.get()) is not None:
                    yield f" {piece}" if is_first and is_begun else piece
                    is_first, is_begun = False, True
                await task
        finally:
            self.close()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _hear(self, segment: Segment) -> None:
        """Write down one window, when it is its turn."""
        try:
            async with self._slots:
                if not segment.window.is_silent:
                    first, self._first = self._first, None
                    await self._write(segment, first or await self._prepared(segment.window))
        finally:
            segment.pieces.put_nowait(None)

    async def _write(self, segment: Segment, prepared: PreparedRequest) -> None:
        heard, (reply,) = Heard(self._asked.mark), self._service.open([prepared])
        segment.audio_tokens = sum(span.rows for span in prepared.request.media)
        try:
            async for reading in reply:
                for chunk in reading.chunks:
                    if piece := heard.push(chunk.text if chunk.kind == "content" else ""):
                        segment.pieces.put_nowait(piece)
            if piece := heard.finish():
                segment.pieces.put_nowait(piece)
            segment.text, segment.completion = heard.text, reply.completion
        finally:
            self._service.close([reply])

    async def _prepared(self, window: Window) -> PreparedRequest:
        model, options = self._service.model, self._service.options
        chat = self._asked.to_chat((window.samples, RATE))
        found = await self._service.work_on_media(lambda: prepare_chat(model, chat, options, adapter=self._adapter))
        return replace(found, request=replace(found.request, max_tokens=min(found.request.max_tokens, MOST_TOKENS)))

    def close(self) -> None:
        """End the requests that run."""
        for task in self._tasks:
            task.cancel()

    @property
    def text(self) -> str:
        """Return the text so far."""
        return " ".join(segment.text for segment in self.segments if segment.text)

    def usage(self) -> dict[str, Any]:
        """Return the tokens of all windows as OpenAI's API counts them."""
        done = [segment.completion for segment in self.segments if segment.completion is not None]
        given, written = sum(len(each.prompt_tokens) for each in done), sum(len(each.tokens) for each in done)
        audio = sum(segment.audio_tokens for segment in self.segments if segment.completion is not None)
        details = {"text_tokens": given - audio, "audio_tokens": audio}
        return {
            "type": "tokens",
            "input_tokens": given,
            "input_token_details": details,
            "output_tokens": written,
            "total_tokens": given + written,
        }

    def verbose(self) -> dict[str, Any]:
        """Return text and segments; whatever can't be known of them is left out."""
        task = "transcribe" if self._asked.target is None else "translate"
        language = (self._asked.target or self._asked.language or "unknown").lower()
        segments = [_segment(index, each, self._asked) for index, each in enumerate(self.segments) if each.completion is not None]
        duration = self.segments[-1].window.stop_s
        told = {"task": task, "language": language, "duration": round(duration, 3), "text": self.text, "segments": segments}
        return {**told, "usage": self.usage()}


def _segment(index: int, segment: Segment, asked: SpeechInput) -> dict[str, Any]:
    found, data = segment.completion, segment.text.encode()
    assert found is not None
    logprobs = [each.logprob for each in found.logprobs]
    return {
        "id": index,
        "seek": round(segment.window.start_s * 100),
        "start": round(segment.window.start_s, 3),
        "end": round(segment.window.stop_s, 3),
        "text": segment.text,
        "tokens": list(found.tokens),
        "temperature": asked.sampling["temperature"],
        "avg_logprob": sum(logprobs) / len(logprobs) if logprobs else 0.0,
        "compression_ratio": len(data) / len(zlib.compress(data)) if data else 0.0,
    }
